"""Which objectives, in which order, do the data allow?

Goes in: a Situation and kb/rules/data.toml. Comes out: a Decision: the chain to train (possibly none),
why, what speaks against training now, and every objective that was turned down with its reason. Never
does: choose a tuner or a model.
"""

from __future__ import annotations

import msgspec

from advisor.knowledge import Knowledge
from advisor.recommend.reasons import because
from advisor.recommend.situation import Situation, megabytes_of, rows_of, rule
from advisor.types import Objective, Record, Verdict, Why
from advisor.units import format_count

ORDER: tuple[Objective, ...] = ("cpt", "sft", "dpo", "kto", "orpo", "simpo", "reward", "rloo", "grpo")
PAIR_OBJECTIVES = frozenset({"dpo", "orpo", "simpo", "reward"})
PREFERENCE = frozenset({"dpo", "kto", "orpo", "simpo"})
REINFORCEMENT = frozenset({"rloo", "grpo"})
MANNER = frozenset({"language", "style", "code"})
"""Tasks for which plain text is worth reading on, beside facts."""

Instead = tuple[str, Why]
"""none_rag, none_prompting or none, and why."""
Last = tuple[tuple[Objective, ...], Why | None]
"""The stages after SFT, and why."""


class Decision(Record, frozen=True, kw_only=True):
    """The chain of objectives and whether to train at all."""

    chain: tuple[Objective, ...] = ()
    why: str = ""
    verdict: Verdict = "train"
    instead: str | None = None
    """none_rag, none_prompting or none: what to do instead of training."""
    refused_request: str = ""
    """Why the objective asked for is not the one advised; empty when it is, or none was asked for."""
    can_insist: bool = False
    """True when `--force` would train the objective that was refused."""
    rejected: dict[str, str] = {}
    """Objective -> why it is not part of the chain."""


def decide(situation: Situation, knowledge: Knowledge) -> Decision:
    """Choose the chain of objectives, or what to do instead of training."""
    instead = _instead_of_training(situation, knowledge)
    chain, why = _chain(situation, knowledge)
    rejected = {o: why_not(o, situation, knowledge) for o in knowledge.objectives if o not in chain}
    asked = situation.goal.requested_objective
    refused = rejected.get(asked, "") if asked and asked not in chain else ""
    if _nothing_to_reinforce(situation, knowledge) and asked in (None, "grpo", "rloo"):
        refused = refused or because(knowledge, "objective", "never_succeeds").reason
    insisting = _chain(msgspec.structs.replace(situation, force=True), knowledge)[0]
    can_insist = not situation.force and asked in insisting
    if instead is None and not chain:
        instead = ("none_prompting", because(knowledge, "instead", "no_data"))
    if instead is not None and not (situation.force and chain):
        exports = instead[0] == "none" and situation.goal.out_of_scope is None
        verdict: Verdict = "export_only" if exports else "dont_train_yet"
        return Decision(
            chain=chain, why=instead[1].reason, instead=instead[0], verdict=verdict,
            refused_request=refused, can_insist=can_insist, rejected=rejected,
        )  # fmt: skip
    verdict = "change_plan" if refused else "train"
    return Decision(
        chain=chain, why=why, verdict=verdict, refused_request=refused, can_insist=can_insist,
        rejected=rejected,
    )  # fmt: skip


# --- not training --------------------------------------------------------------------------------


def _instead_of_training(situation: Situation, knowledge: Knowledge) -> Instead | None:
    checks = (
        _out_of_scope, _no_training_asked, _only_export, _only_text, _changing_facts, _too_few, _no_target,
    )  # fmt: skip
    return next((answer for check in checks if (answer := check(situation, knowledge))), None)


def _out_of_scope(situation: Situation, knowledge: Knowledge) -> Instead | None:
    key = situation.goal.out_of_scope
    if key is None:
        return None
    scope = rule(knowledge, "goals", "scope")[key]
    return "none", because(knowledge, "instead", "out_of_scope", wish=scope["title"], remedy=scope["remedy"])


def _no_training_asked(situation: Situation, knowledge: Knowledge) -> Instead | None:
    asked = situation.goal.requested_method or ""
    declared = situation.goal.phrases.get(f"asked for {asked}") == "declared"
    if not (declared and asked.startswith("none")):
        return None
    return asked, because(knowledge, "instead", "asked")


def _only_export(situation: Situation, knowledge: Knowledge) -> Instead | None:
    wanted = "export" in situation.goal.tasks or situation.scenario.goal.model_state is not None
    return ("none", because(knowledge, "instead", "export")) if wanted and not situation.train else None


