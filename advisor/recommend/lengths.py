"""How long is a training sequence, and how short may it be made before the data suffers?

Goes in: the datasets of a stage and the rules of kb/rules/data.toml. Comes out: Lengths. Never does: measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from advisor.types import DatasetProfile, Record


class Lengths(Record, frozen=True, kw_only=True):
    """Token lengths of the rows of one stage."""

    mean: float
    target: int
    """Length that holds nearly every row."""
    least: int
    """Below this too many rows would be cut."""
    bare: int
    """What the usual row needs: the last resort before another model must be taken."""
    longest: int | None
    """The longest row, where it is known."""
    said: str
    """What the figures were taken from, in words."""


def lengths_of(datasets: Iterable[DatasetProfile], rules: Mapping[str, Any]) -> Lengths:
    """Derive the sequence length from measured, declared or assumed row lengths.

    Args:
        datasets: those of one stage.
        rules: table [lengths] of kb/rules/data.toml.
    """
    each = [_of(dataset, rules) for dataset in datasets] or [_of(None, rules)]
    longest = [one.longest for one in each if one.longest is not None]
    widest = max(each, key=lambda one: one.target)
    return Lengths(
        mean=sum(one.mean for one in each) / len(each), target=widest.target,
        least=max(one.least for one in each), bare=max(one.bare for one in each),
        longest=max(longest, default=None), said=widest.said,
    )  # fmt: skip


def _of(dataset: DatasetProfile | None, rules: Mapping[str, Any]) -> Lengths:
    mean = (dataset.mean_tokens if dataset else None) or None
    p95 = dataset.p95_tokens if dataset else None
    longest = dataset.max_tokens if dataset else None
    if longest:
        usual = p95 or longest
        target = longest if longest <= rules["outlier_over_p95"] * usual else usual * rules["margin_outliers"]
        said = f"the longest row has {longest:,} tokens, 95% of the rows have at most {usual:,}"
        return _lengths(mean or usual / 2, target, usual, longest, said, rules)
    if p95:
        said = f"95% of the rows have at most {p95:,} tokens"
        return _lengths(
            mean or p95 / rules["p95_over_mean"], p95 * rules["margin_p95"], p95, None, said, rules
        )
    if mean:
        times = rules["p95_over_mean"]
        said = (
            f"rows have {mean:,.0f} tokens in the mean, so nearly all should have at most {times} times that"
        )
        return _lengths(
            mean, mean * rules["p95_over_mean"], mean * rules["minimum_over_mean"], None, said, rules
        )
    usual_mean = rules["default_mean"]
    said = f"lengths are not known; rows of {usual_mean} tokens in the mean are assumed"
    return _lengths(usual_mean, usual_mean * rules["p95_over_mean"], usual_mean, None, said, rules)


def _lengths(
    mean: float, target: float, least: float, longest: int | None, said: str, rules: Mapping[str, Any]
) -> Lengths:
    bare = min(least, max(mean * rules["minimum_over_mean"], least * rules["bare_over_p95"]))
    return Lengths(
        mean=float(mean), target=round_up(target, rules), least=round_up(least, rules),
        bare=round_up(bare, rules), longest=longest, said=said,
    )  # fmt: skip


def round_up(tokens: float, rules: Mapping[str, Any]) -> int:
    """Round up to a whole step, never below the smallest length."""
    step = int(rules["step"])
    return max(int(rules["smallest"]), math.ceil(tokens / step) * step)
