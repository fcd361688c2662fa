"""The verdict on a training: what the figures show beyond chance, and never more than that."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest

from advisor.knowledge import load
from advisor.run.changes import bootstrap, paired, repetition
from advisor.run.verdict import judge
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
        (measured(loss=1.5, gain=0.06, seed=1, noise=0.001, right=KNOWN // 2), "worse"),
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
    assert {"held-out loss", "held-out loss of d0", "held-out loss of d1"} <= set(names)
    assert "general questions, colours, right" in names


def of_two(
    new: float, old: float, *, swapped: float | None = None, right: int | None = 0, seed: int = 0
) -> Measured:
    """A measurement of a new task and an old one, with short answers to the new; `right` None: none of them
    can be checked."""
    parts = [
        measured(loss=new, gain=swapped, seed=seed, dataset="new"),
        measured(loss=old, seed=seed, dataset="old"),
    ]
    asked = tuple(
        Asked(
            prompt=f"{n}?",
            answer=str(n),
            tokens=1,
            ended=True,
            dataset="new",
            right=None if right is None else n < right,
        )
        for n in range(9)
    )
    return msgspec.structs.replace(parts[0], rows=parts[0].rows + parts[1].rows, samples=asked)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (of_two(1.0, 0.5, swapped=0.5, right=None, seed=1), "better"),
        (of_two(1.0, 0.1, swapped=0.5, right=None, seed=1), "better"),
        (of_two(2.0, 0.1, swapped=0.5, right=None, seed=1), "not_learned"),
        (of_two(1.0, 0.5, swapped=0.0, right=None, seed=1), "not_learned"),
        (of_two(1.0, 0.5, swapped=0.0, right=9, seed=1), "better"),
        (of_two(1.0, 0.5, swapped=0.5, right=1, seed=1), "not_learned"),
        (of_two(3.0, 0.1, swapped=0.5, right=9, seed=1), "worse"),
    ],
)
def test_beside_an_earlier_task_the_new_one_must_be_learned(after: Measured, expected: str) -> None:
    """The old task's loss counts neither for nor against it; a lower loss is not enough where the answers
    have nothing to do with the question and none is right."""
    before = of_two(2.0, 0.5)
    found = judge(before, after, {}, RULES, earlier={"old"})
    assert found.verdict == expected
    assert bool(found.not_learned) is (expected in ("not_learned", "worse"))
    assert not judge(before, after, {}, RULES).not_learned


def test_each_task_is_told_by_its_answers_too() -> None:
    """Where answers can be checked, the share that is right stands in the evidence, before and after."""
    found = judge(of_two(2.0, 0.5), of_two(1.0, 0.5, right=9, seed=1), {}, RULES)
    assert "Held-out questions of new answered right: 0% before, 100% after." in found.evidence
    assert "held-out loss of old" in {change.name for change in found.changes}


def test_perplexity_is_told_with_its_interval() -> None:
    """It is the exponential of the loss, and its interval is of the difference of perplexities."""
    found = {change.name: change for change in verdict(BEFORE, measured(loss=1.5, seed=1)).changes}
    loss, perplexity = found["held-out loss"], found["held-out perplexity"]
    assert perplexity.before == pytest.approx(math.exp(loss.before))
    assert perplexity.low is not None
    assert perplexity.high is not None
    assert perplexity.low < perplexity.after - perplexity.before < perplexity.high < 0
    assert "held-out perplexity" not in {one.name for one in verdict(measured(loss=30), measured()).changes}


def test_a_later_stage_answers_for_what_an_earlier_one_forgot() -> None:
    """The general questions are compared with the model before the first stage, the rest with this stage."""
    spoilt = measured(right=10, seed=1)
    after = measured(loss=1.0, right=10, seed=2)
    assert verdict(spoilt, after).verdict == "better"
    found = judge(spoilt, after, {}, RULES, start=BEFORE)
    assert found.verdict == "forgot"
    assert any("since before the first stage: 100% before, 25% after" in text for text in found.evidence)


def test_checked_answers_and_copied_ones_are_told_apart() -> None:
    """Right is what could be checked; a long answer can only be the one of the data or another."""
    short = Asked(prompt="2+2?", answer="4", tokens=1, ended=True, right=True)
    long = Asked(prompt="Why?", answer="So.", tokens=2, ended=True, exact=False)
    wrong, copied = msgspec.structs.replace(short, right=False), msgspec.structs.replace(long, exact=True)
    before, after = (Measured(samples=samples) for samples in ((wrong, long), (short, copied)))
    found = {change.name: change.after for change in verdict(before, after).changes}
    assert found["held-out questions answered right"] == 1
    assert found["share of held-out answers word for word as in the data"] == 1


def test_a_question_that_is_asked_twice_is_paired_in_order() -> None:
    """The last message of two conversations may be the same; each answer is compared with its own."""
    asked = [Asked(prompt="Yes.", answer=text, tokens=1, ended=True) for text in ("a", "b")]
    assert [(one.answer, two.answer) for one, two in paired(asked, asked)] == [("a", "a"), ("b", "b")]
    assert len(paired(asked, asked[:1])) == 1


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({}, {"accuracy": 0.9, "pairs": 40, "preferred": 0.5}, "better"),
        ({}, {"accuracy": 0.1, "pairs": 40, "preferred": 0.5}, "worse"),
        ({}, {"accuracy": 0.6, "pairs": 10, "preferred": 0.5}, "no_different"),
        ({"accuracy": 0.4}, {"accuracy": 0.9, "pairs": 40}, "better"),
        ({"accuracy": 0.2}, {"accuracy": 0.9, "texts": 40, "most_frequent_class": 0.3}, "better"),
        ({"accuracy": 0.2}, {"accuracy": 0.9, "texts": 40, "most_frequent_class": 0.9}, "no_different"),
        ({}, {"margin": 1.0, "margin_error": 0.1}, "better"),
        ({}, {"margin": 0.1, "margin_error": 0.1}, "no_different"),
        ({"reward": 0.2, "reward_error": 0.02}, {"reward": 0.5, "reward_error": 0.02}, "better"),
        ({"reward": 0.2, "reward_error": 0.2}, {"reward": 0.3, "reward_error": 0.2}, "no_different"),
    ],
)
def test_pairs_marks_and_rewards_are_judged_by_their_own_figures(
    then: dict[str, float], now: dict[str, float], expected: str
) -> None:
    """The share of pairs or classes, the margin of marks, the reward, each with its uncertainty."""
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

    def mean(drawn: tuple[float, ...]) -> float:
        return drawn[1] / drawn[0]

    low, high = bootstrap(rows, mean, RULES["loss"])
    assert low <= sum(d for _, d in rows) / sum(n for n, _ in rows) <= high
    assert (low, high) == bootstrap(rows, mean, RULES["loss"])
    assert bootstrap([(10, 2.0)] * 9, mean, RULES["loss"]) == (0.2, 0.2)