def _only_text(situation: Situation, knowledge: Knowledge) -> Instead | None:
    if not situation.texts or situation.demos or situation.pairs or situation.unpaired or situation.answered:
        return None
    rules, size = rule(knowledge, "data", "text_volume"), megabytes_of(situation.texts, knowledge)
    low, high = rules["retrieval_only_below_mb"], rules["mixed_below_mb"]
    if size < low:
        return "none_rag", because(knowledge, "instead", "little_text", size=f"{size:.3g}", limit=low)
    if wants_manner(situation):
        return None
    documents = any(d.kind == "documents" for d in situation.texts)
    facts = "facts" in situation.goal.tasks
    if size < high and (facts or documents or situation.goal.task == "instruction"):
        why = because(knowledge, "instead", "documents", size=f"{size:.3g}", low=low, high=high)
        return "none_rag", why
    return ("none_rag", because(knowledge, "instead", "cited_facts")) if facts and documents else None


def wants_manner(situation: Situation) -> bool:
    """True when a language or a manner is wanted of plain text, not its facts."""
    return bool(MANNER & set(situation.goal.tasks)) or situation.goal.requested_objective == "cpt"


def _changing_facts(situation: Situation, knowledge: Knowledge) -> Instead | None:
    if not situation.wish("changing_facts") or situation.pairs or situation.unpaired or situation.answered:
        return None
    if situation.goal.task not in ("facts", "chat", "instruction") and "facts" not in situation.goal.tasks:
        return None
    tasks = knowledge.rules["goals"]["task"]
    if any(tasks[task].get("input_holds_facts", False) for task in situation.goal.tasks):
        return None
    phrase = repr(situation.goal.phrases["changing_facts"])
    return "none_rag", because(knowledge, "instead", "changing_facts", phrase=phrase)


def _too_few(situation: Situation, knowledge: Knowledge) -> Instead | None:
    limits, pairs = rule(knowledge, "data", "rows"), rule(knowledge, "data", "preference")
    if situation.answered and not (situation.demos or situation.pairs or situation.unpaired):
        return _too_few_prompts(situation, knowledge)
    if situation.texts or situation.answered or situation.prompts or not situation.train:
        return None
    rows, judged = rows_of(situation.demos), rows_of((*situation.pairs, *situation.unpaired))
    if judged >= pairs["refuse_below"] or rows >= limits["prompt_below"]:
        return None
    if rows < limits["refuse_below"] and not judged:
        why = because(knowledge, "instead", "below_minimum", rows=rows, limit=limits["refuse_below"])
        return "none_prompting", why
    if situation.goal.requested_method == "ia3" and rows >= limits["refuse_below"]:
        return None
    if judged and not rows:
        why = because(knowledge, "instead", "few_judged", rows=judged, limit=pairs["refuse_below"])
        return "none_prompting", why
    figures = {"rows": max(rows, judged), "limit": limits["prompt_below"]}
    return "none_prompting", because(knowledge, "instead", "few_examples", **figures)


def _too_few_prompts(situation: Situation, knowledge: Knowledge) -> Instead | None:
    least, rows = rule(knowledge, "data", "reinforcement")["prompts_least"], rows_of(situation.answered)
    if rows >= least or situation.texts:
        return None
    return "none_prompting", because(knowledge, "instead", "few_prompts", rows=rows, limit=least)


def _no_target(situation: Situation, knowledge: Knowledge) -> Instead | None:
    if not situation.prompts or situation.marked or situation.texts:
        return None
    if situation.demos or situation.pairs or situation.unpaired or situation.answered:
        return None
    return "none_prompting", because(knowledge, "instead", "no_target")


# --- the chain -----------------------------------------------------------------------------------


def _chain(situation: Situation, knowledge: Knowledge) -> tuple[tuple[Objective, ...], str]:
    """(objectives in order, why)."""
    last, ground = _last_stage(situation, knowledge)
    why, first = ground.reason if ground else "", list[Objective]()
    rows = format_count(rows_of(situation.demos))
    if situation.demos or _needs_task_first(situation, knowledge, last):
        first.append("sft")
        if not last:
            why = because(knowledge, "chain", "demonstrations", rows=rows).reason
        elif situation.demos:
            why = because(knowledge, "chain", "demonstrations_first", rows=rows, rest=why).reason
        else:
            why = because(knowledge, "chain", "task_first", rest=why).reason
    if _text_is_worth(situation, knowledge):
        first.insert(0, "cpt")
        size = f"{megabytes_of(situation.texts, knowledge):,.0f}"
        why = "; ".join(filter(None, (because(knowledge, "chain", "text_first", size=size).reason, why)))
    return (*first, *last), why


