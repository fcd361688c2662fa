"""Which learning rate does a stage get, and why?

Goes in: objective, model size, tuner and wishes. Comes out: the rate, the reason in words, the source.
Never does: leave the range of the sources by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.knowledge import Knowledge
from advisor.recommend.chains import REINFORCEMENT
from advisor.recommend.gates import Proposal
from advisor.recommend.situation import Situation, rule
from advisor.types import LearningRate, Objective
from advisor.units import format_count


def learning_rate(
    objective: Objective, proposal: Proposal, situation: Situation, knowledge: Knowledge
) -> tuple[float, str, str]:
    """Return (rate, why, source) for one stage."""
    if objective == "sft":
        return _sft(proposal, situation, knowledge)
    facts = rate_facts(objective, proposal.facts.group, knowledge)
    rate, reasons = facts.value, [f"usual for {objective} with {proposal.facts.title}"]
    change = rule(knowledge, "settings", "learning_rate_change")
    large = rule(knowledge, "settings", "learning_rate_preference_large")
    full = proposal.facts.group == "full"
    if full and proposal.spec.parameters >= large["from_parameters"] and objective != "cpt":
        rate *= large["factor"]
        reasons.append("less for a model this large")
    small = rule(knowledge, "settings", "learning_rate_reinforcement_small")
    online = objective in REINFORCEMENT and proposal.spec.parameters < small["below"]
    if online or proposal.spec.parameters < change["small_model_below"]:
        rate *= small["factor"] if online else change["small_model_preference_factor"]
        reasons.append("more for a model this small")
    if objective != "cpt":
        ceiling, _, _ = _sft(proposal, situation, knowledge)
        below = small["below_sft"] if online else change["preference_below_sft"]
        share = 0.5 if objective == "reward" else below
        if rate > ceiling * share:
            rate = ceiling * share
            reasons.append("kept below the rate of the SFT stage")
        if objective != "reward":
            reasons.append(f"far below the {ceiling:.2g} of an SFT stage, or answers fall apart")
    return float(f"{rate:.3g}"), "; ".join(reasons), facts.source


def rate_facts(objective: Objective, group: str, knowledge: Knowledge) -> LearningRate:
    """The sourced rate of an objective for a tuner group; LoRA's where the group has none of its own."""
    rates = knowledge.objectives[objective].learning_rate
    return rates.get(group) or rates.get("lora") or next(iter(rates.values()))


def _sft(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> tuple[float, str, str]:
    group, size = proposal.facts.group, proposal.spec.parameters
    facts = rate_facts("sft", group, knowledge)
    rate, source = facts.value, facts.source
    reasons = [facts.note or f"usual for {proposal.facts.title}"]
    if rules := knowledge.rules["settings"].get(f"learning_rate_{group}"):
        rate, source = _by_size(size, rules), rules["source"]
        reasons = [f"usual for {proposal.facts.title} on {format_count(size)} parameters"]
    change = rule(knowledge, "settings", "learning_rate_change")
    if situation.wish("must_not_forget") or situation.earlier:
        rate *= change["must_not_forget"]
        reasons.append("halved, because a gentler rate forgets less")
    if situation.machine.precision == "fp16" and group == "lora":
        rate *= change["fp16"]
        reasons.append("halved, because fp16 is unstable")
    return float(f"{rate:.3g}"), "; ".join(reasons), source


def _by_size(parameters: int, rules: Mapping[str, Any]) -> float:
    for least, rate in zip(rules["from_parameters"], rules["rates"], strict=True):
        if parameters >= least:
            return float(rate)
    return float(rules["rates"][-1])
