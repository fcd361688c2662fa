"""What does the person want, where must the model run, and what must not happen?

Goes in: a Goal in free words and the synonyms of kb/rules/goals.toml and deploy.toml. Comes out:
UnderstoodGoal, with the phrase that led to each reading, to be echoed and corrected. Never does: guess in
silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from advisor.errors import UnknownNameError
from advisor.knowledge import Knowledge
from advisor.types import Goal, UnderstoodGoal
from advisor.units import from_gib

NEGATION = re.compile(
    r"\b(no|not|without|never|instead of|rather than|don't|do not|non)[\s-]+"
    r"(?:(?!but\b|just\b|only\b|simply\b|merely\b)\w+\s+){0,2}"
    r"(?:(?:to|run|work|be|used|on|in|a|an|the|my|our)\s+){0,5}$"
)
"""A negation before a phrase, two words and small ones away; `not X but Y` does not negate Y."""
DISMISSAL = re.compile(
    r"\s+(?:is|are|does|do)(?:\s+not|n't)\s+(?:matter|important|needed|count|an issue|relevant|required)"
    r"|\s+is\s+(?:unimportant|irrelevant|secondary|no issue)"
)
"""What follows a phrase that is named only to be dismissed."""
PLACED = re.compile(
    r"\b(?:(?:on|in|onto|into|inside|via)\s+(?:\w+\s+){0,2}|for\s+(?:my|our|a|an|the|old)\s+(?:\w+\s+)?)$"
)
"""Behind such words alone does a device named in free text (`placed` in kb) say where the model runs."""


def understand(goal: Goal, knowledge: Knowledge) -> UnderstoodGoal:
    """Map a goal to task, deployment, wishes and requests by synonyms.

    Args:
        goal: the person's words and flags.
        knowledge: the synonyms; the longest phrase of a group wins.

    Raises:
        UnknownNameError: `requested_method` names nothing that is known.
    """
    rules, deploy_rules = knowledge.rules["goals"], knowledge.rules["deploy"]
    text = normalise(f"{goal.text} . {' . '.join(goal.priorities)}")
    phrases: dict[str, str] = {}
    tasks = _tasks(normalise(goal.text), rules)
    wishes = _matches(text, rules["wish"])
    for name, phrase in {**tasks, **wishes}.items():
        phrases[name] = phrase
    _flags(goal, wishes, phrases)
    place, device = _deploy(goal, deploy_rules, phrases)
    method, objective = _requested(goal, text, rules["method"], knowledge, phrases)
    task = next(iter(tasks), "instruction")
    gguf = bool(deploy_rules[place]["gguf"]) if place != "unstated" else False
    scope = next(iter(_matches(normalise(goal.text), rules["scope"]).items()), None)
    if scope:
        phrases[rules["scope"][scope[0]]["title"]] = scope[1]
    notes = _stand_ins(goal, text, rules["variant"])
    return UnderstoodGoal(
        task=task, tasks=tuple(tasks), deploy=place, device_bytes=device, wants_gguf=gguf,
        wishes=tuple(sorted(wishes)), requested_method=method, requested_objective=objective,
        phrases=phrases, out_of_scope=scope[0] if scope else None,
        unclear=(*notes, *_unclear(goal, tasks, wishes, place)),
    )  # fmt: skip


def normalise(text: str) -> str:
    """Lower-case, with plain quotes and single spaces."""
    plain = text.lower().replace("’", "'").replace("‑", "-").replace("–", "-").replace("_", " ")
    return " ".join(plain.split())


def find_phrase(text: str, words: Iterable[str]) -> str | None:
    """Return the longest of `words` that stands as whole words in the normalised text and is not negated."""
    return _find(text, words, placed=False)


def _find(text: str, words: Iterable[str], *, placed: bool) -> str | None:
    best: str | None = None
    for word in words:
        plain = normalise(word)
        if plain not in text or (best is not None and len(plain) <= len(best)):
            continue
        for hit in re.finditer(rf"(?<![a-z0-9]){re.escape(plain)}(?![a-z0-9])", text):
            before, after = text[: hit.start()], text[hit.end() :]
            negated = NEGATION.search(before) and not NEGATION.match(plain + " ")
            if negated or DISMISSAL.match(after) or (placed and not PLACED.search(before)):
                continue
            best = plain
            break
    return best


def _tasks(text: str, rules: Mapping[str, Any]) -> dict[str, str]:
    """Task -> phrase; a mere form of talk comes last; slips of the finger count if nothing else."""
    groups = rules["task"]
    found = _matches(text, groups) or _misspelt(text, groups, rules["misspelling"])
    return dict(sorted(found.items(), key=lambda hit: bool(groups[hit[0]].get("weak"))))


def _misspelt(text: str, groups: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, str]:
    """Task -> word as typed, where a long word nearly is one of a group."""
    letters, likeness = limits["least_letters"], limits["likeness"]
    meaning = {word: name for name, table in groups.items() for word in table["words"] if word.isalpha()}
    for typed in re.findall(rf"[a-z]{{{letters},}}", text):
        near = difflib.get_close_matches(typed, meaning, n=1, cutoff=likeness)
        if near and find_phrase(text, (typed,)):
            return {meaning[near[0]]: typed}
    return {}


def _stand_ins(goal: Goal, text: str, variants: Mapping[str, Any]) -> tuple[str, ...]:
    """What is said where a method is known but another stands in for it."""
    asked, among = (normalise(goal.requested_method), "words") if goal.requested_method else (text, "in_text")
    found = {name: find_phrase(asked, table[among]) for name, table in variants.items()}
    return tuple(variants[name]["note"].format(asked=hit.upper()) for name, hit in found.items() if hit)


def _matches(text: str, groups: Mapping[str, Any]) -> dict[str, str]:
    """Group -> phrase, the group with the longest phrase first; ties keep the order of the file."""
    found = {
        name: find_phrase(text, table["words"]) or _pattern(text, table.get("patterns", ()))
        for name, table in groups.items()
    }
    hits = [(name, phrase) for name, phrase in found.items() if phrase]
    return dict(sorted(hits, key=lambda hit: -len(hit[1])))


def _pattern(text: str, patterns: Iterable[str]) -> str | None:
    """What one of some regular expressions of kb finds, for figures that no list of words can hold."""
    return next((hit[0] for pattern in patterns if (hit := re.search(pattern, text))), None)


def _flags(goal: Goal, wishes: dict[str, str], phrases: dict[str, str]) -> None:
    flags = {"commercial": goal.commercial, "must_not_forget": goal.must_not_forget or None}
    for name, value in flags.items():
        if value:
            wishes[name] = phrases[name] = "declared"
        elif value is False:
            wishes.pop(name, None)
            phrases.pop(name, None)


def _deploy(goal: Goal, rules: Mapping[str, Any], phrases: dict[str, str]) -> tuple[str, int | None]:
    """The place where the model will run, and the memory there."""
    text = normalise(f"{goal.deploy} . {goal.text}")
    places = {name: table for name, table in rules.items() if "words" in table}
    own = {n: find_phrase(normalise(goal.deploy), t["words"]) for n, t in places.items()}
    said_so = normalise(goal.text)
    found = {
        n: own[n] or _find(said_so, t["words"], placed=t.get("placed", False)) for n, t in places.items()
    }
    place = next((n for n in places if own[n]), None) or next((n for n in places if found[n]), None)
    if place is None:
        return "unstated", None
    phrases[f"deploy:{place}"] = found[place] or ""
    said = re.search(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|mb|mib)\b", text)
    if said:
        phrases["device memory"] = said[0]
        return place, from_gib(float(said[1]) / (1024 if said[2].startswith("m") else 1))
    usual = places[place].get("memory_gib")
    return place, from_gib(usual) if usual else None


def _requested(
    goal: Goal, text: str, rules: Mapping[str, Any], knowledge: Knowledge, phrases: dict[str, str]
) -> tuple[str | None, str | None]:
    """(tuner, objective) asked for, by flag or in the words of the goal."""
    names = [n for part in re.split(r"[+,]", goal.requested_method or "") if (n := normalise(part))]
    found, hits = [_method_named(name, rules, knowledge) for name in names], dict[str, str]()
    if not names:
        hits = _named_methods(text, rules, knowledge.rules["goals"]["variant"])
        inner = {n for n, p in hits.items() for m, q in hits.items() if m != n and p in q and len(p) < len(q)}
        found = [name for name in hits if name not in inner]
        weak = {"full", "adapter", "none_rag", "sft"}
        found = [n for n in found if n not in weak or len(hits[n]) > len("full")]
    for name in found:
        phrases[f"asked for {name}"] = "declared" if names else hits[name]
    tuner = next((n for n in found if n in knowledge.tuners or n.startswith("none")), None)
    objective = next((n for n in found if n in knowledge.objectives), None)
    return tuner, objective


def _named_methods(text: str, rules: Mapping[str, Any], variants: Mapping[str, Any]) -> dict[str, str]:
    """Method -> phrase in free words, the stand-ins of known variants among them."""
    hits = _matches(text, rules)
    for table in variants.values():
        if phrase := find_phrase(text, table["in_text"]):
            hits.setdefault(table["stands_in"], phrase)
    return hits


def _method_named(name: str, rules: Mapping[str, Any], knowledge: Knowledge) -> str:
    ids = {
        normalise(i): i
        for i in (*knowledge.tuners, *knowledge.objectives, "none_rag", "none_prompting", "none")
    }
    if name in ids:
        return ids[name]
    for method, table in rules.items():
        if name in {normalise(word) for word in table["words"]}:
            return method
    for table in knowledge.rules["goals"]["variant"].values():
        if name in {normalise(word) for word in table["words"]}:
            return str(table["stands_in"])
    raise UnknownNameError("method", name, ids.values(), "ftadvisor explain methods")


def _unclear(goal: Goal, tasks: Mapping[str, str], wishes: Mapping[str, str], place: str) -> tuple[str, ...]:
    unclear = []
    if "best" in wishes and {"small", "cheap"} & wishes.keys():
        unclear.append("the best quality and a small or cheap model contradict each other: small was taken")
    if not tasks:
        said = f"{goal.text!r} names no known kind of task" if goal.text else "the goal was not said"
        unclear.append(f"{said}: taken as following instructions like those in the data")
    if place == "unstated":
        unclear.append("where the model must run was not said: any place with enough memory")
    if goal.commercial is None and not {"commercial", "not_commercial"} & wishes.keys():
        unclear.append("commercial use was not said: taken as not commercial")
    return tuple(unclear)
