"""The view of a running training: what a step says, its small plot, the lines at the foot of a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyte
import pytest

from advisor.ui.console import make_console
from advisor.ui.live import RunView, plot, step_note

START = {"event": "start", "stage": "2-dpo", "attempt": 1, "predicted_peak_bytes": {"high": 2.0 * 1024**3}}
STEP = {
    "event": "step", "step": 12, "total": 120, "loss": 1.2345, "margin": 0.5, "tokens_per_second": 12345.6,
    "seconds_remaining": 725.0, "memory_bytes": 1288490189,
}  # fmt: skip
EVENTS: list[dict[str, Any]] = [
    START, *[STEP | {"step": n, "loss": 3 - n / 10} for n in range(1, 12)], STEP,
    {"event": "heldout", "when": "before", "step": 0, "loss": 2.5},
    {"event": "heldout", "when": "at step 8", "step": 8, "loss": 1.5},
    {"event": "heldout", "when": "at step 12", "step": 12, "loss": 1.25},
    {"event": "decision", "message": f"Memory ran out; going on from the checkpoint of step 8{80 * '.'}"},
]  # fmt: skip


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


def _shown(
    events: list[dict[str, Any]], out: io.StringIO, patch: pytest.MonkeyPatch, columns: int = 80
) -> str:
    for name, value in (("COLUMNS", str(columns)), ("LINES", "24"), ("TERM", "xterm")):
        patch.setenv(name, value)
    patch.setattr("sys.stdout", out)
    with RunView(Path("/runs/one")) as view:
        for event in events:
            view.show(event)
    return out.getvalue()


def test_the_plot_shows_the_shape_of_the_loss() -> None:
    """High is high and low is low, however many steps there were; a flat line does not fail."""
    assert plot([], width=8) == plot([1.0], width=8) == ""
    falling = plot([8.0 - n / 100 for n in range(800)], width=8)
    assert falling == "█▇▆▅▄▃▂▁"
    assert plot([2.0, 2.0, 2.0], width=8) == "▁▁▁"
    assert len(plot([float(n) for n in range(5)], width=12)) == 5


def test_a_step_says_reward_and_margin_where_there_are_some() -> None:
    """Reinforcement and preference runs show what they are about."""
    assert step_note({"loss": 0.5, "reward": 0.25}) == "loss 0.500, reward 0.250"
    assert "margin 1.500" in step_note({"loss": 0.5, "margin": 1.5})
    assert step_note({}) == ""


def test_the_foot_of_a_terminal_shows_all_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage, step, curve, loss, speed, time left, held-out loss, memory against prediction, last decision:
    three lines of 80 columns, none of them wrapped."""
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(_shown(EVENTS, Terminal(), monkeypatch).replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display if line.strip()]
    step, measured, decided = lines[-3:]
    assert step.startswith("2-dpo")
    assert "12/120" in step
    assert "█" in step
    assert step.endswith("loss 1.234, margin 0.500, 12346 tok/s, 12 min left")
    assert measured == "1.2 GiB of at most 2 GiB predicted, held-out 2.500 → 1.250 at step 12"
    assert decided.startswith("decided: Memory ran out; going on from the checkpoint of step 8")
    assert decided.endswith("…")


def test_before_the_first_step_it_says_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes longer than a person waits for a sign of life; the first step takes its place."""
    data = {"event": "data", "rows": 3, "supervised_tokens": 9}
    assert "loading the libraries and the data ..." in _shown([START], Terminal(), monkeypatch)
    assert "loading the model ..." in _shown([START, data], Terminal(), monkeypatch)
    assert "loading" not in _shown([START, data, STEP], Terminal(), monkeypatch)


def test_without_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour, no bar, no cursor movement; long runs print a line now and then."""
    shown = _shown(EVENTS, io.StringIO(), monkeypatch, columns=40)
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert lines[0].startswith("Training 2-dpo in /runs/one.")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/120", "6/120", "12/120"]
    assert "loss 1.234, margin 0.500, 12346 tok/s, 12 min left, 1.2 GiB of at most 2 GiB predicted" in shown


def test_what_stands_in_data_does_not_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes in a name, a message or a table are not passed on; what can be read of them stays."""
    evil = "row\x1b[31m\x07\x9b2J\u202e one\r"
    shown = _shown([{"event": "warning", "message": evil}], io.StringIO(), monkeypatch)
    assert shown == "row[31m2J one\n"
    monkeypatch.undo()
    make_console(stderr=True).print(evil)
    assert capsys.readouterr().err == "row[31m2J one\n"
