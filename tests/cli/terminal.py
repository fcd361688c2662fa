"""Drives a command through a real pseudo-terminal and reads the screen as a person sees it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pexpect
import pyte

ESCAPE, CTRL_C, DOWN, ENTER = "\x1b", "\x03", "\x1b[B", "\r"


class Terminal:
    """A command on a screen of 80 columns and 24 rows (with history)."""

    def __init__(self, arguments: Sequence[str], cwd: Path, *, columns: int = 80, rows: int = 24) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.Stream(self._screen)
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
        environment.pop("NO_COLOR", None)
        self._child = pexpect.spawn(
            sys.executable, ["-m", "advisor", *arguments], cwd=str(cwd), env=environment,
            dimensions=(rows, columns), encoding="utf-8", timeout=60,
        )  # fmt: skip
        self._raw = ""

    def send(self, keys: str) -> None:
        """Press keys."""
        self._child.send(keys)

    def text(self) -> str:
        """Everything that was on the screen so far, scrolled-off lines included."""
        above = [
            "".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display])

    def raw(self) -> str:
        """The bytes that the command wrote."""
        return self._raw

    def wait_for(self, words: str, *, times: int = 1, seconds: float = 60) -> str:
        """Read until `words` were on the screen `times` times; return all its text."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read()
            if self.text().count(words) >= times:
                return self.text()
        raise AssertionError(f"{words!r} did not appear:\n{self.text()}")

    def wait_end(self, *, seconds: float = 60) -> int:
        """Read until the command ends and return its exit code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._read():
            pass
        self._child.close()
        assert self._child.exitstatus is not None, f"ended by signal {self._child.signalstatus}"
        return int(self._child.exitstatus)

    def close(self) -> None:
        """End the command if it still runs."""
        self._child.close(force=True)

    def _read(self) -> bool:
        try:
            piece = self._child.read_nonblocking(4096, timeout=0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self._raw += piece
        self._stream.feed(piece)
        if "\x1b[6n" in piece:
            self._child.send(f"\x1b[{self._screen.cursor.y + 1};{self._screen.cursor.x + 1}R")
        return True
