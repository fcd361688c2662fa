"""Warnings about the data: amount, state, labels, mixture, language.

Goes in: a Case. Comes out: for each code the figures of its text, or None when it does not apply.
Never does: hold the texts (kb/warnings.toml).
"""

from __future__ import annotations

from typing import Any

from advisor.knowledge import Knowledge
from advisor.plan.case import Case, limit
from advisor.plan.settings import new_language, replayed
from advisor.recommend.chains import PREFERENCE
from advisor.recommend.situation import rows_of, rule, unequal_ratio
from advisor.recommend.weigh import data_excess
from advisor.types import ModelSpec, Stage

Values = dict[str, Any] | None


def small_data_overfit(case: Case, knowledge: Knowledge) -> Values:
    """Few demonstrations, few judged answers, or few prompts to try."""
    judged = rows_of((*case.situation.pairs, *case.situation.unpaired))
    few_rows = 0 < case.rows < limit(knowledge, "data", "rows", "modest_below")
    few_pairs = 0 < judged < limit(knowledge, "data", "preference", "modest_below")
    if few_rows or few_pairs:
        rows = case.rows if few_rows else judged
        serious = rows < limit(knowledge, "data", "rows", "small_below")
        return {"rows": f"{rows:,}", "severity": "must" if serious else "should"}
    prompts = rows_of(case.situation.answered)
    few_prompts = 0 < prompts < limit(knowledge, "data", "reinforcement", "prompts_below")
    return {"rows": f"{prompts:,}", "severity": "should"} if few_prompts else None


def no_holdout(case: Case, knowledge: Knowledge) -> Values:
    """Nothing is kept apart to measure with."""
    kept = [stage.settings.get("heldout_fraction") for stage in case.stages]
    set_aside = bool(kept) and all(kept)
    if any(d.holdout_rows == 0 for d in case.situation.train):
        return {"severity": "must", "handled": set_aside}
    unmeasured = case.rows and all(share == 0.0 for share in kept)
    if unmeasured and not any(d.holdout_rows for d in case.situation.train):
        return {}
    few = 0 < case.rows < limit(knowledge, "data", "rows", "small_below")
    apart = any(d.holdout_rows for d in case.situation.train)
    return {"handled": set_aside} if few and not apart else None


def instruct_base_choice(case: Case, knowledge: Knowledge) -> Values:
    """Few rows: start from the instruct model."""
    return {} if 0 < case.rows < limit(knowledge, "data", "rows", "modest_below") else None


def dedupe(case: Case, knowledge: Knowledge) -> Values:
    """Rows that repeat."""
    shares = [d.duplicate_fraction or 0.0 for d in case.situation.train]
    shares += [
        f.count / d.rows
        for d in case.situation.train
        for f in d.findings
        if f.code.startswith("duplicate") and d.rows
    ]
    share = max(shares, default=0.0)
    if share < limit(knowledge, "data", "defects", "duplicates_warn"):
        return None
    serious = share >= limit(knowledge, "data", "defects", "duplicates_fix")
    return {"severity": "must" if serious else "should", "detail": f"{share:.0%} of the rows repeat others"}


def chat_template(case: Case, knowledge: Knowledge) -> Values:
    """Every stage that trains turns."""
    mixed = any(d.mixed_templates for d in case.situation.train)
    if mixed:
        return {
            "severity": "must",
            "detail": "the rows are written in several templates; bring them into one",
            "handled": False,
        }
    return {} if set(case.objectives) - {"cpt"} and case.tuner != "classifier_head" else None


def eos_pad(case: Case, knowledge: Knowledge) -> Values:
    """Every SFT stage."""
    return {} if set(case.objectives) & {"sft", "orpo"} and case.tuner != "classifier_head" else None


def mask_loss(case: Case, knowledge: Knowledge) -> Values:
    """SFT on rows that hold questions and answers."""
    if "sft" not in case.objectives or case.tuner == "classifier_head":
        return None
    on_answers = all(stage.settings.get("loss_on", "assistant") == "assistant" for stage in case.stages)
    return {} if on_answers else {"handled": False}


def tools_column(case: Case, knowledge: Knowledge) -> Values:
    """Tool calling without the tools."""
    return {} if any(d.has_tools_column is False for d in case.situation.demos) else None


