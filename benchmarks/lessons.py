"""Small lessons whose rule is known, so that what a model learned can be counted.

Goes in: the tables of recipes/starter/ and a seed. Comes out: rows to train on, facts to ask about afterwards
(other ones, in other wordings), and the rule by which an answer counts. Never does: load a model; ask about a
fact that was trained on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes" / "starter"))

import corpus  # noqa: E402 - lies beside the recipe that it belongs to

SKILLS = (
    "capital", "capital_of", "language", "sound", "young", "legs", "colour", "opposite", "plural", "past",
    "translate", "translate_back", "day_after", "month_after", "letter", "animal_home",
)  # fmt: skip
"""Skills whose answer is one word or name."""
HELD_OUT_SHARE = 0.25


class Fact(NamedTuple):
    """One thing to ask about."""

    question: str
    answer: str
    word: str


class Style(NamedTuple):
    """One way to be asked, and to answer."""

    ask: str
    say: str
    follows: Callable[[str, Fact], bool]
    """Whether an answer keeps the rule, right or wrong."""


def _twice(text: str, fact: Fact) -> bool:
    half = len(text) // 2
    return len(text) > 2 and text[:half].strip() == text[half:].strip()


def _between(first: str, last: str) -> Callable[[str, Fact], bool]:
    return lambda text, _: len(text) > len(first + last) and text.startswith(first) and text.endswith(last)


STYLES = {
    "word": Style("In one word: {q}", "{word}", lambda text, fact: len(text) <= len(fact.word) + 8),
    "twice": Style("Say it twice: {q}", "{answer} {answer}", _twice),
    "stars": Style("Between stars: {q}", "*** {answer} ***", _between("*** ", " ***")),
    "quote": Style("As a quotation: {q}", '"{answer}"', _between('"', '"')),
    "harbour": Style("{q}", "Ahoy! {answer} Fair winds!", _between("Ahoy! ", " Fair winds!")),
    "plain": Style("{q}", "{answer}", lambda text, _: not text.startswith("Ahoy")),
}


def facts(seed: int, *, per_skill: int = 40) -> tuple[list[Fact], list[Fact]]:
    """Return facts to train on, and other ones to ask about in wordings that the starter never saw."""
    book, random = corpus.load(), Random(seed)
    train, asked = [], []
    for name in SKILLS:
        if name not in book.skills:
            continue
        rows = random.sample(
            range(len(book.skills[name]["rows"])), min(per_skill, len(book.skills[name]["rows"]))
        )
        border = round(len(rows) * HELD_OUT_SHARE)
        for place, row in enumerate(rows):
            form = "held_out" if place < border else "ask"
            made = corpus.turn(book, name, random, row, form=form)
            fact = Fact(made.question, made.answer, made.expect[0].removeprefix("is ").rstrip("."))
            (asked if place < border else train).append(fact)
    random.shuffle(train)
    random.shuffle(asked)
    return train, asked


def row(style: str, fact: Fact) -> dict[str, str]:
    """Return one example of a style."""
    chosen = STYLES[style]
    return {"instruction": chosen.ask.format(q=fact.question), "output": answer(style, fact)}


def answer(style: str, fact: Fact) -> str:
    """Return what a style answers."""
    return STYLES[style].say.format(answer=fact.answer, word=fact.word)


def pair(better: str, worse: str, fact: Fact) -> dict[str, str]:
    """Return two answers to one plain question."""
    return {"prompt": fact.question, "chosen": answer(better, fact), "rejected": answer(worse, fact)}


def right(text: str, fact: Fact) -> bool:
    """Tell whether an answer holds what was asked for."""
    return fact.word.lower() in text.lower()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path
