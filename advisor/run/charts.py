"""Which curves does a training have, and how are they drawn? From its events to lines in a unit square.

Goes in: the events of one stage. Comes out: one Chart for each quantity, with ticks, and a sentence for each
line for whoever cannot see it. Never does: I/O; smooth; draw what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from advisor.types import Record

Point = tuple[int, float]
QUANTITIES = {
    "loss": "Loss",
    "margin": "Reward margin of the better answer",
    "accuracy": "Share ranked right",
    "reward": "Reward",
    "kl": "KL divergence from the model before",
}
"""Field of a step or held-out event -> what it is called."""
MOST_POINTS = 400
"""A longer line is drawn as the means of so many parts."""
INTERVALS = 4


class Line(Record, frozen=True, kw_only=True):
    """One line: SVG paths in a square of 100 by 100 units, which the page stretches."""

    name: str
    path: str
    dots: str
    """A path of points without length, round when stroked; empty where the points are too many."""


class Tick(Record, frozen=True, kw_only=True):
    """A mark on an axis: its place in per cent from the left or the top, its number."""

    place: float
    text: str


class Chart(Record, frozen=True, kw_only=True):
    """One quantity over the steps."""

    title: str
    lines: tuple[Line, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]
    told: tuple[str, ...]
    """A sentence for each line."""


def charts_of(events: Iterable[dict[str, Any]]) -> tuple[Chart, ...]:
    """Return the charts of one stage; a step that was trained twice, after going back, counts once."""
    seen = list(events)
    steps = [event for event in seen if event["event"] == "step"]
    heldout = [event for event in seen if event["event"] == "heldout"]
    found = []
    for name, title in QUANTITIES.items():
        lines = {"Training": _points(steps, name), "Held out": _points(heldout, name)}
        drawn = {line: points for line, points in lines.items() if len(points) > 1}
        if drawn:
            found.append(_chart(title, drawn))
    return tuple(found)


def _points(events: Sequence[dict[str, Any]], name: str) -> list[Point]:
    found = {int(event["step"]): float(event[name]) for event in events if event.get(name) is not None}
    return sorted(found.items())


def _chart(title: str, lines: dict[str, list[Point]]) -> Chart:
    steps = [step for points in lines.values() for step, _ in points]
    shown = {name: thinned(points) for name, points in lines.items()}
    values = [value for points in shown.values() for _, value in points]
    marks = ticks(min(values), max(values))
    last = max(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        return 100 * step / last, 100 - 100 * (value - marks[0]) / (marks[-1] - marks[0])

    return Chart(
        title=title,
        lines=tuple(_line(name, [place(*point) for point in points]) for name, points in shown.items()),
        steps=tuple(Tick(place=100 * step / last, text=f"{step:g}") for step in _step_ticks(last)),
        values=tuple(Tick(place=place(0, mark)[1], text=f"{mark:g}") for mark in marks),
        told=tuple(_told(name, points) for name, points in lines.items()),
    )


def _line(name: str, places: list[tuple[float, float]]) -> Line:
    path = "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    dots = "".join(f"M{x:.2f} {y:.2f}h0" for x, y in places) if len(places) <= MOST_POINTS // 10 else ""
    return Line(name=name, path=path, dots=dots)


def thinned(points: list[Point]) -> list[tuple[float, float]]:
    """Return at most MOST_POINTS points, each the mean of as many."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / INTERVALS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * INTERVALS >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, since 3 * 0.1 is not 0.3.
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _step_ticks(last: int) -> list[float]:
    """Return round steps, and the last one in place of those beside it."""
    return [mark for mark in ticks(0, last) if mark <= 0.88 * last and mark == int(mark)] + [last]


def _told(name: str, points: list[Point]) -> str:
    (first, begin), (last, end) = points[0], points[-1]
    step, least = min(points, key=lambda point: point[1])
    most_step, most = max(points, key=lambda point: point[1])
    return (
        f"{name}: {begin:.4g} at step {first}, {end:.4g} at step {last}; "
        f"lowest {least:.4g} at step {step}, highest {most:.4g} at step {most_step}."
    )
