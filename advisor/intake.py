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

from advisor.earlier import Finished, finished_plan, read_finished
from advisor.errors import InputError, RefusedError, UsageError
from advisor.goals import understand
from advisor.inputs import Inputs, declared
from advisor.knowledge import Knowledge
from advisor.probe.calibration import measured_rates
from advisor.probe.dataset import profile_dataset
from advisor.probe.hardware import probe_hardware
from advisor.probe.model import read_model, tokenizer_file
from advisor.resources import base_chat_template
from advisor.scenario import declared_hardware, name_model
from advisor.storage import read_yaml
from advisor.types import DatasetProfile, Goal, Hardware, ModelSpec, Scenario

Notify = Callable[[str], None]
LIKE = "LlamaForCausalLM"
"""What a model of an unknown architecture is estimated as; it is not planned for."""


def gather(inputs: Inputs, knowledge: Knowledge, notify: Notify) -> Scenario:
    """Return the scenario that the planner judges.

    Args:
        inputs: the options.
        knowledge: the knowledge base.
        notify: told in a few words what is being looked at.

    Raises:
        AdvisorError: whatever the probes and decoders raise.
    """
    if inputs.scenario is not None:
        return declared(inputs, knowledge)
    if inputs.continue_from is not None:
        return _continued(inputs, knowledge, notify)
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


def _continued(inputs: Inputs, knowledge: Knowledge, notify: Notify) -> Scenario:
    """Return the scenario of a run that goes on from another one's result and keeps what that had learned, or
    of one beside it where every task has an adapter of its own.

    Raises:
        UsageError: a model was named beside it.
        RefusedError: another tuner than that of the kept adapter was asked for.
    """
    if inputs.model != "auto":
        raise UsageError(
            "--continue takes the model of the earlier run; --model cannot be added.",
            "Leave one of them away.",
        )
    alone = msgspec.structs.replace(inputs, continue_from=None)
    folder = Path(str(inputs.continue_from))
    if "tenants" in understand(_goal(inputs), knowledge).wishes:
        model, method = _beside(folder, inputs)
        notify(f"Leaving {folder} as it is, for a new adapter beside it")
        return gather(msgspec.structs.replace(alone, model=model, method=method), knowledge, notify)
    model, method = _kept(folder, inputs)
    case = gather(msgspec.structs.replace(alone, model=model, method=method), knowledge, notify)
    finished = read_finished(folder, given=case.datasets)
    _require_data(finished, folder)
    spec = case.spec
    if spec is not None and finished.start.result == "model" and finished.plan.model is not None:
        base = finished.plan.model
        spec = msgspec.structs.replace(spec, id=f"{base.id}-{folder.resolve().name}", licence=base.licence)
    return msgspec.structs.replace(
        case,
        spec=spec,
        datasets=case.datasets + finished.profiles,
        goal=msgspec.structs.replace(case.goal, model_state="own_sft", must_not_forget=True),
        start=finished.start,
    )


def _require_data(finished: Finished, folder: Path) -> None:
    """Refuse to go on without the rows that keep what was learned.

    Raises:
        InputError: they are not where they were.
    """
    gone = [f"{one.name} ({one.path})" for one in finished.profiles if not Path(str(one.path)).exists()]
    if gone:
        raise InputError(
            f"The data that {folder} learned is not there any more: {', '.join(gone)}.",
            "Put it back, or say where the same rows lie now: --earlier NAME=FILE. Without them, merge the "
            f"result (ftadvisor export {folder} --to merged) and plan with that folder as --model.",
        )


def _beside(folder: Path, inputs: Inputs) -> tuple[str, str | None]:
    """(model, method) of a new adapter on what an earlier run stands on."""
    plan = finished_plan(folder)
    assert plan.model is not None  # a plan that was trained has one
    if (folder / "model").is_dir():
        return str(folder / "model"), inputs.method
    return plan.model.path or plan.model.id, inputs.method or plan.method


def _kept(folder: Path, inputs: Inputs) -> tuple[str, str | None]:
    """(model, method) with which an earlier run goes on."""
    finished = read_finished(folder)
    if finished.start.result == "model":
        return str(folder / "model"), inputs.method
    tuner, plan = finished.start.tuner, finished.plan
    asked = (inputs.method or tuner).split("+")[0]
    if asked != tuner and {asked, tuner} != {"lora", "qlora"}:
        raise RefusedError(
            f"The result of {folder} is an adapter ({tuner}); {asked} cannot go on with it.",
            f"Leave --method away, or merge it first: ftadvisor export {folder} --to merged, then plan with "
            "--model and that folder, and the old data as --earlier.",
            code="cannot_continue",
        )
    assert plan.model is not None  # a plan that was trained has one
    return plan.model.path or plan.model.id, inputs.method or tuner


