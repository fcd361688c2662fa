"""Warnings about method and model: what was asked for against what is advised, licence, export.

Goes in: a Case. Comes out: for each code the figures of its text, or None when it does not apply.
Never does: hold the texts (kb/warnings.toml).
"""

from __future__ import annotations

from typing import Any

from advisor.knowledge import Knowledge
from advisor.plan.case import Case, limit
from advisor.recommend.chains import PREFERENCE
from advisor.recommend.situation import rule

Values = dict[str, Any] | None
LATER = PREFERENCE | {"rloo", "grpo"}


def out_of_scope(case: Case, knowledge: Knowledge) -> Values:
    """The wish is none for a model that reads and writes text."""
    key = case.situation.goal.out_of_scope
    if key is None:
        return None
    scope = rule(knowledge, "goals", "scope")[key]
    return {"detail": f"{scope['title']}: {scope['remedy']}"}


def closed_weights(case: Case, knowledge: Knowledge) -> Values:
    """A hosted model was named."""
    return {} if case.situation.named.how == "closed" else None


def use_unquantized_base(case: Case, knowledge: Knowledge) -> Values:
    """Quantised weights were named."""
    return {} if case.situation.named.how == "quantised" else None


def licence(case: Case, knowledge: Knowledge) -> Values:
    """The licence of the model asked for or chosen limits the use."""
    situation = case.situation
    refused = case.advice.model_refused
    if refused is not None and refused.code == "licence":
        return {"severity": "must", "model": situation.named.asked, "detail": refused.reason}
    spec = case.spec
    if spec is None:
        return None
    if spec.commercial is False:
        wanted = situation.wish("commercial")
        return {
            "severity": "must" if wanted else "should",
            "detail": spec.licence_note or f"licence {spec.licence}",
        }
    if spec.commercial is None:
        return {"severity": "should", "detail": "its licence is not known"}
    if spec.licence_note and situation.wish("commercial"):
        return {"severity": "should", "detail": spec.licence_note}
    return None


def model_partly_unknown(case: Case, knowledge: Knowledge) -> Values:
    """The files of the model say what is not known here, or leave something open."""
    return {"detail": "; ".join(case.spec.unknown)} if case.spec is not None and case.spec.unknown else None


def gated(case: Case, knowledge: Knowledge) -> Values:
    """The weights need accepted terms."""
    return {} if case.spec is not None and case.spec.gated else None


def does_not_fit(case: Case, knowledge: Knowledge) -> Values:
    """What was asked for does not fit, or nothing does."""
    for refused in (case.advice.model_refused, case.advice.method_refused):
        if refused is not None and refused.code == "does_not_fit":
            return {"severity": "must", "detail": refused.reason}
    if case.over_memory:
        return {"severity": "must", "detail": case.over_memory}
    failed = [o.no_fit for o in case.advice.options if o.no_fit]
    if case.option is None and failed and case.advice.decision.instead is None:
        least = min(failed, key=lambda n: n.needed_bytes)
        return {"severity": "must", "detail": least.reason}
    return None


def no_bias_terms(case: Case, knowledge: Knowledge) -> Values:
    """BitFit was asked for on a model with next to no biases."""
    return {} if case.situation.goal.requested_method == "bitfit" else None


def scale_effect(case: Case, knowledge: Knowledge) -> Values:
    """Virtual tokens were asked for or chosen on a small model."""
    virtual = ("virtual_tokens", "sequence_state")
    soft = {name for name, facts in knowledge.tuners.items() if facts.gguf in virtual}
    if case.situation.goal.requested_method not in soft and case.tuner not in soft:
        return None
    small = case.spec is None or case.spec.parameters < limit(
        knowledge, "choice", "prompt_tuning", "competitive_from"
    )
    return {"severity": "must" if small else "should"}


def lower_lr_than_sft(case: Case, knowledge: Knowledge) -> Values:
    """Any preference or reinforcement stage."""
    stage = next((s for s in case.stages if s.objective in LATER), None)
    return None if stage is None else {"rate": stage.settings["learning_rate"], "objective": stage.objective}


def reward_hacking(case: Case, knowledge: Knowledge) -> Values:
    """Reinforcement, or a reward model."""
    return {} if set(case.objectives) & {"rloo", "grpo"} else None


