"""What of a finished run goes on in a new one: its result, its data, how well it knew them before?

Goes in: a run folder. Comes out: StartFrom, and profiles of its data as earlier tasks. Never does: copy or
load weights; continue a result that cannot be trained further (it says what can be done instead).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from advisor.errors import InputError, RefusedError
from advisor.storage import read_record
from advisor.types import DatasetProfile, Plan, Recipe, Record, RunReport, StartFrom, Value

TRAINED_FURTHER = ("lora", "qlora", "ia3", "ln_tuning", "adapter")
"""Adapters that can be loaded and trained on."""
SHAPE = ("lora_r", "lora_alpha", "use_rslora", "use_dora", "target", "bottleneck", "bottleneck_style")
REPLAYED = (
    "instruction", "chat", "prompt_completion", "qa", "classification", "tool_calling", "reasoning_chat",
    "raw_text", "documents",
)  # fmt: skip
"""Kinds of data that a stage can mix in; pairs and prompts are not read for their answers."""


class Finished(Record, frozen=True, kw_only=True):
    """A finished run, read."""

    plan: Plan
    start: StartFrom
    profiles: tuple[DatasetProfile, ...]
    """What it was trained on, each as an earlier task."""


def finished_plan(folder: Path) -> Plan:
    """Return the plan of a run that is done.

    Raises:
        InputError: it is no run folder, or was not trained to its end.
    """
    if not (folder / "plan.json").is_file():
        raise InputError(f"{folder} is no run folder: it has no plan.json.", "See yours: ftadvisor runs")
    plan = read_record(folder / "plan.json", Plan)
    if (
        not (folder / "report.json").is_file()
        or read_record(folder / "report.json", RunReport).status != "done"
    ):
        raise InputError(
            f"{folder} is not trained to its end.", f"Train it first: ftadvisor run {folder} --resume"
        )
    return plan


def read_finished(folder: Path, *, given: Collection[DatasetProfile] = ()) -> Finished:
    """Read a run folder that is to be continued.

    Args:
        folder: of a run that is done.
        given: the datasets that are named anew. An earlier one with the same rows is not taken twice, one of
            the same name gets another.

    Raises:
        InputError: it is no run folder, or nothing was trained in it yet.
        RefusedError: its result cannot be trained further.
    """
    plan = finished_plan(folder)
    result: Literal["adapter", "model"] = "adapter" if (folder / "adapter").is_dir() else "model"
    if result == "adapter" and plan.method not in TRAINED_FURTHER:
        raise RefusedError(
            f"The result of {folder} ({plan.method}) cannot be trained further.",
            "Plan anew with the data of both tasks (--data OLD --data NEW), or train an adapter beside it: "
            "the same with --goal 'one adapter per task'.",
            code="cannot_continue",
        )
    if plan.apart:
        raise RefusedError(
            f"{folder} trained an adapter for each task; it is not known which one should go on.",
            "Train one more adapter beside them: the same with --goal 'one adapter per task'.",
            code="cannot_continue",
        )
    if plan.stages[-1].objective == "reward":
        raise RefusedError(
            f"The result of {folder} marks answers and writes none, so it cannot learn to.",
            "Train against it (ftadvisor plan --method rloo --set reward_model=DIR), or name another run.",
            code="cannot_continue",
        )
    twins = {one.sha256: one.name for one in given if one.sha256 is not None}
    taken = {one.name for one in given}
    names, profiles = {}, []
    for profile in plan.datasets:
        twin = twins.get(profile.sha256) if profile.sha256 is not None else None
        free = profile.name if profile.name not in taken else f"earlier-{profile.name}"
        names[profile.name] = twin or free
        if twin is None and profile.kind in REPLAYED and profile.path is not None:
            profiles.append(msgspec.structs.replace(profile, name=free, role="earlier_task"))
    untrained = {names[name]: loss for name, loss in _untrained(folder, plan).items() if name in names}
    shape = _shape(folder) if result == "adapter" else {}
    start = StartFrom(
        folder=str(folder.resolve()),
        result=result,
        tuner=plan.method,
        shape=shape,
        untrained_losses=untrained,
    )
    return Finished(plan=plan, start=start, profiles=tuple(profiles))


def _shape(folder: Path) -> dict[str, Value]:
    """Return the settings of the adapter's shape, from the recipe that made it first."""
    first = sorted(folder.glob("recipe*.yaml"))[0]
    settings = read_record(first, Recipe).settings
    return {name: settings[name] for name in SHAPE if name in settings}


def _untrained(folder: Path, plan: Plan) -> dict[str, float]:
    """Return the held-out loss of each dataset before the run; its own earlier ones keep theirs."""
    found: dict[str, float] = dict(plan.start.untrained_losses) if plan.start else {}
    for number, stage in enumerate(plan.stages, start=1):
        if stage.objective not in ("sft", "cpt"):
            continue
        away = folder / "stages" / f"{number}-{stage.objective}" / "report.json"
        report = read_record(away if away.is_file() else folder / "report.json", RunReport)
        before = report.heldout_figures.get("before", {})
        for name in stage.datasets:
            loss = before.get(f"loss of {name}", before.get("loss") if len(stage.datasets) == 1 else None)
            if loss is not None:
                found.setdefault(name, loss)
    return found
