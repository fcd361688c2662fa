"""Which objectives, in which order, do the data allow: demonstrations, pairs, thumbs, checkable prompts, text?

Goes in: a Situation and the rules of kb/rules/data.toml. Comes out: a Decision: the chain to train (possibly none),
why, what speaks against training now, and every objective that was turned down with its reason.
Never does: choose a tuner or a model.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.recommend.situation import Situation, megabytes_of, rows_of, rule
from advisor.types import Objective, Record, Verdict
from advisor.units import format_count

ORDER: tuple[Objective, ...] = ("cpt", "sft", "dpo", "kto", "orpo", "simpo", "reward", "rloo", "grpo")
PAIR_OBJECTIVES = frozenset({"dpo", "orpo", "simpo", "reward"})
PREFERENCE = frozenset({"dpo", "kto", "orpo", "simpo"})
REINFORCEMENT = frozenset({"rloo", "grpo"})


class Decision(Record, frozen=True, kw_only=True):
    """The chain of objectives and whether to train at all."""

    chain: tuple[Objective, ...] = ()
    why: str = ""
    source: str = "axolotl-guides"
    verdict: Verdict = "train"
    instead: str | None = None
    """none_rag, none_prompting or none: what to do instead of training."""
    instead_why: str = ""
    refused_request: str = ""
    """Why the objective asked for is not the one advised; empty when it is, or none was asked for."""
    rejected: dict[str, str] = {}
    """Objective -> why it is not part of the chain."""


def decide(situation: Situation, knowledge: Knowledge) -> Decision:
    """Choose the chain of objectives, or what to do instead of training."""
    stopped = _nothing_to_train(situation, knowledge)
    chain, why, source = _chain(situation, knowledge)
    rejected = _rejections(situation, knowledge, chain)
    asked = situation.goal.requested_objective
    refused = rejected.get(asked, "") if asked and asked not in chain else ""
    verdict: Verdict = "change_plan" if refused else "train"
    if never_succeeds(situation, knowledge) and asked in (None, "grpo", "rloo"):
        verdict = "change_plan"
        refused = refused or "the model never solves these tasks yet, so there is nothing to reinforce"
    if stopped is not None and (not situation.force or not chain):
        instead, reason, stop_source = stopped
        return Decision(
            chain=chain, why=reason, source=stop_source, instead=instead, instead_why=reason,
            verdict="export_only" if instead == "none" else "dont_train_yet", refused_request=refused,
            rejected=rejected,
        )  # fmt: skip
    if not chain:
        reason = "there is no data to train on"
        return Decision(
            instead="none_prompting", instead_why=reason, why=reason, verdict="dont_train_yet",
            source="openai-sft-guide", rejected=rejected,
        )  # fmt: skip
    return Decision(
        chain=chain, why=why, source=source, verdict=verdict, refused_request=refused, rejected=rejected
    )


# --- not training --------------------------------------------------------------------------------


def _nothing_to_train(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    """(what instead, why, source) when training is not the answer now."""
    for check in (_only_export, _only_text, _changing_facts, _too_few, _no_target):
        if answer := check(situation, knowledge):
            return answer
    return None


def _only_export(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    wants = situation.goal.tasks[:1] == ("export",) or "export" in situation.goal.tasks
    if situation.train or not (wants or situation.scenario.goal.model_state):
        return None
    return (
        "none",
        "there is no training data and the wish is a file that runs: nothing needs training",
        "export-lab",
    )


def _only_text(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    if not situation.texts or situation.demos or situation.pairs or situation.unpaired or situation.answered:
        return None
    rules = rule(knowledge, "data", "text_volume")
    size = megabytes_of(situation.texts)
    asked = situation.goal.requested_objective == "cpt"
    documents = any(d.kind == "documents" for d in situation.texts)
    if size < rules["retrieval_only_below_mb"]:
        reason = (
            f"{size:.3g} MB of text is far too little to teach facts to a model; retrieval finds them exactly "
            f"(continued pre-training starts at about {rules['retrieval_only_below_mb']} MB)"
        )
        return "none_rag", reason, rules["source"]
    facts = "facts" in situation.goal.tasks or situation.goal.task == "instruction"
    wants_manner = bool({"language", "style", "code"} & set(situation.goal.tasks)) or asked
    if size < rules["mixed_below_mb"] and (facts or documents) and not wants_manner:
        reason = (
            f"{size:.3g} MB of documents hold facts, and training teaches facts slowly and unreliably; "
            f"between {rules['retrieval_only_below_mb']} and {rules['mixed_below_mb']} MB retrieval comes first"
        )
        return "none_rag", reason, rules["source"]
    if "facts" in situation.goal.tasks and documents and not wants_manner:
        return (
            "none_rag",
            "answers that must be right and cited come from retrieval, however much text there is",
            rules["source"],
        )
    return None


def _changing_facts(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    if not situation.wish("changing_facts") or situation.pairs or situation.unpaired or situation.answered:
        return None
    if situation.goal.task not in ("facts", "chat", "instruction") and "facts" not in situation.goal.tasks:
        return None
    phrase = situation.goal.phrases["changing_facts"]
    reason = f"what changes ({phrase!r}) belongs into retrieval: a trained fact is old the next day"
    return "none_rag", reason, rule(knowledge, "data", "text_volume")["source"]


def _too_few(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    limits, pairs = rule(knowledge, "data", "rows"), rule(knowledge, "data", "preference")
    labelled = (*situation.pairs, *situation.unpaired)
    if situation.texts or situation.answered or situation.prompts:
        return None
    rows, judged = rows_of(situation.demos), rows_of(labelled)
    if not situation.train or (judged >= pairs["refuse_below"]):
        return None
    if rows < limits["refuse_below"] and not judged:
        reason = (
            f"{rows} examples are below the minimum of {limits['refuse_below']}: put them into the prompt as "
            "examples instead"
        )
        return "none_prompting", reason, limits["source"]
    if max(rows, judged) < limits["prompt_below"]:
        if situation.goal.requested_method == "ia3" and rows >= limits["refuse_below"]:
            return None
        reason = (
            f"{max(rows, judged)} examples: prompting with some of them comes first; gains from training show "
            f"from {limits['prompt_below']} good ones on"
        )
        return "none_prompting", reason, limits["source"]
    return None


def _no_target(situation: Situation, knowledge: Knowledge) -> tuple[str, str, str] | None:
    if (
        not situation.prompts
        or situation.demos
        or situation.pairs
        or situation.unpaired
        or situation.answered
    ):
        return None
    if situation.wish("reward_function") or situation.texts:
        return None
    reason = (
        "prompts alone say nothing about what a good answer is: write answers, collect preferences, or write a "
        "program that checks answers"
    )
    return "none_prompting", reason, "axolotl-guides"


# --- the chain -----------------------------------------------------------------------------------


def _chain(situation: Situation, knowledge: Knowledge) -> tuple[tuple[Objective, ...], str, str]:
    last, why, source = _last_stage(situation, knowledge)
    first: list[Objective] = []
    if _text_is_worth(situation, knowledge):
        first.append("cpt")
        size = megabytes_of(situation.texts)
        why = f"{size:,.0f} MB of plain text teach the language or manner first{'; ' + why if why else ''}"
        source = rule(knowledge, "data", "text_volume")["source"]
    if situation.demos or _needs_policy_first(situation, knowledge, last):
        first.append("sft")
        if last and situation.demos:
            why = f"{format_count(rows_of(situation.demos))} demonstrations first; then {why}"
        elif last:
            why = f"the start has to learn the task first, from the better or right answers; then {why}"
        if not last:
            rows = format_count(rows_of(situation.demos))
            why = why or f"{rows} demonstrations show the answers wanted: supervised fine-tuning"
    return (*first, *last), why, source


def _last_stage(situation: Situation, knowledge: Knowledge) -> tuple[tuple[Objective, ...], str, str]:
    """The stage after SFT, why, and its source."""
    asked = situation.goal.requested_objective
    direct: dict[str, Objective] = {"dpo": "dpo", "orpo": "orpo", "simpo": "simpo"}
    if situation.pairs and asked in direct:
        return (
            (direct[asked],),
            f"{knowledge.objectives[asked].title} was asked for and the pairs allow it",
            "axolotl-guides",
        )
    if situation.pairs and (asked == "rloo" or (situation.prompts and asked in (None, "grpo", "reward"))):
        why = "the pairs train a reward model, and the model is then reinforced with its marks"
        return ("reward", "rloo"), why, "rloo-paper"
    if situation.pairs and asked == "reward":
        return ("reward",), "a reward model was asked for", "trl-peft-guide"
    if situation.answered and asked in (None, "grpo", "rloo", "sft"):
        chosen: Objective = "rloo" if asked == "rloo" else "grpo"
        return (
            (chosen,),
            "answers that a program can check: reinforcement with verifiable rewards",
            "axolotl-guides",
        )
    if situation.prompts and situation.wish("reward_function") and not situation.pairs:
        return ("grpo",), "a program marks the answers: reinforcement with its marks", "axolotl-guides"
    pairs, thumbs = rows_of(situation.pairs), rows_of(situation.unpaired)
    if situation.unpaired and (asked == "kto" or thumbs > pairs):
        return (
            ("kto",),
            f"{format_count(thumbs)} answers carry a thumb up or down, without pairs: KTO",
            "trl-kto-docs",
        )
    if situation.pairs and asked != "sft":
        if asked == "kto":
            return ("kto",), "KTO was asked for; each pair gives a good and a bad answer", "trl-kto-docs"
        return ("dpo",), f"{format_count(pairs)} pairs of better and worse answers: DPO", "axolotl-guides"
    if situation.answered:
        return (
            ("grpo",),
            "answers that a program can check: reinforcement with verifiable rewards",
            "axolotl-guides",
        )
    return (), "", "axolotl-guides"


def starts_as_policy(situation: Situation) -> bool:
    """True when the start already follows instructions: an instruct model or the person's own SFT."""
    if situation.scenario.goal.model_state is not None:
        return True
    return situation.spec is None or situation.spec.instruct