def truncation(case: Case, knowledge: Knowledge) -> Values:
    """Rows longer than the training sequence."""
    for stage in case.stages:
        length = stage.settings.get("max_seq_len")
        if stage.objective == "cpt" or not isinstance(length, int):
            continue
        named = [d for d in case.situation.train if d.name in stage.datasets]
        known = [n for d in named if (n := d.max_tokens or d.p95_tokens)]
        if known and max(known) > length:
            return {"tokens": f"{length:,}", "needed": max(known), "severity": "must"}
        means = [d.mean_tokens for d in named if d.mean_tokens and not d.max_tokens]
        likely = max(means, default=0) * limit(knowledge, "data", "lengths", "p95_over_mean")
        if likely > length:
            return {"tokens": f"{length:,}", "needed": int(likely)}
    return None


def unpaired_use_kto(case: Case, knowledge: Knowledge) -> Values:
    """Thumbs without pairs."""
    return {} if case.situation.unpaired else None


def balance_labels(case: Case, knowledge: Knowledge) -> Values:
    """Far more labels of one side."""
    rules = rule(knowledge, "data", "balance")
    for dataset in case.situation.unpaired:
        share = dataset.positive_fraction
        if share is None:
            continue
        if share in (0.0, 1.0):
            continue
        odds = share / max(1 - share, 0.001)
        if not rules["low"] / rules["high"] <= odds <= rules["high"]:
            return {"detail": f"{share:.0%} of the labels are positive"}
    return None


def no_contrast(case: Case, knowledge: Knowledge) -> Values:
    """Labels that are all the same."""
    same = [d.positive_fraction for d in case.situation.unpaired if d.positive_fraction in (0.0, 1.0)]
    return {"detail": f"all of them are {'good' if same[0] else 'bad'}"} if same else None


def likelihood_displacement(case: Case, knowledge: Knowledge) -> Values:
    """Pairs that hardly differ; for every preference stage on pairs it is worth watching."""
    similar = max([d.pair_similarity or 0.0 for d in case.situation.pairs], default=0.0)
    if similar >= limit(knowledge, "data", "defects", "similarity_warn"):
        return {"severity": "must", "detail": f"the two answers of a pair are {similar:.0%} alike"}
    return {"severity": "should"} if set(case.objectives) & {"dpo", "simpo"} else None


def needs_nonzero_success(case: Case, knowledge: Knowledge) -> Values:
    """Reinforcement needs tasks that are solved sometimes."""
    if not case.situation.answered and not set(case.objectives) & {"grpo", "rloo"}:
        return None
    rates = [d.baseline_pass_rate for d in case.situation.answered if d.baseline_pass_rate is not None]
    if not rates:
        return {"severity": "should"}
    rules = rule(knowledge, "data", "reinforcement")
    if max(rates) <= rules["pass_rate_low"]:
        return {"severity": "must", "detail": f"it solves {max(rates):.0%} of them now"}
    if min(rates) >= rules["pass_rate_high"]:
        return {
            "severity": "should",
            "detail": f"it solves {min(rates):.0%} already, so little is left to learn from",
        }
    return {"severity": "should"} if max(rates) < 0.2 else None


def mixing_cap(case: Case, knowledge: Knowledge) -> Values:
    """Tasks of different size in one training."""
    situation = case.situation
    if situation.tasks < 2 or situation.separate:
        return None
    rules, ratio = rule(knowledge, "data", "mixture"), unequal_ratio(situation)
    unequal = ratio >= rules["unequal_ratio"]
    detail = f"the largest task has {ratio:.0f} times the rows of the smallest" if unequal else ""
    return {"severity": "must" if unequal else "should", "detail": detail}


def replay_mix(case: Case, knowledge: Knowledge) -> Values:
    """Old or general data is mixed in, or should be."""
    for stage in _rehearsing(case):
        share = stage.settings["replay_fraction"]
        assert isinstance(share, float | int)
        old = rows_of(replayed(stage.objective, case.situation))
        there = old / max(old + case.rows, 1) if stage.objective == "sft" else share
        few = f", which is all there is; {share:.0%} were better" if there < share else ""
        return {"detail": f"{min(share, there):.0%} of the training rows{few}", "handled": not few}
    if case.situation.earlier and not any("replay_fraction" in stage.settings for stage in case.stages):
        named = ", ".join(d.name for d in case.situation.earlier)
        return {"detail": f"{named} cannot be mixed into this training"}
    if case.situation.wish("must_not_forget") or case.situation.task_kind == "continual":
        return {}
    return {"severity": "should"} if "cpt" in case.objectives else None


