"""The verdict on a training: what the figures show beyond chance, and never more than that."""

from __future__ import annotations

import random
from typing import Any

import pytest

from advisor.knowledge import load
from advisor.run.verdict import bootstrap, judge, repetition
from advisor.types import Asked, Evaluation, Measured, RowLoss

RULES = load().rules["evaluation"]
KNOWN = 40


def measured(
    *, loss: float = 2.0, gain: float | None = None, right: int = KNOWN, rows: int = 30, noise: float = 0.1,
    seed: int = 0, answer: str = "The sky is blue.", ended: bool = True, dataset: str = "",
) -> Measured:  # fmt: skip
    """A measurement: mean loss a token, what the question is worth, general questions answered right."""
    chance = random.Random(seed)
    lost = [
        RowLoss(
            dataset=dataset or f"d{n % 2}", tokens=10, loss=10 * (loss + chance.gauss(0, noise)),
            swapped=None if gain is None else 10 * (loss + gain + chance.gauss(0, noise)),
        )
        for n in range(rows)
    ]  # fmt: skip
    asked = [
        Asked(
            prompt=f"Question {n}?", answer=answer if n < right else f"Wrong {seed}", tokens=5, ended=ended,
            right=n < right, skill="colours" if n % 2 else "sums",
        )
        for n in range(KNOWN)
    ]  # fmt: skip
    return Measured(rows=tuple(lost), probes=tuple(asked))


def verdict(before: Measured, after: Measured, figures: Any = None) -> Evaluation:
    """Judge two measurements by the shipped rules."""
    return judge(before, after, figures or {}, RULES)


BEFORE = measured()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (measured(loss=1.5, gain=0.5, seed=1), "better"),
        (measured(loss=1.5, gain=0.5, seed=1, right=KNOWN - 2), "better"),
        (measured(loss=2.5, gain=0.5, seed=1), "worse"),
        (measured(loss=2.5, gain=0.5, seed=1, right=0), "worse"),
        (measured(loss=2.0, gain=0.5, seed=1), "no_different"),
        (measured(loss=1.99, gain=0.5, seed=1, noise=0.5), "no_different"),
        (measured(loss=1.5, gain=0.5, seed=1, right=KNOWN // 2), "forgot"),
        (measured(loss=1.5, gain=0.0, seed=1, right=KNOWN // 2), "worse"),
        (measured(loss=1.5, right=KNOWN // 2, seed=1), "forgot"),
        (BEFORE, "no_different"),
    ],
)
def test_the_verdict_follows_the_figures(after: Measured, expected: str) -> None:
    """Less loss is better, more is worse, lost general answers are forgetting, or worse where the question is
    of no use any more; chance is no difference."""
    found = verdict(BEFORE, after)
    assert found.verdict == expected
    assert found.evidence


def test_no_effect_is_said() -> None:
    """The same losses and answers mean that nothing was trained, whatever else is measured."""
    assert "no effect" in verdict(BEFORE, BEFORE).evidence[0]


def test_too_few_rows_allow_no_verdict() -> None:
    """Four rows say nothing about the task; what was forgotten still shows."""
    before, after = measured(rows=4), measured(rows=4, loss=0.1, seed=1)
    assert verdict(before, after).verdict == "unknown"
    assert verdict(before, measured(rows=4, loss=0.1, seed=1, right=3)).verdict == "forgot"
    assert verdict(Measured(), Measured()).verdict == "unknown"


def test_each_dataset_has_its_figure() -> None:
    """Several tasks are told one by one, skills where they changed."""
    names = [change.name for change in verdict(BEFORE, measured(loss=1.5, seed=1, right=20)).changes]
    assert {"held-out loss", "held-out loss of d0", "held-out loss of d1", "colours right"} <= set(names)


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({}, {"accuracy": 0.9, "pairs": 40}, "better"),
        ({}, {"accuracy": 0.1, "pairs": 40}, "worse"),
        ({}, {"accuracy": 0.6, "pairs": 10}, "no_different"),
        ({}, {"margin": 1.0, "margin_error": 0.1}, "better"),
        ({}, {"margin": 0.1, "margin_error": 0.1}, "no_different"),
        ({"reward": 0.2, "reward_error": 0.02}, {"reward": 0.5, "reward_error": 0.02}, "better"),
        ({"reward": 0.2, "reward_error": 0.2}, {"reward": 0.3, "reward_error": 0.2}, "no_different"),
    ],
)
def test_pairs_marks_and_rewards_are_judged_by_their_own_figures(
    then: dict[str, float], now: dict[str, float], expected: str
) -> None:
    """The share of pairs, the margin of marks, the reward, each with its uncertainty."""
    before, after = (measured(rows=0, answer=text) for text in ("one", "two"))
    assert verdict(before, after, {"before": then, "after": now}).verdict == expected


def test_bad_manners_are_said() -> None:
    """Answers that repeat, do not end or grow long are named beside the verdict."""
    loop = "so it is " * 20
    found = " ".join(verdict(BEFORE, measured(loss=1.0, seed=1, answer=loop, ended=False)).evidence)
    assert "repeat themselves" in found
    assert "did not end" in found
    assert repetition("one two three four five") == 0
    assert repetition(loop) > 0.9


def test_the_interval_holds_the_mean_and_is_always_the_same() -> None:
    """The bootstrap is drawn from a fixed seed, and weighs rows by their tokens."""
    rows = [(10, -1.0)] * 20 + [(1000, -500.0)] * 20
    low, high = bootstrap(rows, RULES["loss"])
    assert low <= sum(d for _, d in rows) / sum(n for n, _ in rows) <= high
    assert (low, high) == bootstrap(rows, RULES["loss"])
    assert bootstrap([(10, 2.0)] * 9, RULES["loss"]) == (0.2, 0.2)