def _needs_policy_first(situation: Situation, knowledge: Knowledge, last: tuple[Objective, ...]) -> bool:
    if situation.goal.requested_objective == "sft" and situation.pairs and not last:
        return True
    if not last:
        return False
    if never_succeeds(situation, knowledge):
        return True
    if last[0] in ("orpo", "kto"):
        return False
    if not starts_as_policy(situation):
        return True
    off_policy = any(d.on_policy is False for d in situation.pairs)
    return last[0] in ("dpo", "simpo") and off_policy and situation.scenario.goal.model_state is None


def never_succeeds(situation: Situation, knowledge: Knowledge) -> bool:
    """True when the start solves practically none of the checkable prompts."""
    low = rule(knowledge, "data", "reinforcement")["pass_rate_low"]
    rates = [d.baseline_pass_rate for d in situation.answered if d.baseline_pass_rate is not None]
    return bool(rates) and max(rates) <= low


def _text_is_worth(situation: Situation, knowledge: Knowledge) -> bool:
    if not situation.texts:
        return False
    rules = rule(knowledge, "data", "text_volume")
    size = megabytes_of(situation.texts)
    asked = situation.goal.requested_objective == "cpt"
    if size < rules["retrieval_only_below_mb"]:
        return asked and situation.force
    manner = bool({"language", "style", "code"} & set(situation.goal.tasks)) or asked
    raw = any(d.kind == "raw_text" for d in situation.texts)
    return size >= rules["mixed_below_mb"] or manner or (raw and not situation.demos)