def profiles_of(inputs: Inputs, knowledge: Knowledge, notify: Notify) -> tuple[DatasetProfile, ...]:
    """Return the profiles of `inputs.data`, with tokens counted by `inputs.model` where it can be read."""
    return _profiles(inputs, _spec(inputs, knowledge), notify)


def hardware_of(inputs: Inputs, knowledge: Knowledge) -> Hardware:
    """Return the machine to plan for: declared by `--hardware`, else probed, with its measured rates."""
    if inputs.hardware is None:
        output = Path(inputs.out) if inputs.out else Path.cwd()
        found = probe_hardware(output=output, cache=cache_dir())
        days = knowledge.rules["probe"]["bench"]["recent_days"]
        return msgspec.structs.replace(found, rates=measured_rates(found, recent_days=days))
    path = Path(inputs.hardware)
    if path.suffix in (".yaml", ".yml", ".json"):
        declared: Any = read_yaml(path, error=UsageError, remedy="The keys: ftadvisor explain scenario")
        if isinstance(declared, dict) and "hardware" in declared:
            declared = declared["hardware"]
        return declared_hardware(declared, knowledge)
    return declared_hardware(inputs.hardware, knowledge)


def model_spec(inputs: Inputs, knowledge: Knowledge) -> ModelSpec:
    """Return the one model that `inputs.model` names; an unknown architecture counts as Llama, and says so.

    Raises:
        UsageError: it names none.
    """
    if inputs.model == "auto":
        raise UsageError("This needs one model.", "--model HUB_ID, a folder, a config.json, or starter")
    spec = _spec(inputs, knowledge, like=LIKE) or name_model(inputs.model, knowledge).spec
    if spec is None:
        raise UsageError(
            f"{inputs.model!r} is no model that can be read.", "--model HUB_ID, a folder, or starter"
        )
    return spec


def cache_dir() -> Path:
    """Return the folder where the hub's client keeps what it downloads: HF_HOME, or its usual place."""
    return Path(os.environ.get("HF_HOME", _caches() / "huggingface"))


def own_cache_dir() -> Path:
    """Return the folder where ftadvisor keeps what it can work out again."""
    return _caches() / "ftadvisor"


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def _spec(inputs: Inputs, knowledge: Knowledge, *, like: str | None = None) -> ModelSpec | None:
    """Read the model where it can be read; None leaves `auto` and free words to the recommender."""
    given = inputs.model
    if given == "auto":
        return None
    if given == "starter":
        return read_model(given, offline=inputs.offline, knowledge=knowledge)
    if Path(given).exists():
        place = str(Path(given).resolve())
        return read_model(place, offline=inputs.offline, like=like, knowledge=knowledge)
    if name_model(given, knowledge).how not in ("guessed", "unknown"):
        return None
    return read_model(given, offline=inputs.offline, like=like, knowledge=knowledge)


def _profiles(inputs: Inputs, spec: ModelSpec | None, notify: Notify) -> tuple[DatasetProfile, ...]:
    earlier = tuple(
        msgspec.structs.replace(_profile(text, spec, inputs, notify), role="earlier_task")
        for text in inputs.earlier
    )
    profiles = tuple(_profile(text, spec, inputs, notify) for text in inputs.data) + earlier
    names = [profile.name for profile in profiles]
    if len(set(names)) != len(names):
        raise UsageError(
            f"Two datasets have the same name: {', '.join(names)}.",
            "Name them: --data name=path, --earlier name=path",
        )
    contents: dict[str, str] = {}
    for profile in profiles:
        if profile.sha256 and (first := contents.setdefault(profile.sha256, profile.name)) != profile.name:
            raise UsageError(
                f"{first} and {profile.name} hold the same rows, so each would count twice.",
                "Give one of them.",
            )
    return profiles


def _profile(text: str, spec: ModelSpec | None, inputs: Inputs, notify: Notify) -> DatasetProfile:
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = "", text
    notify(f"Reading {source}")
    return profile_dataset(
        source,
        name=name or Path(source).stem,
        tokenizer_file=tokenizer_file(spec) if spec is not None else None,
        chat_template=_template(spec) if spec else None,
        offline=inputs.offline,
    )


def _template(spec: ModelSpec) -> str | None:
    """Return the template that turns are written with in training; None where that cannot be known."""
    given = any(finding.code == "no_chat_template" for finding in spec.findings)
    return spec.chat_template or (base_chat_template() if given else None)


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