def generation_cost(case: Case, knowledge: Knowledge) -> Values:
    """Online reinforcement generates its own data."""
    return {} if set(case.objectives) & {"rloo", "grpo"} else None


def prompt_baseline_first(case: Case, knowledge: Knowledge) -> Values:
    """Prompting comes before training, always worth a try."""
    instead = case.advice.decision.instead
    if instead == "none_prompting":
        return {"severity": "must"}
    return {"severity": "should"} if "sft" in case.objectives or instead == "none_rag" else None


def merge_before_gguf(case: Case, knowledge: Knowledge) -> Values:
    """An adapter becomes part of a GGUF file."""
    state = case.situation.scenario.goal.model_state
    wants = case.situation.goal.wants_gguf
    adapter = case.option is not None and case.option.proposal.facts.group not in ("full", "osf")
    if not (adapter or state in ("has_adapter", "merged")) or (
        case.export is None or not case.export.feasible
    ):
        return None
    if wants or state == "has_adapter":
        return {"severity": "must"}
    return {"severity": "should"} if case.option else None


def quality_loss_low_bit(case: Case, knowledge: Knowledge) -> Values:
    """A quantisation below about four bits, or four bits on a small model."""
    if case.export is None or not case.export.feasible or case.spec is None:
        return None
    rules = rule(knowledge, "deploy", "quantisation")
    facts = knowledge.quantisations.get(case.export.quant)
    bits = facts.bits_per_weight if facts else 16.0
    low = bits < rules["visible_loss_below_bits"]
    small = case.spec.parameters < rules["small_below"] and bits < 5.0
    return {"severity": "must" if low else "should"} if low or small else None


def cannot_export(case: Case, knowledge: Knowledge) -> Values:
    """The result cannot become the file that was asked for."""
    if case.export is None or case.export.feasible or not case.situation.goal.wants_gguf:
        return None
    return None if _obstacle(case) else {"detail": case.export.reason}


def tokenizer_without_gguf(case: Case, knowledge: Knowledge) -> Values:
    """llama.cpp cannot cut text as the model's tokenizer does."""
    obstacle = _obstacle(case)
    return {"detail": obstacle} if case.situation.goal.wants_gguf and obstacle else None


def _obstacle(case: Case) -> str:
    return "" if case.spec is None else case.spec.gguf_obstacle.rstrip(".")


def method_changed(case: Case, knowledge: Knowledge) -> Values:
    """The method asked for is not the one advised, and may be insisted on."""
    refusal = _refusal(case)
    return {"detail": refusal[1]} if refusal and refusal[2] else None


def method_impossible(case: Case, knowledge: Knowledge) -> Values:
    """The method asked for cannot be done, whoever insists."""
    refusal = _refusal(case)
    return {"method_asked": refusal[0], "detail": refusal[1]} if refusal and not refusal[2] else None


def _refusal(case: Case) -> tuple[str, str, bool] | None:
    """(method asked for, why it was refused, whether `--force` would do it)."""
    goal, decision, refused = case.situation.goal, case.advice.decision, case.advice.method_refused
    if refused is not None and goal.requested_method:
        soft = not refused.hard and refused.code != "does_not_fit"
        return goal.requested_method, refused.reason, soft and not case.situation.force
    if decision.refused_request and goal.requested_objective:
        return goal.requested_objective, decision.refused_request, decision.can_insist
    return None


def override_out_of_range(case: Case, knowledge: Knowledge) -> Values:
    """A setting of the person lies outside the range of the sources."""
    return {"detail": "; ".join(case.strange_overrides)} if case.strange_overrides else None


CHECKS = tuple(
    (check.__name__, check)
    for check in (
        out_of_scope, prompt_baseline_first, method_changed, method_impossible,
        closed_weights, use_unquantized_base, licence, gated, model_partly_unknown,
        does_not_fit, no_bias_terms, scale_effect, lower_lr_than_sft, reward_hacking, generation_cost,
        merge_before_gguf, quality_loss_low_bit, cannot_export, tokenizer_without_gguf, override_out_of_range,
    )
)  # fmt: skip