# --- what was turned down ------------------------------------------------------------------------


def _rejections(situation: Situation, knowledge: Knowledge, chain: tuple[Objective, ...]) -> dict[str, str]:
    return {
        objective: _why_not(objective, situation, knowledge)
        for objective in ORDER
        if objective not in chain and objective in knowledge.objectives
    } | {
        name: f"a method of the overlay; the data do not call for it (it takes {', '.join(facts.data_kinds)})"
        for name, facts in knowledge.objectives.items()
        if name not in ORDER
    }


def _why_not(objective: str, situation: Situation, knowledge: Knowledge) -> str:
    if objective == "cpt":
        return _why_no_cpt(situation, knowledge)
    if objective == "sft":
        return "there are no demonstrations, and the start already follows instructions"
    if objective in PAIR_OBJECTIVES and not situation.pairs:
        if situation.unpaired:
            return "single answers with a thumb up or down are not pairs of two answers to one prompt: KTO takes them"
        return "it needs pairs of a better and a worse answer to the same prompt"
    if objective == "dpo":
        return "another way of using the pairs was chosen"
    if objective == "orpo":
        return "it trailed DPO in all five settings of a published comparison; worth it only where memory or time allows no second stage"
    if objective == "simpo":
        return "no reference model, but very sensitive to the learning rate: DPO is the safer start"
    if objective == "reward":
        return "a separate reward model pays off only with reinforcement afterwards; DPO learns from the pairs directly"
    if objective == "kto":
        return _why_no_kto(situation)
    if situation.answered or (situation.prompts and situation.pairs):
        return "another form of reinforcement was chosen; this one answers the same need"
    return (
        "it needs prompts together with a program or reward model that marks the answers; the data have none"
    )


def _why_no_kto(situation: Situation) -> str:
    if situation.pairs:
        return "the labels come in pairs, which DPO uses better"
    if situation.unpaired:
        return "there are more pairs than single labels"
    return "it needs answers that are labelled good or bad"


def _why_no_cpt(situation: Situation, knowledge: Knowledge) -> str:
    if not situation.texts:
        return "there is no plain text to read"
    limit = rule(knowledge, "data", "text_volume")["retrieval_only_below_mb"]
    size = megabytes_of(situation.texts)
    if size < limit:
        return f"{size:.3g} MB of text is below the {limit} MB from which reading on pays"
    return "facts from documents are better retrieved than trained"
