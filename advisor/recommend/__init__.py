"""What should be trained, on which model and how, and what was turned down for which reason?

Goes in: a Scenario and the knowledge base. Comes out: `Advice` for the planner, or its candidates, the chosen
first.
Never does: settings (advisor.plan), I/O, chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from advisor.errors import UnknownNameError
from advisor.knowledge import Knowledge, spec_of
from advisor.recommend.amount import hours_of
from advisor.recommend.chains import Decision, decide
from advisor.recommend.fit import Fit, NoFit, fit, too_large
from advisor.recommend.gates import (
    MAIN_TUNERS,
    Objection,
    Proposal,
    object_to,
    objection_to_model,
    objection_to_tuner,
)
from advisor.recommend.reasons import because
from advisor.recommend.situation import Situation, read_situation, rule
from advisor.recommend.weigh import prefers_base, weigh_model, weigh_substitute, weigh_tuner
from advisor.types import Candidate, ModelSpec, Record, Scenario
from advisor.units import format_bytes, format_seconds

MODEL_CODES = frozenset({"licence", "fp16_overflow_model", "context", "instruct_base_choice"})
"""Objections to a model, whatever the tuner."""
MORE_ESTIMATES = 3
"""Candidates that are estimated beyond the chosen one, where the model is free."""

__all__ = ["Advice", "Option", "advise", "recommend"]


class Option(Record, frozen=True, kw_only=True):
    """One combination with its judgement."""

    proposal: Proposal
    score: float
    reasons: tuple[str, ...]
    objection: Objection | None = None
    fit: Fit | None = None
    no_fit: NoFit | None = None
    hours: float = 0.0
    """Expected training time, where it fits."""
    in_time: bool = True
    """False when it takes longer than the person allows, or than anyone would wait."""

    @property
    def possible(self) -> bool:
        """True when nothing speaks against it."""
        return self.objection is None and self.no_fit is None


class Advice(Record, frozen=True, kw_only=True):
    """Everything that the planner needs to know about the choice."""

    situation: Situation
    decision: Decision
    chosen: Option | None
    options: tuple[Option, ...]
    model_refused: Objection | None = None
    """Why the model asked for is not the one chosen."""
    method_refused: Objection | None = None
    """Why the tuner asked for is not the one chosen."""


def recommend(scenario: Scenario, knowledge: Knowledge) -> tuple[Candidate, ...]:
    """Return every candidate that was considered: the chosen first, then possible, then rejected ones."""
    return candidates_of(advise(scenario, knowledge), knowledge)


def advise(scenario: Scenario, knowledge: Knowledge) -> Advice:
    """Choose chain, model and tuner for a scenario.

    Raises:
        UnknownNameError: the model is not known, and its name does not even tell its size.
    """
    situation = read_situation(scenario, knowledge)
    if situation.named.how == "unknown":
        see = "Give its folder, or a hub id that can be reached: --model FOLDER"
        raise UnknownNameError("model", situation.named.asked, knowledge.models, see)
    decision = decide(situation, knowledge)
    if not decision.chain:
        return Advice(situation=situation, decision=decision, chosen=None, options=())
    if situation.spec is None:
        options = _judge(_free_models(situation, decision, knowledge), situation, decision, knowledge)
        return _advice(situation, decision, options, None, knowledge)
    asked = situation.spec
    named = _judge([(asked, 0.0, [])], situation, decision, knowledge)
    if any(option.fit for option in named):
        return _advice(situation, decision, named, None, knowledge)
    refused = _why_not_this_model(named, knowledge)
    others = _judge(_substitutes(asked, situation, decision, knowledge), situation, decision, knowledge)
    return _advice(situation, decision, (*others, *named), refused, knowledge)


def _advice(
    situation: Situation, decision: Decision, options: tuple[Option, ...], refused: Objection | None,
    knowledge: Knowledge,
) -> Advice:  # fmt: skip
    fitting = [option for option in options if option.fit]
    asked = situation.goal.requested_method
    wished = [o for o in fitting if o.proposal.tuner == asked]
    plain = [o for o in fitting if o.fit and not o.fit.layout.offload]
    plain = [o for o in plain if o.in_time] or _quickest(plain, situation)
    chosen = next(iter(wished or plain or fitting), None)
    if chosen and not wished:
        chosen = _roomier(chosen, plain, named=situation.spec is not None and refused is None)
    method_refused = None
    if asked and not asked.startswith("none") and (chosen is None or chosen.proposal.tuner != asked):
        method_refused = _why_not_this_tuner(asked, options, knowledge)
    return Advice(
        situation=situation, decision=decision, chosen=chosen, options=options,
        model_refused=refused, method_refused=method_refused,
    )  # fmt: skip


def _quickest(options: list[Option], situation: Situation) -> list[Option]:
    """Where all take too long and the model is free, the quickest of the main tuners comes first."""
    main = [o for o in options if o.proposal.tuner in MAIN_TUNERS] if situation.spec is None else []
    return sorted(main, key=lambda o: o.hours) or options


def _roomier(chosen: Option, options: list[Option], *, named: bool) -> Option:
    """Rather a combination that needs no shorter rows or smaller rank; of the model that was named."""
    other = [o for o in options if o.proposal.tuner in MAIN_TUNERS]
    if named:
        other = [o for o in other if o.proposal.spec.id == chosen.proposal.spec.id]
    whole = [o for o in other if o.fit and o.fit.whole]
    return whole[0] if whole and chosen.fit and not chosen.fit.whole else chosen


# --- which models --------------------------------------------------------------------------------

Weighted = tuple[ModelSpec, float, list[str]]


def _free_models(situation: Situation, decision: Decision, knowledge: Knowledge) -> list[Weighted]:
    return _weigh_all(situation, decision, knowledge, lambda spec: weigh_model(spec, situation, knowledge))


def _substitutes(
    asked: ModelSpec, situation: Situation, decision: Decision, knowledge: Knowledge
) -> list[Weighted]:
    found = _weigh_all(
        situation, decision, knowledge, lambda spec: weigh_substitute(spec, asked, situation, knowledge)
    )
    return [weighted for weighted in found if weighted[0].id != asked.id]


def _weigh_all(
    situation: Situation, decision: Decision, knowledge: Knowledge,
    weigh: Callable[[ModelSpec], tuple[float, list[str]]],
) -> list[Weighted]:  # fmt: skip
    base = prefers_base(situation, knowledge)
    found: list[Weighted] = []
    for key, facts in knowledge.models.items():
        if facts.recommend and (facts.instruct or base):
            if situation.goal.wants_gguf and facts.gguf_architecture is None:
                continue
            spec = spec_of(key, facts)
            found.append((spec, *weigh(spec)))
    return found


# --- judging -------------------------------------------------------------------------------------


def _judge(
    models: Iterable[Weighted], situation: Situation, decision: Decision, knowledge: Knowledge
) -> tuple[Option, ...]:
    """Gate and weigh all combinations, then estimate from the best down until enough is known."""
    options = [
        option
        for spec, points, reasons in models
        for option in _options(spec, points, reasons, situation, decision, knowledge)
    ]
    asked = situation.goal.requested_method
    options.sort(
        key=lambda o: (o.proposal.tuner != asked, -round(o.score, 9), o.proposal.spec.id, o.proposal.tuner)
    )
    many = situation.spec is None or len({o.proposal.spec.id for o in options}) > 1
    judged = _estimate_in_order(options, situation, knowledge, many=many, offload=False)
    if any(option.fit for option in judged) and not (asked == "full" and situation.machine.gpus > 1):
        return tuple(judged)
    if any(o.fit and o.proposal.tuner == asked for o in judged):
        return tuple(judged)
    return tuple(_estimate_in_order(judged, situation, knowledge, many=many, offload=True))


def _options(
    spec: ModelSpec, points: float, reasons: list[str], situation: Situation, decision: Decision,
    knowledge: Knowledge,
) -> list[Option]:  # fmt: skip
    blocked = objection_to_model(spec, situation, knowledge)
    if blocked and not blocked.hard and situation.force:
        blocked = None
    found = []
    for tuner, facts in knowledge.tuners.items():
        proposal = Proposal(spec=spec, tuner=tuner, facts=facts, chain=decision.chain)
        objection = blocked or objection_to_tuner(proposal, situation, knowledge)
        insisted = situation.force and situation.goal.requested_method == tuner
        if objection and objection is not blocked and not objection.hard and insisted:
            objection = None
        score, why = weigh_tuner(proposal, situation, knowledge)
        found.append(
            Option(proposal=proposal, score=score + points, reasons=(*reasons, *why), objection=objection)
        )
    return found


def _estimate_in_order(
    options: list[Option], situation: Situation, knowledge: Knowledge, *, many: bool, offload: bool
) -> list[Option]:
    judged: list[Option] = []
    more: int | None = None
    for option in options:
        if option.objection or option.fit:
            judged.append(option)
            continue
        if more is not None and more <= 0:
            alone = None if option.no_fit or offload else too_large(option.proposal, situation)
            judged.append(msgspec.structs.replace(option, no_fit=alone) if alone else option)
            continue
        found = fit(option.proposal, situation, knowledge, offload=offload)
        if isinstance(found, NoFit):
            no_fit = option.no_fit if offload and option.no_fit else found
            judged.append(msgspec.structs.replace(option, no_fit=no_fit))
            continue
        hours = hours_of(found, option.proposal, situation, knowledge)
        in_time = hours <= _allowed_hours(situation, knowledge)
        judged.append(msgspec.structs.replace(option, fit=found, no_fit=None, hours=hours, in_time=in_time))
        if many and ((in_time and found.whole) or more is not None):
            more = MORE_ESTIMATES if more is None else more - 1
    return judged


def _allowed_hours(situation: Situation, knowledge: Knowledge) -> float:
    if situation.scenario.goal.max_hours is not None:
        return situation.scenario.goal.max_hours
    if situation.machine.device == "cuda" and situation.machine.facts is None:
        return math.inf  # how fast the card is, is not known
    key = "patience_hours" if situation.machine.device == "cuda" else "patience_hours_host"
    return float(rule(knowledge, "choice", "fit")[key])


def _does_not_fit(no_fit: NoFit) -> Objection:
    return Objection(
        code="does_not_fit", reason=no_fit.reason, source="memory-lab", needed_bytes=no_fit.needed_bytes
    )


def _why_not_this_model(options: tuple[Option, ...], knowledge: Knowledge) -> Objection:
    main = [o for o in options if o.proposal.tuner in MAIN_TUNERS]
    for option in main:
        if option.objection and option.objection.code in MODEL_CODES:
            return option.objection
    tried = [o.no_fit for o in main if o.no_fit]
    if tried:
        return _does_not_fit(min(tried, key=lambda n: n.needed_bytes))
    blocked = [o.objection for o in main if o.objection]
    return blocked[0] if blocked else object_to(knowledge, "nothing_fits", code="does_not_fit")


def _why_not_this_tuner(tuner: str, options: tuple[Option, ...], knowledge: Knowledge) -> Objection:
    for option in options:
        if option.proposal.tuner == tuner and option.objection:
            return option.objection
        if option.proposal.tuner == tuner and option.no_fit:
            return _does_not_fit(option.no_fit)
    return object_to(knowledge, "no_reason")


# --- candidates ----------------------------------------------------------------------------------


def candidates_of(advice: Advice, knowledge: Knowledge) -> tuple[Candidate, ...]:
    """Every option as the contract shows it, then the objectives that were turned down."""
    rows = [_candidate(option, advice, knowledge) for option in advice.options]
    order = {"chosen": 0, "possible": 1, "rejected": 2}
    rows.sort(key=lambda c: (order[c.verdict], -c.score, c.model, c.method))
    decision = advice.decision
    if decision.instead:
        first = Candidate(method=decision.instead, verdict="chosen", score=1.0, reasons=(decision.why,))
        rows.insert(0, first)
    turned_down = tuple(
        Candidate(method=objective, verdict="rejected", score=0.0, reasons=(reason,), objectives=(objective,))
        for objective, reason in decision.rejected.items()
    )
    return (*rows, *turned_down)


def _candidate(option: Option, advice: Advice, knowledge: Knowledge) -> Candidate:
    proposal, fitted, instead = option.proposal, option.fit, advice.decision.instead
    verdict: Literal["chosen", "possible", "rejected"] = "possible"
    if instead or not option.possible:
        verdict = "rejected"
    elif option is advice.chosen:
        verdict = "chosen"
    first = fitted.stages[0].settings if fitted else None
    peaks = [stage.estimate.peak_bytes for stage in fitted.stages] if fitted else []
    return Candidate(
        method=proposal.tuner, verdict=verdict, score=round(option.score, 4),
        reasons=_reasons(option, advice, knowledge), model=proposal.spec.id, objectives=proposal.chain,
        precision=first.precision if first else advice.situation.machine.precision,
        weight_bits=first.weight_bits if first else 4 if proposal.facts.quantised_base else 16,
        parallel=fitted.layout.parallel if fitted else "none",
        peak_bytes=max(peaks, key=lambda band: band.high) if peaks else None,
    )  # fmt: skip


def _reasons(option: Option, advice: Advice, knowledge: Knowledge) -> tuple[str, ...]:
    if option.objection:
        return (option.objection.reason,)
    if option.no_fit:
        return (option.no_fit.reason,)
    reasons = [advice.decision.why] if advice.decision.instead else []
    reasons += option.reasons
    if option.fit is None:
        return (*reasons, because(knowledge, "score", "not_estimated").reason)
    high, free = format_bytes(option.fit.peak_high), format_bytes(advice.situation.machine.free_bytes)
    reasons.append(because(knowledge, "score", "memory", peak=high, free=free).reason)
    time = format_seconds(option.hours * 3600)
    reasons.append(because(knowledge, "score", "time", time=time).reason)
    if not option.in_time:
        told = advice.situation.scenario.goal.max_hours is not None
        hours = f"{_allowed_hours(advice.situation, knowledge):g}"
        key = "longer_than_allowed" if told else "too_slow"
        reasons.append(because(knowledge, "score", key, hours=hours).reason)
    return tuple(reasons)
