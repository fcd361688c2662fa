"""Shows a run while it trains: a live line on a terminal, plain lines elsewhere.

Goes in: the events of a run, as they come. Comes out: text. Never does: decide.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import questionary
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from advisor.run.policy import Action
from advisor.ui.console import make_console
from advisor.units import format_bytes, format_count, format_seconds

BARS = "▁▂▃▄▅▆▇█"
PLOT_WIDTH = 8
PLAIN_LINES = 20
"""Without a terminal, a run prints about this many step lines."""


class RunView:
    """Context manager that draws events; `show` takes one event as it is in events.jsonl."""

    def __init__(self, folder: Path) -> None:
        self._console = make_console()
        self._folder = folder
        self._progress = Progress(
            TextColumn("{task.description}", style="key"),
            BarColumn(bar_width=5),
            TextColumn("{task.fields[plot]}"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            auto_refresh=self._console.is_terminal,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._losses: list[float] = []

    def __enter__(self) -> RunView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Draw one event; unknown ones are ignored, since programs may write more than a person needs."""
        if event["event"] == "start":
            self._console.print(f"Training in {self._folder}. Ctrl-C saves a checkpoint and stops.")
        elif event["event"] == "step":
            self._step(event)
        else:
            text = describe(event)
            if text:
                self._console.print(text, markup=False)

    def ask(self, action: Action) -> bool:
        """Ask whether a change that needs consent may be made; without a terminal, it may not."""
        if not (self._console.is_terminal and sys.stdin.isatty()):
            return False
        self._progress.stop()
        self._console.print(action.reason, markup=False)
        allowed = bool(questionary.confirm("Do that and go on?", default=False).ask())
        self._progress.start()
        return allowed

    def _step(self, event: dict[str, Any]) -> None:
        step, total = int(event["step"]), int(event["total"])
        note = step_note(event)
        if not self._console.is_terminal:
            every = max(1, total // PLAIN_LINES)
            if step % every == 0 or step in (1, total):
                self._console.print(f"step {step}/{total} {note}", markup=False)
            return
        if self._task is None:
            self._task = self._progress.add_task("train", total=total, note="", plot="")
        if event.get("loss") is not None:
            self._losses.append(event["loss"])
        self._progress.update(
            self._task, completed=step, total=total, note=note, plot=plot(self._losses, width=PLOT_WIDTH)
        )


def plot(values: Sequence[float], *, width: int) -> str:
    """Return values as a row of bars, each the mean of its share of them; empty for fewer than two."""
    if len(values) < 2:
        return ""
    size = min(width, len(values))
    edges = [len(values) * n // size for n in range(size + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def step_note(event: dict[str, Any]) -> str:
    """Return what a step event says, for example `loss 1.23, 410 tok/s, 2 min left, 1.2 GiB`."""
    words = []
    if event.get("loss") is not None:
        words.append(f"loss {event['loss']:.3f}")
    for name in ("reward", "margin"):
        if event.get(name) is not None:
            words.append(f"{name} {event[name]:.3f}")
    if event.get("tokens_per_second"):
        words.append(f"{event['tokens_per_second']:.0f} tok/s")
    if event.get("seconds_remaining") is not None:
        words.append(f"{format_seconds(event['seconds_remaining'])} left")
    if event.get("memory_bytes"):
        words.append(format_bytes(event["memory_bytes"]))
    return ", ".join(words)


def describe(event: dict[str, Any]) -> str:
    """Return one line for an event that a person should see, else an empty text."""
    name = event["event"]
    if name == "data":
        return _data(event)
    if name == "heldout" and event.get("loss") is not None:
        return f"Held-out loss {event.get('when', '')}: {event['loss']:.3f}"
    if name == "checkpoint":
        return f"Checkpoint at step {event.get('step')}."
    if name == "probe":
        return _probe(event)
    if name in ("note", "warning", "decision"):
        return str(event.get("message", ""))
    return ""


def _probe(event: dict[str, Any]) -> str:
    if not event.get("fits"):
        return f"It does not fit: {event.get('reason', '')}."
    words = [f"{format_bytes(event['measured_peak_bytes'])} at the longest rows"]
    if predicted := event.get("predicted_peak_bytes"):
        words[0] += f" (at most {format_bytes(round(predicted['high']))} predicted)"
    words.append(f"{format_seconds(event['seconds_per_step'])} a step")
    return f"Measured: {', '.join(words)}; the whole takes about {format_seconds(event['seconds'])}."


def _data(event: dict[str, Any]) -> str:
    rows, tokens = event.get("rows", 0), event.get("supervised_tokens") or 0
    if not tokens:
        return f"{rows} rows to train on."
    where = (
        "the whole text"
        if event.get("trained_on") == "all" or event.get("stage") == "cpt"
        else "answers only"
    )
    return f"Loss on {where}: {format_count(tokens)} trained tokens in {rows} rows."
