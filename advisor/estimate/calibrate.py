"""How far were predictions from what was measured on this computer?

Goes in: observations of earlier runs. Comes out: their errors by class. Never does: read files; change an
estimate.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from advisor.types import Band, Observation, Record


class ErrorSummary(Record, frozen=True, kw_only=True):
    """Errors of one quantity in one class; an error is predicted over measured, less one."""

    quantity: str
    """memory; time; time by the first steps: what the probe said against what the run took; time a token,
    of the steps alone."""
    group: str
    runs: int
    median_error: float
    """Of the absolute errors."""
    worst_error: float
    above_high: int
    """Runs that took more than the prediction's upper bound."""


def summarise(seen: Iterable[Observation]) -> tuple[ErrorSummary, ...]:
    """Return the errors of memory and time by device, tuner and objective.

    Args:
        seen: observations; only finished runs and probes count, and only where both figures are known.
    """
    errors: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for one in seen:
        group = f"{one.tuner} {one.objective} on {one.device}"
        for quantity, band, measured in _pairs(one):
            if band is not None and measured:
                found = (band.expected / measured - 1, measured > band.high)
                errors.setdefault((quantity, group), []).append(found)
    return tuple(_summary(quantity, group, found) for (quantity, group), found in sorted(errors.items()))


def _pairs(one: Observation) -> tuple[tuple[str, Band | None, float | None], ...]:
    if one.kind == "probe":
        return (("memory at the longest rows", one.predicted_peak_bytes, one.measured_peak_bytes),)
    if one.kind != "run":
        return ()
    said, rate = one.probed_seconds, one.measured_tokens_per_second
    probed = Band(low=said, expected=said, high=said) if said else None
    return (
        ("memory", one.predicted_peak_bytes, one.measured_peak_bytes),
        ("time", one.predicted_seconds, one.measured_seconds),
        ("time by the first steps", probed, one.measured_seconds),
        ("time a token", _inverse(one.predicted_tokens_per_second), 1 / rate if rate else None),
    )


def _inverse(rate: Band | None) -> Band | None:
    return Band(low=1 / rate.high, expected=1 / rate.expected, high=1 / rate.low) if rate else None


def _summary(quantity: str, group: str, found: list[tuple[float, bool]]) -> ErrorSummary:
    errors = [error for error, _ in found]
    return ErrorSummary(
        quantity=quantity, group=group, runs=len(found),
        median_error=statistics.median(abs(error) for error in errors), worst_error=max(errors, key=abs),
        above_high=sum(above for _, above in found),
    )  # fmt: skip
