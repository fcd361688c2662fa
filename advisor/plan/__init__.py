"""What exactly should be run: stages with every setting explained, estimates, warnings, export?

Goes in: a Scenario and the knowledge base. Comes out: a Plan; the same input gives the same bytes.
Never does: I/O; choose differently from advisor.recommend.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from advisor.errors import UsageError
from advisor.estimate.disk import estimate_disk
from advisor.estimate.memory import estimate_memory
from advisor.knowledge import Knowledge
from advisor.plan import overrides as own
from advisor.plan.case import Case, takes_too_long
from advisor.plan.export import export_plan
from advisor.plan.settings import Sheet, replayed, stage_sheet
from advisor.plan.warn import warnings_of
from advisor.plan.words import alternatives, assumptions, summary
from advisor.recommend import Advice, Option, advise, candidates_of
from advisor.recommend.amount import stage_time
from advisor.recommend.chains import REINFORCEMENT
from advisor.recommend.fit import Fit, StageFit
from advisor.recommend.gates import program_of
from advisor.recommend.situation import datasets_of, rule
from advisor.types import (
    ExportPlan,
    MemoryEstimate,
    ModelSpec,
    Plan,
    PlanModel,
    Scenario,
    Stage,
    StageEstimate,
    TimeEstimate,
    Verdict,
)
from advisor.units import format_bytes

__all__ = ["make_plan"]
MIXING = frozenset({"mixing_cap", "mixing_temperature"})
"""Settings of several datasets in one training."""


def make_plan(scenario: Scenario, knowledge: Knowledge) -> Plan:
    """Turn a scenario into the advice: what to train, how, at which cost, with which risks.

    Raises:
        UsageError: an override names an unknown setting or has a value of the wrong kind.
    """
    advice = advise(scenario, knowledge)
    option = advice.chosen if advice.decision.instead is None else None
    spec = option.proposal.spec if option else _spec_without_training(advice)
    stages, strange, over = _stages(advice, option, knowledge)
    stages, apart = _one_each(stages, advice, option)
    export = _export(advice, option, spec, knowledge)
    case = Case(
        advice=advice, option=option, spec=spec, stages=stages, export=export, strange_overrides=strange,
        over_memory=over,
    )  # fmt: skip
    verdict, situation = _verdict(case, knowledge), advice.situation
    return Plan(
        verdict=verdict, method=_method(advice, option), task_kind=situation.task_kind, stages=stages,
        model=_plan_model(spec), parallel=option.fit.layout.parallel if option and option.fit else "none",
        processes=option.fit.layout.gpus if option and option.fit else 1,
        export=case.export, warnings=warnings_of(case, knowledge), alternatives=alternatives(case, knowledge),
        candidates=candidates_of(advice, knowledge), summary=summary(case, verdict, knowledge),
        assumptions=assumptions(case, knowledge), hardware=scenario.hardware,
        datasets=situation.train + situation.earlier, goal=scenario.goal, start=scenario.start, apart=apart,
    )  # fmt: skip


def _method(advice: Advice, option: Option | None) -> str:
    return option.proposal.tuner if option else advice.decision.instead or "none"


def _spec_without_training(advice: Advice) -> ModelSpec | None:
    """The model to use where nothing is trained: the one asked for, else the one that would be chosen."""
    if advice.situation.spec is not None and advice.model_refused is None:
        return advice.situation.spec
    return advice.chosen.proposal.spec if advice.chosen else advice.situation.spec


def _plan_model(spec: ModelSpec | None) -> PlanModel | None:
    if spec is None:
        return None
    return PlanModel(
        id=spec.id, parameters=spec.parameters, licence=spec.licence, revision=spec.revision, path=spec.path,
        architecture=spec.architecture, model_type=spec.model_type, instruct=spec.instruct,
        has_chat_template=spec.has_chat_template, gated=spec.gated,
    )  # fmt: skip


def _export(
    advice: Advice, option: Option | None, spec: ModelSpec | None, knowledge: Knowledge
) -> ExportPlan | None:
    if advice.situation.goal.out_of_scope and option is None:
        return None
    if spec is None or (option is None and advice.decision.instead not in ("none", None)):
        return None
    return export_plan(spec, option.proposal.facts if option else None, advice.situation, knowledge)


# --- stages --------------------------------------------------------------------------------------


def _stages(
    advice: Advice, option: Option | None, knowledge: Knowledge
) -> tuple[tuple[Stage, ...], tuple[str, ...], str]:
    """(stages, overrides outside the sourced range, why the overrides do not fit)."""
    if option is None or option.fit is None:
        return (), (), ""
    changes = advice.situation.scenario.overrides
    made = {s.objective: stage_sheet(s, option, advice, option.fit, knowledge) for s in option.fit.stages}
    sheets = {name: sheet for name, (sheet, _) in made.items()}
    asked, refused = advice.situation.goal.requested_objective, advice.decision.refused_request
    not_taken = f"{asked} was not taken: {refused}." if asked and refused else ""
    own.check_names(changes, sheets, option.proposal, knowledge, not_taken=not_taken)
    stages, strange, over = [], [], ""
    for fitted in option.fit.stages:
        sheet, time = made[fitted.objective]
        kept = own.keep_shape(sheet, advice.situation.scenario.start)
        strange += own.apply(sheet, fitted.objective, option.proposal, changes, knowledge)
        estimate = fitted.estimate
        if changes or kept:
            fitted, estimate, time = _again(fitted, sheet, {**kept, **changes}, option, advice, knowledge)
            over = over or _too_much(estimate, advice)
        stages.append(_stage(fitted, sheet, estimate, time, option, option.fit, advice, knowledge))
    return tuple(stages), tuple(strange), over


def _one_each(
    stages: tuple[Stage, ...], advice: Advice, option: Option | None
) -> tuple[tuple[Stage, ...], bool]:
    """One stage a dataset where each task or tenant gets an adapter of its own and all data are at hand."""
    situation = advice.situation
    paths = [d.path for d in situation.demos]
    if option is None or len(stages) != 1 or len(paths) < 2 or None in paths or situation.scenario.start:
        return stages, False
    if not situation.separate or situation.earlier or not option.proposal.facts.apart:
        return stages, False
    (stage,) = stages
    settings = {name: value for name, value in stage.settings.items() if name not in MIXING}
    why = {name: reason for name, reason in stage.why.items() if name not in MIXING}
    return tuple(
        msgspec.structs.replace(stage, settings=settings, why=why, datasets=(name,))
        for name in stage.datasets
    ), True


def _again(
    fitted: StageFit, sheet: Sheet, changes: Mapping[str, object], option: Option, advice: Advice,
    knowledge: Knowledge,
) -> tuple[StageFit, MemoryEstimate, TimeEstimate]:  # fmt: skip
    """Estimate memory and time once more with the person's own settings."""
    settings = own.memory_with(fitted.settings, sheet, changes)
    estimate = estimate_memory(option.proposal.spec, settings, knowledge.rules["memory"])
    if not estimate.trainable_parameters:
        raise UsageError(
            f"target={settings.target} names no layer of {option.proposal.spec.id}.",
            "all-linear, attention, q_v, mlp or names of layers: ftadvisor explain target",
        )
    changed = StageFit(
        objective=fitted.objective, settings=settings, estimate=estimate, lengths=fitted.lengths,
        rank=fitted.rank, completion_tokens=fitted.completion_tokens, shortened=fitted.shortened,
        least_batch=fitted.least_batch,
    )  # fmt: skip
    numbers = {k: v for k, v in sheet.settings.items() if isinstance(v, int | float)}
    time = stage_time(
        changed, option.proposal, advice.situation, knowledge, epochs=float(numbers["epochs"]),
        effective_batch=round(numbers["effective_batch"]), max_steps=round(numbers["max_steps"]),
    )  # fmt: skip
    return changed, estimate, time


