"""Turns what a person gave on the command line or in the wizard into one Scenario, by probing or declaring.

Goes in: `Inputs`, the knowledge base. Comes out: `Scenario`. Never does: judge, ask, write; use the network
for a model that kb/ knows or that lies on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from advisor.errors import DataError, UsageError
from advisor.knowledge import Knowledge
from advisor.probe.dataset import profile_dataset
from advisor.probe.hardware import probe_hardware
from advisor.probe.model import read_model
from advisor.scenario import declared_hardware, decode_scenario, spec_for
from advisor.storage import read_yaml
from advisor.types import DatasetProfile, Finding, Goal, Hardware, ModelSpec, Record, Scenario, Value

Notify = Callable[[str], None]


class Inputs(Record, frozen=True, kw_only=True):
    """The planning options, as given; their names are the flags."""

    model: str = "auto"
    data: tuple[str, ...] = ()
    """Paths or hub ids; `name=path` names a task."""
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


def gather(inputs: Inputs, knowledge: Knowledge, notify: Notify) -> Scenario:
    """Return the scenario that the planner judges.

    Args:
        inputs: the options; `scenario` excludes the others that describe the case.
        knowledge: the knowledge base.
        notify: told in a few words what is being looked at.

    Raises:
        AdvisorError: whatever the probes and decoders raise.
    """
    if inputs.scenario is not None:
        return _declared(inputs, knowledge)
    notify("Looking at the machine")
    hardware = hardware_of(inputs, knowledge)
    notify("Looking at the model")
    spec = _spec(inputs, knowledge)
    return Scenario(
        hardware=hardware,
        model=inputs.model,
        spec=spec,
        datasets=_profiles(inputs, spec, notify),
        goal=_goal(inputs),
        overrides=inputs.settings,
    )


def profiles_of(inputs: Inputs, knowledge: Knowledge, notify: Notify) -> tuple[DatasetProfile, ...]:
    """Return the profiles of `inputs.data`, with tokens counted by `inputs.model` where it can be read."""
    return _profiles(inputs, _spec(inputs, knowledge), notify)


def hardware_of(inputs: Inputs, knowledge: Knowledge) -> Hardware:
    """Return the machine to plan for: declared by `--hardware`, else probed."""
    if inputs.hardware is None:
        output = Path(inputs.out) if inputs.out else Path.cwd()
        return probe_hardware(output=output, cache=cache_dir())
    path = Path(inputs.hardware)
    if path.suffix in (".yaml", ".yml", ".json"):
        declared: Any = read_yaml(
            path, error=UsageError, remedy="See CONTRACT: the hardware keys of a scenario."
        )
        if isinstance(declared, dict) and "hardware" in declared:
            declared = declared["hardware"]
        return declared_hardware(declared, knowledge)
    return declared_hardware(inputs.hardware, knowledge)


def model_spec(inputs: Inputs, knowledge: Knowledge) -> ModelSpec:
    """Return the one model that `inputs.model` names.

    Raises:
        UsageError: it says `auto`.
    """
    if inputs.model == "auto":
        raise UsageError("This needs one model.", "--model HUB_ID, a folder, a config.json, or starter")
    return _spec(inputs, knowledge) or spec_for(inputs.model, knowledge)


def cache_dir() -> Path:
    """Return the folder where the hub's client keeps what it downloads: HF_HOME, or its usual place."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", usual))


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
        return key.strip(), msgspec.convert(yaml.safe_load(raw), type=Value)  # type: ignore[call-overload, no-any-return]
    except (yaml.YAMLError, msgspec.ValidationError) as problem:
        raise UsageError(
            f"--set {key}: {raw!r} is not a plain value.", "Numbers, words, true or false."
        ) from problem


def _declared(inputs: Inputs, knowledge: Knowledge) -> Scenario:
    if inputs.data or inputs.model != "auto" or inputs.hardware:
        raise UsageError(
            "--scenario declares hardware, model and data; --hardware, --model and --data cannot be added.",
            "Put them into the scenario file, or leave --scenario away.",
        )
    scenario = decode_scenario(read_yaml(Path(str(inputs.scenario)), error=UsageError), knowledge)
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


def _spec(inputs: Inputs, knowledge: Knowledge) -> ModelSpec | None:
    """Read the model where it can be read; None leaves `auto` and free words to the recommender."""
    given = inputs.model
    if given == "auto":
        return None
    if given == "starter":
        return read_model(given, offline=inputs.offline, knowledge=knowledge)
    if Path(given).exists():
        return read_model(str(Path(given).resolve()), offline=inputs.offline, knowledge=knowledge)
    known = spec_for(given, knowledge)
    if known is not None:
        return None
    return read_model(given, offline=inputs.offline, knowledge=knowledge)


def _profiles(inputs: Inputs, spec: ModelSpec | None, notify: Notify) -> tuple[DatasetProfile, ...]:
    profiles = tuple(_profile(text, spec, inputs, notify) for text in inputs.data)
    names = [profile.name for profile in profiles]
    if len(set(names)) != len(names):
        raise UsageError(
            f"Two datasets have the same name: {', '.join(names)}.", "Name them: --data name=path"
        )
    return profiles


def _profile(text: str, spec: ModelSpec | None, inputs: Inputs, notify: Notify) -> DatasetProfile:
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = "", text
    notify(f"Reading {source}")
    tokenizer = Path(spec.path) / "tokenizer.json" if spec is not None and spec.path else None
    return profile_dataset(
        source,
        name=name or Path(source).stem,
        tokenizer_file=tokenizer if tokenizer is not None and tokenizer.is_file() else None,
        chat_template=spec.chat_template if spec else None,
        offline=inputs.offline,
    )


def _goal(inputs: Inputs) -> Goal:
    return Goal(
        text=inputs.goal,
        deploy=inputs.deploy,
        commercial=inputs.commercial,
        must_not_forget=inputs.must_not_forget,
        max_hours=inputs.max_hours,
        requested_method=inputs.method,
        force=inputs.force,
    )


def blocking_findings(profiles: tuple[DatasetProfile, ...]) -> list[Finding]:
    """Return the findings that make training pointless."""
    return [f for profile in profiles for f in profile.findings if f.severity == "error"]


def require_data(scenario: Scenario) -> None:
    """Refuse to write a run folder without training data.

    Raises:
        DataError: there is no dataset, or one was only declared.
    """
    if not scenario.datasets:
        raise DataError("No training data was given.", "Add --data FILE, or look only: --dry-run")
    declared = [profile.name for profile in scenario.datasets if profile.path is None]
    if declared:
        raise DataError(
            f"The data of a scenario file is only declared ({', '.join(declared)}); a run needs files.",
            "Plan with --data FILE, or look only: --dry-run",
        )
