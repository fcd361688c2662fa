"""Writes report.html: one self-contained page that tells a run from wish to proof.

Goes in: a run folder (plan.json, report.json, events.jsonl, export/*.json). Comes out: report.html.
Never does: load anything from elsewhere, compute what the records do not say.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from advisor.run.events import read_events
from advisor.storage import read_record, write_atomic
from advisor.types import Band, Export, Plan, Record, RunReport, Verification
from advisor.units import format_bytes, format_count, format_seconds

WIDTH, HEIGHT, MARGIN = 640, 220, 36
"""Size of the loss chart in SVG units; the page scales it."""


class Curve(Record, frozen=True, kw_only=True):
    """One line of the chart: SVG points and the values at its ends."""

    points: str
    first: float
    last: float
    lowest: float
    highest: float
    steps: int


def write_page(folder: Path) -> Path | None:
    """Write report.html of a run folder; None when the run has no report yet, or no plan.

    Raises:
        InputError: a record of the folder cannot be decoded.
        DiskError: the page cannot be written.
    """
    report_file = folder / "report.json"
    if not report_file.is_file() or not (folder / "plan.json").is_file():
        return None
    plan = read_record(folder / "plan.json", Plan)
    report = read_record(report_file, RunReport)
    events = list(read_events(folder / "events.jsonl"))
    losses = [
        (int(e["step"]), float(e["loss"]))
        for e in events
        if e["event"] == "step" and e.get("loss") is not None
    ]
    exports = [read_record(path, Export) for path in sorted(folder.glob("export/export.json"))]
    proofs = [read_record(path, Verification) for path in sorted(folder.glob("export/*.verification.json"))]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("advisor.run", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        bytes=format_bytes, count=format_count, seconds=format_seconds, band=_band_of_bytes, value=_value
    )
    page = environment.get_template("report.html.j2").render(
        plan=plan,
        report=report,
        curve=curve_of(losses),
        exports=exports,
        proofs=proofs,
        chart={"width": WIDTH, "height": HEIGHT, "margin": MARGIN},
        name=folder.resolve().name,
    )
    target = folder / "report.html"
    write_atomic(target, page.encode())
    return target


def curve_of(losses: list[tuple[int, float]]) -> Curve | None:
    """Return the SVG line through (step, loss), or None for fewer than two points."""
    if len(losses) < 2:
        return None
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    low, high = min(values), max(values)
    span_x = (steps[-1] - steps[0]) or 1
    span_y = (high - low) or 1.0
    points = " ".join(
        f"{MARGIN + (step - steps[0]) / span_x * (WIDTH - 2 * MARGIN):.1f},"
        f"{HEIGHT - MARGIN - (loss - low) / span_y * (HEIGHT - 2 * MARGIN):.1f}"
        for step, loss in losses
    )
    return Curve(points=points, first=values[0], last=values[-1], lowest=low, highest=high, steps=steps[-1])


def _band_of_bytes(band: Band) -> str:
    return f"{format_bytes(band.expected)} ({format_bytes(band.low)} to {format_bytes(band.high)})"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