def forgetting(case: Case, knowledge: Knowledge) -> Values:
    """What was known may be lost."""
    named = dict.fromkeys(d.name for s in _rehearsing(case) for d in replayed(s.objective, case.situation))
    if named:
        told = f"{', '.join(named)} is rehearsed, and measured before and after"
        return {"severity": "must", "detail": told, "handled": True}
    if case.situation.wish("must_not_forget") or case.situation.task_kind == "continual":
        return {"severity": "must"}
    if "cpt" in case.objectives or case.tuner == "full":
        return {"severity": "should"}
    return None


def _rehearsing(case: Case) -> list[Stage]:
    """Return the stages that mix earlier data in."""
    return [stage for stage in case.stages if stage.settings.get("replay_fraction")]


def lora_capacity(case: Case, knowledge: Knowledge) -> Values:
    """More data than an adapter holds."""
    if not case.option or case.option.proposal.facts.group != "lora":
        return None
    return {} if data_excess(case.situation, knowledge) >= 0 else None


def tokenizer_fertility(case: Case, knowledge: Knowledge) -> Values:
    """Languages that tokenizers split into many pieces."""
    costly = set(rule(knowledge, "data", "languages")["costly"])
    hit = sorted(set(case.situation.languages) & costly)
    if hit:
        return {"detail": f"languages {', '.join(hit)}"}
    return {} if new_language(case.situation, knowledge) else None


def train_embeddings(case: Case, knowledge: Knowledge) -> Values:
    """A new language needs new word vectors, which adapters leave as they are."""
    return {} if "cpt" in case.objectives and new_language(case.situation, knowledge) else None


def rag_instead(case: Case, knowledge: Knowledge) -> Values:
    """Facts belong into retrieval."""
    situation = case.situation
    if case.advice.decision.instead == "none_rag":
        return {"severity": "must"}
    asks_facts = "facts" in situation.goal.tasks or situation.wish("changing_facts")
    return {"severity": "should"} if asks_facts or any(d.kind == "qa" for d in situation.demos) else None


def new_facts_hallucinate(case: Case, knowledge: Knowledge) -> Values:
    """Training on new facts raises invention."""
    situation = case.situation
    holds_facts = any(d.kind in ("documents", "qa") for d in situation.train)
    asks = "facts" in situation.goal.tasks or situation.wish("changing_facts")
    if case.advice.decision.instead == "none_rag" or asks:
        return {"severity": "must"}
    return {"severity": "should"} if holds_facts else None


def keep_reasoning_data(case: Case, knowledge: Knowledge) -> Values:
    """A model that thinks before it answers, trained on answers without the thinking."""
    if case.spec is None or "sft" not in case.objectives:
        return None
    kinds = {d.kind for d in case.situation.demos}
    if kinds == {"reasoning_chat"}:
        return None
    thinks = thinking(case.spec, knowledge)
    if thinks is None and "reasoning_chat" not in kinds:
        return None
    return {"severity": "must" if thinks == "always" and "reasoning_chat" not in kinds else "should"}


def thinking(spec: ModelSpec, knowledge: Knowledge) -> str | None:
    """`always` or `sometimes` when a model thinks aloud before it answers, by its name or chat template."""
    rules, name = rule(knowledge, "data", "reasoning"), f"{spec.id} {spec.family}".lower()
    if any(word in name for word in rules["always"]):
        return "always"
    marked = spec.chat_template is not None and any(mark in spec.chat_template for mark in rules["marks"])
    hybrid = any(word in name for word in rules["sometimes"]) and not any(w in name for w in rules["never"])
    return "sometimes" if marked or hybrid else None


def separate_adapters(case: Case, knowledge: Knowledge) -> Values:
    """One adapter for each tenant."""
    return {} if case.situation.separate else None


def sft_first(case: Case, knowledge: Knowledge) -> Values:
    """Preferences shape a model that can already do the task."""
    if not set(case.objectives) & (PREFERENCE - {"orpo"} | {"rloo", "grpo"}):
        return None
    if case.situation.scenario.goal.model_state == "own_sft":
        return None
    mild = "sft" in case.objectives or "kto" in case.objectives or case.situation.answered
    starts = case.spec is not None and case.spec.instruct
    return {"severity": "should" if mild or starts else "must"}


CHECKS = tuple(
    (check.__name__, check)
    for check in (
        rag_instead, new_facts_hallucinate, small_data_overfit, no_holdout, instruct_base_choice, dedupe,
        chat_template, eos_pad, mask_loss, tools_column, truncation, unpaired_use_kto, balance_labels,
        no_contrast, likelihood_displacement, needs_nonzero_success, sft_first, mixing_cap, forgetting,
        replay_mix, lora_capacity, tokenizer_fertility, train_embeddings, keep_reasoning_data,
        separate_adapters,
    )
)  # fmt: skip
