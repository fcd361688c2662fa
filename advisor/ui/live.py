"""Shows a run while it trains: a live view on a terminal, plain lines elsewhere.

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
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from advisor.run.policy import Action
from advisor.ui.console import make_console
from advisor.units import format_bytes, format_count, format_seconds

BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH, PLOT_WIDTH, WIDE = 20, 8, 110
PHASES = {
    "start": "loading the libraries and the data",
    "data": "loading the model",
    "model": "measuring the model before it is trained",
}
"""Event -> what is done after it, until the first step."""
PLAIN_LINES = 20
"""Without a terminal, a run prints about this many step lines."""


class RunView:
    """Context manager that draws events; `show` takes one event as it is in events.jsonl."""

    def __init__(self, folder: Path, *, watching: bool = False) -> None:
        self._console = make_console()
        self._folder = folder
        self._watching = watching
        self._drawn = self._console.is_terminal
        self._start: dict[str, Any] = {}
        self._step: dict[str, Any] = {}
        self._losses: dict[int, float] = {}
        self._heldout: dict[str, float] = {}
        self._decision = ""
        self._waiting = Spinner("line", style="quiet")
        self._live = Live(console=self._console, get_renderable=self._view)

    def __enter__(self) -> RunView:
        if self._drawn:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Draw one event; unknown ones are ignored, since programs may write more than a person needs."""
        name = event["event"]
        if name in PHASES:
            self._waiting.update(text=Text(f"{PHASES[name]} ...", style="quiet"))
        if name == "start":
            self._begin(event)
        elif name == "step":
            self._train(event)
        else:
            if name == "heldout" and event.get("loss") is not None:
                self._heldout[str(event.get("when", ""))] = event["loss"]
            self._decision = str(event.get("message", "")) if name == "decision" else self._decision
            text = describe(event)
            if text:
                self._console.print(text)

    def ask(self, action: Action) -> bool:
        """Ask whether a change that needs consent may be made; without a terminal, it may not."""
        if not (self._drawn and sys.stdin.isatty()):
            return False
        self._live.stop()
        self._console.print(action.reason)
        allowed = bool(questionary.confirm("Do that and go on?", default=False).ask())
        self._live.start()
        return allowed

    def _begin(self, event: dict[str, Any]) -> None:
        if event.get("stage") != self._start.get("stage"):
            self._losses, self._heldout, self._step = {}, {}, {}
        self._start = event
        what = "Watching" if self._watching else "Training"
        keys = "ends the watching, not the run" if self._watching else "saves a checkpoint and stops"
        attempt = f", attempt {event['attempt']}" if event.get("attempt", 1) > 1 else ""
        self._console.print(f"{what} {event.get('stage', '')}{attempt} in {self._folder}. Ctrl-C {keys}.")

    def _train(self, event: dict[str, Any]) -> None:
        self._step = event
        step, total = int(event["step"]), int(event["total"])
        if event.get("loss") is not None:
            self._losses[step] = event["loss"]
        if not self._drawn and (step % max(1, total // PLAIN_LINES) == 0 or step in (1, total)):
            memory = memory_note(event, self._start)
            words = ", ".join(filter(None, (step_note(event), memory)))
            self._console.print(f"step {step}/{total} {words}")

    def _view(self) -> Group:
        """Return the lines at the foot of the screen: the step, what was measured, the last decision."""
        if not self._step:
            return Group(*([self._waiting] if self._start else []))
        step, total = int(self._step["step"]), int(self._step["total"])
        # A run that went back draws its curve anew from there.
        losses = [loss for at, loss in self._losses.items() if at <= step]
        wide = self._console.width >= WIDE
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(str(self._start.get("stage", "")), style="key"),
            *([ProgressBar(total=total, completed=step, width=BAR_WIDTH)] if wide else []),
            f"{step}/{total}",
            plot(losses, width=PLOT_WIDTH * 2 if wide else PLOT_WIDTH),
            Text(step_note(self._step), no_wrap=True, overflow="ellipsis"),
        )
        measured = ", ".join(
            filter(None, (memory_note(self._step, self._start), heldout_note(self._heldout)))
        )
        more = [measured, f"decided: {self._decision}" if self._decision else ""]
        return Group(line, *(Text(one, no_wrap=True, overflow="ellipsis") for one in more if one))


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
    """Return what a step event says of the training, for example `loss 1.23, 410 tok/s, 2 min left`."""
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
    return ", ".join(words)


def memory_note(step: dict[str, Any], start: dict[str, Any]) -> str:
    """Return the measured peak and what the plan predicts: `1.2 GiB of at most 2 GiB predicted`."""
    if not step.get("memory_bytes"):
        return ""
    predicted = start.get("predicted_peak_bytes")
    most = f" of at most {format_bytes(round(predicted['high']))} predicted" if predicted else ""
    return f"{format_bytes(step['memory_bytes'])}{most}"


def heldout_note(found: dict[str, float]) -> str:
    """Return the first and the last loss on rows that are not trained on, by when they were measured."""
    if not found:
        return ""
    pairs = list(found.items())
    (first, loss), (last, now) = pairs[0], pairs[-1]
    return f"held-out {loss:.3f} {first}" if first == last else f"held-out {loss:.3f} → {now:.3f} {last}"


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
    said = [f"Measured: {', '.join(words)}; the whole takes about {format_seconds(event['seconds'])}"]
    if (memory := event.get("whole_peak_bytes")) and (seconds := event.get("whole_seconds")):
        said.append(f" ({format_seconds(seconds['low'])} to {format_seconds(seconds['high'])})")
        said.append(f" and at most {format_bytes(round(memory['high']))}")
    return f"{''.join(said)}."


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
