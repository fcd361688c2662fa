"""What a person gave on the command line, as one record, and the scenario that a scenario file declares.

Goes in: option values, a scenario file. Comes out: `Inputs`, `Scenario`. Never does: probe, judge, load what
only probing needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from advisor.errors import DataError, ModelError, UsageError
from advisor.knowledge import Knowledge
from advisor.scenario import decode_scenario
from advisor.storage import read_yaml
from advisor.types import Record, Scenario, Value


class Inputs(Record, frozen=True, kw_only=True):
    """The planning options, as given; their names are the flags."""

    model: str = "auto"
    data: tuple[str, ...] = ()
    """Paths or hub ids; `name=path` names a task."""
    earlier: tuple[str, ...] = ()
    """Data of what the model must not forget, given as `data` is."""
    continue_from: str | None = None
    """Folder of a finished run whose result is trained further."""
    goal: str = ""
    deploy: str = ""
    commercial: bool | None = None
    must_not_forget: bool = False
    max_hours: float | None = None
    method: str | None = None
    hardware: str | None = None
    """None: this machine. Else a name from kb/hardware or a YAML file."""
    scenario: str | None = None
    settings: dict[str, Value] = {}
    offline: bool = False
    force: bool = False
    out: str | None = None


def parse_setting(text: str) -> tuple[str, Value]:
    """Parse one `--set key=value`; the value is read as YAML, so 2e-4, true and [a, b] have their types.

    Raises:
        UsageError: there is no `=`, or the value is not a plain one.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r} is not key=value.", "For example: --set learning_rate=1e-4")
    try:
        value = float(raw)
        if value.is_integer() and not set(raw.lower()) & {".", "e"}:
            return key.strip(), int(value)
        return key.strip(), value
    except ValueError:
        pass
    try:
        return key.strip(), msgspec.convert(yaml.safe_load(raw), type=Value)
    except (yaml.YAMLError, msgspec.ValidationError) as problem:
        raise UsageError(
            f"--set {key}: {raw!r} is not a plain value.", "Numbers, words, true or false."
        ) from problem


def declared(inputs: Inputs, knowledge: Knowledge) -> Scenario:
    """Return the scenario of `--scenario FILE`, with --method, --goal, --set and --force on top.

    Raises:
        UsageError: the file is wrong, or --model or --data was given beside it.
    """
    if inputs.data or inputs.earlier or inputs.continue_from or inputs.model != "auto":
        raise UsageError(
            "--scenario declares model and data; --model, --data, --earlier and --continue cannot be added.",
            "Put them into the scenario file, or leave --scenario away.",
        )
    content = read_yaml(
        Path(str(inputs.scenario)),
        error=UsageError,
        remedy="Check the path of --scenario and the YAML in it.",
    )
    scenario = decode_scenario(content, knowledge)
    goal = scenario.goal
    changes: dict[str, Any] = {"force": inputs.force or goal.force}
    if inputs.method:
        changes["requested_method"] = inputs.method
    if inputs.goal:
        changes["text"] = inputs.goal
    return msgspec.structs.replace(
        scenario,
        goal=msgspec.structs.replace(goal, **changes),
        overrides={**scenario.overrides, **inputs.settings},
    )


def require_files(scenario: Scenario) -> None:
    """Refuse to write a run folder without training data or with a model folder that lacks a part.

    Raises:
        DataError: there is no dataset, or one was only declared.
        ModelError: the model cannot be loaded as it lies there.
    """
    for finding in scenario.spec.findings if scenario.spec else ():
        if finding.severity == "error":
            raise ModelError(f"{scenario.model}: {finding.message}", finding.remedy or "", code=finding.code)
    if not scenario.datasets:
        raise DataError("No training data was given.", "Add --data FILE, or look only: --dry-run")
    declared = [profile.name for profile in scenario.datasets if profile.path is None]
    if declared:
        raise DataError(
            f"The data of a scenario file is only declared ({', '.join(declared)}); a run needs files.",
            "Plan with --data FILE, or look only: --dry-run",
        )