def _too_much(estimate: MemoryEstimate, advice: Advice) -> str:
    high, free = estimate.peak_bytes.high, advice.situation.machine.free_bytes
    if high <= free:
        return ""
    return f"with your settings it needs up to {format_bytes(high)}, and {format_bytes(free)} are free"


def _stage(
    fitted: StageFit, sheet: Sheet, estimate: MemoryEstimate, time: TimeEstimate, option: Option, fit: Fit,
    advice: Advice, knowledge: Knowledge,
) -> Stage:  # fmt: skip
    keep = sheet.settings["keep_checkpoints"]
    disk = estimate_disk(
        option.proposal.spec, fitted.settings, tuner=fitted.settings.tuner,
        keep_checkpoints=keep if isinstance(keep, int) else 2, quants=(), bits_per_weight={},
    )  # fmt: skip
    parts: dict[str, int] = {}
    for part in estimate.parts:
        parts[part.name] = parts.get(part.name, 0) + part.bytes
    names = [d.name for d in datasets_of(fitted.objective, advice.situation)]
    if "replay_fraction" in sheet.settings:
        names += [d.name for d in replayed(fitted.objective, advice.situation)]
    return Stage(
        objective=fitted.objective, program=program_of(fitted.objective, option.proposal.facts, knowledge),
        settings=sheet.settings, why=sheet.why, datasets=tuple(names),
        estimate=StageEstimate(
            peak_bytes=estimate.peak_bytes, parts=parts, seconds=time.seconds,
            seconds_source=time.source, disk_bytes=disk["total"], phase=estimate.phase,
            trainable_parameters=estimate.trainable_parameters,
            notes=estimate.notes, tokens_per_second=time.tokens_per_second,
        ),
    )  # fmt: skip


# --- verdict -------------------------------------------------------------------------------------


def _verdict(case: Case, knowledge: Knowledge) -> Verdict:
    """What the person should do first; a change of model is told before flaws of the data."""
    decision, situation = case.advice.decision, case.situation
    if decision.instead is not None:
        return decision.verdict
    if case.option is None:
        return "change_plan"
    if case.advice.model_refused is not None or situation.named.how in ("closed", "quantised"):
        return "change_model"
    if situation.goal.wants_gguf and case.spec is not None and case.spec.gguf_obstacle:
        return "change_model"
    if _data_is_broken(case, knowledge):
        return "fix_data_first"
    if case.advice.method_refused is not None or decision.verdict == "change_plan":
        return "change_plan"
    if case.option.fit and any(stage.cut for stage in case.option.fit.stages):
        return "change_plan"
    return "change_plan" if case.over_memory or takes_too_long(case, knowledge) else "train"


def _data_is_broken(case: Case, knowledge: Knowledge) -> bool:
    limits, rates = rule(knowledge, "data", "defects"), rule(knowledge, "data", "reinforcement")
    for dataset in case.situation.train:
        if dataset.kind == "unpaired_preference" and dataset.positive_fraction in (0.0, 1.0):
            return True
        solved = dataset.baseline_pass_rate if set(case.objectives) & REINFORCEMENT else None
        if solved is not None and solved >= rates["pass_rate_high"]:
            return True
        if (dataset.duplicate_fraction or 0) >= limits["duplicates_fix"] or dataset.mixed_templates:
            return True
        if (dataset.pair_similarity or 0) >= limits["similarity_fix"] or dataset.has_tools_column is False:
            return True
        if any(finding.severity == "error" for finding in dataset.findings):
            return True
    return False
