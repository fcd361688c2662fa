"""Draws what was measured on this computer: real steps, rates, errors of earlier predictions.

Goes in: records. Comes out: renderables. Never does: measure, compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from advisor.estimate.calibrate import ErrorSummary
from advisor.types import Evaluation, StepProbe, TaskScore
from advisor.ui.render import band_of_bytes, band_of_seconds, bullets, columns, pairs
from advisor.units import format_bytes, format_score, format_seconds


def step_probe(found: StepProbe) -> RenderableType:
    """Draw what a few real steps took, beside what was predicted."""
    rows: list[tuple[str, RenderableType]] = [("Fits", "yes" if found.fits else f"no: {found.reason}")]
    if found.measured_peak_bytes is not None:
        predicted = (
            f", predicted {band_of_bytes(found.predicted_peak_bytes)}" if found.predicted_peak_bytes else ""
        )
        longest = f"{format_bytes(found.measured_peak_bytes)} at {found.longest_tokens:,} tokens{predicted}"
        rows.append(("Memory, measured", longest))
    if found.whole_peak_bytes is not None:
        rows.append(("Memory, the whole", f"{band_of_bytes(found.whole_peak_bytes)}, by these steps"))
    if found.seconds is not None and found.seconds_per_step is not None:
        predicted = (
            f", predicted {band_of_seconds(found.predicted_seconds)}" if found.predicted_seconds else ""
        )
        rows += [
            ("A step, measured", f"{format_seconds(found.seconds_per_step)}, the mean of the typical ones"),
            ("Time, the whole", f"{_whole_seconds(found)} for {found.steps_planned:,} steps{predicted}"),
        ]
    rows += [("Try instead", f"--set {name}={value}") for name, value in found.smaller.items()]
    return Group(Rule(f"Real steps: {found.stage}", align="left", style="quiet"), pairs(rows))


def _whole_seconds(found: StepProbe) -> str:
    return band_of_seconds(found.whole_seconds) if found.whole_seconds else format_seconds(found.seconds or 0)


VERDICTS = {
    "better": ("good", "BETTER"),
    "no_different": ("warn", "NO DIFFERENT"),
    "worse": ("bad", "WORSE"),
    "forgot": ("bad", "FORGOT"),
    "not_learned": ("bad", "NOT LEARNED"),
    "unknown": ("quiet", "not judged"),
}
EXAMPLES_SHOWN = 3


def evaluation(found: Evaluation) -> RenderableType:
    """Draw what a training changed: the verdict, what it rests on, a few answers side by side."""
    style, word = VERDICTS[found.verdict]
    body: list[RenderableType] = [
        Rule("Before and after", align="left", style="quiet"),
        Text.assemble("Verdict: ", (word, style)),
        bullets(found.evidence),
    ]
    if found.examples:
        table = columns("Question", "Before", "After")
        for example in found.examples[:EXAMPLES_SHOWN]:
            table.add_row(*(Text(text) for text in example))
        body.append(table)
    return Group(*body)


def task_scores(found: Sequence[TaskScore]) -> RenderableType:
    """Draw what tasks of lm-evaluation-harness say before and after, with their standard errors."""
    table = columns("Task", "Before", "After")
    for one in found:
        scores = (format_score(one.before, one.before_error), format_score(one.after, one.after_error))
        table.add_row(Text(f"{one.task}, {one.metric}"), *scores)
    return Group(Rule("Tasks of lm-evaluation-harness, measured", align="left", style="quiet"), table)


def calibration(seen: Sequence[ErrorSummary]) -> RenderableType:
    """Draw how far predictions were from what was measured on this computer, by class."""
    if not seen:
        return Text("Nothing was trained here yet, so there is nothing to compare.")
    table = columns(
        "What", "Of", "Runs", "Median error", "Worst", "Above high",
        right=("Runs", "Median error", "Worst", "Above high"),
    )  # fmt: skip
    for one in seen:
        table.add_row(
            one.quantity, one.group, str(one.runs), f"{one.median_error:.1%}", f"{one.worst_error:+.1%}",
            str(one.above_high),
        )  # fmt: skip
    return table