def _last_stage(situation: Situation, knowledge: Knowledge) -> Last:
    asked = situation.goal.requested_objective
    direct: dict[str, Objective] = {"dpo": "dpo", "orpo": "orpo", "simpo": "simpo"}
    if situation.pairs and asked in direct:
        title = knowledge.objectives[direct[asked]].title
        return (direct[asked],), because(knowledge, "chain", "asked_pairs", title=title)
    if situation.pairs and (asked == "rloo" or (situation.prompts and asked in (None, "grpo", "reward"))):
        return ("reward", "rloo"), because(knowledge, "chain", "reward_then_reinforce")
    if situation.pairs and asked == "reward":
        return ("reward",), because(knowledge, "chain", "reward_asked")
    if situation.answered and asked in (None, "grpo", "rloo", "sft"):
        return ("rloo" if asked == "rloo" else "grpo",), because(knowledge, "chain", "verifiable")
    if situation.prompts and situation.marked and not situation.pairs:
        return ("rloo" if asked == "rloo" else "grpo",), because(knowledge, "chain", "marked")
    return _from_labels(situation, knowledge, asked)


def _from_labels(situation: Situation, knowledge: Knowledge, asked: str | None) -> Last:
    pairs, thumbs = rows_of(situation.pairs), rows_of(situation.unpaired)
    if situation.unpaired and (asked == "kto" or thumbs > pairs):
        return ("kto",), because(knowledge, "chain", "thumbs", rows=format_count(thumbs))
    if situation.pairs and asked != "sft":
        if asked == "kto":
            return ("kto",), because(knowledge, "chain", "kto_asked")
        return ("dpo",), because(knowledge, "chain", "pairs", rows=format_count(pairs))
    if situation.answered:
        return ("grpo",), because(knowledge, "chain", "verifiable")
    return (), None


def starts_as_policy(situation: Situation) -> bool:
    """True when the start already follows instructions: an instruct model or the person's own SFT."""
    if situation.scenario.goal.model_state is not None:
        return True
    return situation.spec is None or situation.spec.instruct


def _needs_task_first(situation: Situation, knowledge: Knowledge, last: tuple[Objective, ...]) -> bool:
    if not last:
        return situation.goal.requested_objective == "sft" and bool(situation.pairs)
    if _nothing_to_reinforce(situation, knowledge):
        return True
    if last[0] in ("orpo", "kto"):
        return False
    if not starts_as_policy(situation):
        return bool(situation.demos or situation.pairs)
    off_policy = any(d.on_policy is False for d in situation.pairs)
    return last[0] in ("dpo", "simpo") and off_policy and situation.scenario.goal.model_state is None


def never_succeeds(situation: Situation, knowledge: Knowledge) -> bool:
    """True when the start solves practically none of the checkable prompts."""
    low = rule(knowledge, "data", "reinforcement")["pass_rate_low"]
    rates = [d.baseline_pass_rate for d in situation.answered if d.baseline_pass_rate is not None]
    return bool(rates) and max(rates) <= low


def _nothing_to_reinforce(situation: Situation, knowledge: Knowledge) -> bool:
    """True when the start never succeeds and the person does not insist on reinforcement."""
    insists = situation.force and situation.goal.requested_objective in REINFORCEMENT
    return never_succeeds(situation, knowledge) and not insists


def _text_is_worth(situation: Situation, knowledge: Knowledge) -> bool:
    if not situation.texts:
        return False
    rules, size = rule(knowledge, "data", "text_volume"), megabytes_of(situation.texts, knowledge)
    if size < rules["retrieval_only_below_mb"]:
        return situation.goal.requested_objective == "cpt" and situation.force
    raw = any(d.kind == "raw_text" for d in situation.texts)
    return size >= rules["mixed_below_mb"] or wants_manner(situation) or (raw and not situation.demos)


# --- what was turned down ------------------------------------------------------------------------


def why_not(objective: str, situation: Situation, knowledge: Knowledge) -> str:
    """Why an objective is not part of the chain."""
    key, figures = _why_not(objective, situation, knowledge)
    return because(knowledge, "objective", key, **figures).reason


def _why_not(objective: str, situation: Situation, knowledge: Knowledge) -> tuple[str, dict[str, object]]:
    if objective not in ORDER:
        kinds = ", ".join(knowledge.objectives[objective].data_kinds)
        return "not_called_for", {"kinds": kinds}
    if objective == "cpt":
        return _why_no_cpt(situation, knowledge)
    if objective in PAIR_OBJECTIVES and not situation.pairs:
        return ("thumbs_are_no_pairs" if situation.unpaired else "needs_pairs"), {}
    if objective == "kto":
        return ("kto_pairs" if situation.pairs else "kto_few" if situation.unpaired else "kto_none"), {}
    if objective in REINFORCEMENT:
        possible = situation.answered or (situation.prompts and (situation.pairs or situation.marked))
        return ("other_reinforcement" if possible else "needs_marks"), {}
    return objective, {}


def _why_no_cpt(situation: Situation, knowledge: Knowledge) -> tuple[str, dict[str, object]]:
    if not situation.texts:
        return "no_text", {}
    limit = rule(knowledge, "data", "text_volume")["retrieval_only_below_mb"]
    size = megabytes_of(situation.texts, knowledge)
    if size < limit:
        return "little_text", {"size": f"{size:.3g}", "limit": limit}
    return "facts_in_text", {}
