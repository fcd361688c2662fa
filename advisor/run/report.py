"""What came of a run: folds its events, over all interruptions, into one RunReport.

Goes in: events, recipe, the stage of the plan. Comes out: RunReport. Never does: I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from advisor.errors import AdvisorError
from advisor.run.continual import memories_of, not_learned, with_memories
from advisor.run.thresholds import ForgettingRules
from advisor.types import (
    Band,
    Evaluation,
    Recipe,
    RunReport,
    StageEstimate,
    StageOutcome,
)

Status = Literal["done", "failed", "interrupted", "refused"]


def build_report(
    events: Iterable[dict[str, Any]],
    recipe: Recipe,
    *,
    recipe_sha256: str,
    status: Status,
    estimate: StageEstimate | None,
    artefacts: dict[str, str],
    packages: dict[str, str],
    limits: ForgettingRules,
    error: AdvisorError | None,
    evaluation: Evaluation | None = None,
    earlier_stages: tuple[StageOutcome, ...] = (),
) -> RunReport:
    """Return the report of a run.

    Args:
        events: all events of the stage, oldest first; steps that were trained twice because a run was resumed
            from an earlier checkpoint count once.
        recipe: what was run.
        recipe_sha256: of the recipe file.
        status: how it ended.
        estimate: what the plan predicted.
        artefacts: name -> path relative to the run folder.
        packages: installed versions.
        limits: how much of earlier tasks may be lost.
        error: why it failed.
        evaluation: what the training changed.
        earlier_stages: outcomes of the stages before this one.
    """
    seen = list(events)
    steps = [event for event in seen if event["event"] == "step"]
    last: dict[str, Any] = steps[-1] if steps else {}
    losses = {int(event["step"]): event.get("loss") for event in steps}
    asking = {event.get("when"): float(event["seconds"]) for event in seen if event["event"] == "evaluation"}
    heldout = {event.get("when"): event.get("loss") for event in seen if event["event"] == "heldout"}
    peaks = [int(event["memory_bytes"]) for event in seen if event.get("memory_bytes")]
    probes = [event for event in seen if event["event"] == "probe"]
    probe: dict[str, Any] = probes[-1] if probes else {}
    figures = figures_of_both(seen)
    memories = memories_of(recipe.datasets, figures, limits)
    forgotten = tuple(one.words for one in memories.values() if not one.enough)
    missed = not_learned(recipe.datasets, figures, limits) if evaluation is None else evaluation.not_learned
    return RunReport(
        ok=status == "done" and not forgotten and not missed,
        status=status,
        recipe_sha256=recipe_sha256,
        program=recipe.program,
        method=recipe.tuner,
        steps=int(last.get("step", 0)),
        steps_planned=int(last.get("total", 0)),
        seconds=sum(float(event["seconds"]) for event in seen if event["event"] == "end"),
        predicted_seconds=estimate.seconds if estimate else None,
        probed_seconds=probe.get("seconds"),
        whole_seconds=_band(probe.get("whole_seconds")),
        predicted_peak_bytes=estimate.peak_bytes if estimate else None,
        measured_peak_bytes=max(peaks, default=None),
        probed_peak_bytes=probe.get("measured_peak_bytes"),
        whole_peak_bytes=_band(probe.get("whole_peak_bytes")),
        predicted_tokens_per_second=estimate.tokens_per_second if estimate else None,
        tokens_per_second=last.get("tokens_per_second"),
        earlier_stages=earlier_stages,
        first_loss=losses.get(1),
        last_loss=last.get("loss"),
        heldout_loss_before=heldout.get("before"),
        heldout_loss_after=heldout.get("after"),
        heldout_figures=figures,
        kept={name: round(one.kept, 4) for name, one in memories.items() if one.kept is not None},
        forgotten=forgotten,
        not_learned=missed,
        supervised_tokens=_latest(seen, "data", "supervised_tokens"),
        trainable_parameters=_latest(seen, "model", "trainable_parameters"),
        artefacts=artefacts,
        decisions=tuple(str(event["message"]) for event in seen if event["event"] == "decision"),
        packages=packages,
        evaluation_seconds=round(sum(asking.values()), 2) if asking else None,
        evaluation=evaluation and with_memories(evaluation, memories.values()),
        error=error.message if error else None,
        remedy=error.remedy if error else None,
    )


def outcome(stage: str, report: RunReport) -> StageOutcome:
    """Return what a stage's report says of predicted and measured."""
    return StageOutcome(
        stage=stage, **{name: getattr(report, name) for name in StageOutcome.__struct_fields__[1:]}
    )


def figures_of_both(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what was measured before and after on what is not trained on."""
    return {when: figures for when in ("before", "after") if (figures := _figures(events, when))}


def _figures(events: list[dict[str, Any]], when: str) -> dict[str, float]:
    """Return the last figures that were measured at a time."""
    found = [event for event in events if event["event"] == "heldout" and event.get("when") == when]
    rest = ("time", "stage", "event", "when", "step")
    last = found[-1].items() if found else ()
    return {name: float(value) for name, value in last if name not in rest and value is not None}


def _band(value: dict[str, float] | None) -> Band | None:
    return None if value is None else Band(**value)


def _latest(events: list[dict[str, Any]], name: str, field: str) -> int | None:
    found = (event[field] for event in reversed(events) if event["event"] == name and field in event)
    return next((int(value) for value in found), None)
