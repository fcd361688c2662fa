"""How good is a combination of model and tuner for this case, and why?

Goes in: a Proposal that no rule forbids. Comes out: a score (1 is the best tuner on an ordinary model)
and its reasons in words. Memory does not enter: more of it can only open better candidates, never turn
the order round. Never does: rule anything out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from advisor.knowledge import Knowledge
from advisor.recommend.gates import Proposal
from advisor.recommend.reasons import because
from advisor.recommend.situation import Situation, counted_rows, megabytes_of, rows_of, rule
from advisor.scenario import base_twin
from advisor.types import ModelFacts, ModelSpec
from advisor.units import format_count

EPOCH_YEAR = 2024


class Scale:
    """Adds up a score and keeps the reason of each step."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.knowledge = knowledge
        self.score = 0.0
        self.reasons: list[str] = []

    def add(self, points: float, key: str = "", **figures: object) -> None:
        """Add points, and the sentence of that key where it is worth telling."""
        self.score += points
        if key:
            self.reasons.append(because(self.knowledge, "score", key, **figures).reason)


def weigh_tuner(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> tuple[float, list[str]]:
    """Score a tuner for the data and wishes of this case."""
    rules, scale, facts = rule(knowledge, "choice", "tuner"), Scale(knowledge), proposal.facts
    scale.add(facts.quality, "quality", share=f"{facts.quality:.0%}")
    if proposal.tuner == "full":
        _weigh_full(scale, rules, proposal.spec, situation, knowledge)
    scale.add(-rules["forgetting_weight"] * facts.forgetting)
    if situation.wish("must_not_forget") or situation.earlier:
        scale.add(-(rules["must_not_forget_weight"] - rules["forgetting_weight"]) * facts.forgetting)
        forgets = proposal.tuner == "full"
        key = "forgets" if forgets else "keeps_subspace" if proposal.tuner == "osf" else "keeps"
        scale.add(-rules["must_not_forget_full"] if forgets else 0.0, key)
    if situation.wish("adapter") and facts.group == "lora":
        scale.add(rules["adapter_wish"], "adapter")
    if proposal.tuner == "classifier_head":
        classes = max([d.classes or 0 for d in situation.demos], default=0)
        if classes >= rules["class_head_from"] or situation.wish("low_latency") or situation.wish("small"):
            scale.add(rules["class_head"], "classes", classes=classes)
    return scale.score, scale.reasons


def _weigh_full(
    scale: Scale, rules: Mapping[str, Any], spec: ModelSpec, situation: Situation, knowledge: Knowledge
) -> None:
    rows = rows_of(situation.train)
    scale.add(-rules["full_cost"], "full_cost")
    if spec.parameters < rules["small_model_below"]:
        scale.add(rules["small_model_full"], "small_model")
    elif 0 < rows < rule(knowledge, "data", "rows")["modest_below"]:
        scale.add(-rules["full_small_data"], "few_rows", rows=rows)
    excess = data_excess(situation, knowledge)
    if excess > -1:
        scale.add(rules["capacity"] * (1 + excess), "capacity" if excess >= 0 else "")
    if situation.wish("best") and excess > -1:
        scale.add(rules["best_full"], "best")


def data_excess(situation: Situation, knowledge: Knowledge) -> float:
    """Decimal logarithm of the data over what LoRA is known to hold; 0 is the edge, -9 without data."""
    capacity, volume = rule(knowledge, "data", "capacity"), rule(knowledge, "data", "text_volume")
    rows = counted_rows("sft", situation, knowledge) if situation.demos else 0
    tokens = megabytes_of(situation.texts, knowledge) * 1e6 / volume["bytes_per_token"]
    share = max(rows / capacity["lora_rows"], tokens / capacity["lora_tokens"])
    return math.log10(share) if share > 0 else -9.0


def weigh_model(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> tuple[float, list[str]]:
    """Score a model where it may be chosen freely."""
    scale = Scale(knowledge)
    size, model = rule(knowledge, "choice", "size"), rule(knowledge, "choice", "model")
    ceiling = _ceiling(situation, size)
    billions = max(spec.parameters, 1) / 1e9
    points = size["per_doubling"] * math.log2(min(billions, ceiling / 1e9))
    if spec.parameters > ceiling:
        points += size["beyond_per_doubling"] * math.log2(spec.parameters / ceiling)
    scale.add(points, "size", size=format_count(spec.parameters))
    if prefers_base(situation, knowledge) and not spec.instruct:
        scale.add(model["base_for_text"], "base_for_text")
    _weigh_facts(scale, spec, situation, knowledge.models.get(spec.id), model)
    return scale.score, scale.reasons


def _ceiling(situation: Situation, size: Mapping[str, Any]) -> float:
    if situation.machine.device == "cpu":
        return float(size["ceiling_cpu"])
    if situation.wish("small") or situation.wish("cheap"):
        return float(size["ceiling_small"])
    if situation.wish("low_latency"):
        return float(size["ceiling_latency"])
    if situation.wish("best"):
        return float(size["ceiling_best"])
    return float(size["ceiling_quality"] if situation.wish("quality") else size["ceiling"])


def _weigh_facts(
    scale: Scale, spec: ModelSpec, situation: Situation, facts: ModelFacts | None, rules: Mapping[str, Any]
) -> None:
    if facts is None:
        return
    if facts.released:
        year, _, month = facts.released.partition("-")
        age = int(year) + (int(month or 1) - 1) / 12 - EPOCH_YEAR
        scale.add(rules["newer_per_year"] * age, "released", date=facts.released)
    wanted = {*situation.goal.tasks, situation.task_kind}
    if len(situation.languages) > 1:
        wanted.add("multilingual")
    strong = [word for word in facts.strengths if word in wanted]
    if strong:
        scale.add(rules["strength"], "good_at", strengths=", ".join(sorted(strong)))
    known = {code.lower() for code in spec.languages}
    missing = [code for code in situation.languages if code not in known]
    if missing and situation.languages:
        weight = 0.5 if "multilingual" in facts.strengths else 1.0
        share = len(missing) / len(situation.languages)
        scale.add(-rules["language_missing"] * weight * share, "not_known_for", languages=", ".join(missing))
    elif len(situation.languages) > 1:
        scale.add(0.0, "knows", languages=", ".join(situation.languages))
    scale.add(rules["gated"] if facts.gated else 0.0)
    scale.add(0.0 if facts.verified else rules["unverified"])
    if facts.licence_note and facts.commercial:
        scale.add(rules["conditional_licence"])


def weigh_substitute(
    spec: ModelSpec, asked: ModelSpec, situation: Situation, knowledge: Knowledge
) -> tuple[float, list[str]]:
    """Score a model that stands in for the one asked for: near in size, of the same maker if possible."""
    rules, scale = rule(knowledge, "choice", "model"), Scale(knowledge)
    distance = abs(math.log2(max(spec.parameters, 1) / max(asked.parameters, 1)))
    size, other = format_count(spec.parameters), format_count(asked.parameters)
    scale.add(-rules["nearness_per_doubling"] * distance, "size_beside", size=size, asked=other)
    if base_twin(spec.id, asked.id):
        scale.add(rules["twin"], "twin")
    if maker(spec.id) == maker(asked.id):
        scale.add(rules["same_maker"], "same_maker")
    _weigh_facts(scale, spec, situation, knowledge.models.get(spec.id), rules)
    return scale.score, scale.reasons


def maker(model_id: str) -> str:
    """The organisation of a hub id."""
    return model_id.split("/", 1)[0].lower() if "/" in model_id else ""


def prefers_base(situation: Situation, knowledge: Knowledge) -> bool:
    """True when there is so much text to read on that a base model is the better start."""
    if not situation.texts:
        return False
    return megabytes_of(situation.texts, knowledge) >= float(
        rule(knowledge, "data", "text_volume")["mixed_below_mb"]
    )
