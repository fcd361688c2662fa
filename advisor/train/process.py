"""The training process among other processes: how it is asked to stop, how it ends with its supervisor.

Goes in: signals. Comes out: a flag that the training loop reads; the process's peak memory. Never does: stop
in the middle of a step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType, TracebackType

from advisor.run.events import EventWriter

MESSAGE_CHARACTERS = 2000
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


class StopRequest:
    """Becomes true when the process is asked to stop; the training loop saves and ends after its step."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        """Listen to SIGINT and SIGTERM."""
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the supervisor ends (Linux); at once when it already has.

    The supervisor names itself in FTADVISOR_PARENT; without it the program was started by hand and goes on
    alone."""
    parent = os.environ.get("FTADVISOR_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(130)


def report_crashes(events: EventWriter) -> None:
    """Write an `error` event for an exception that nobody expected, before Python prints it into the log."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        events.write("error", kind=kind.__name__, message=str(error)[:MESSAGE_CHARACTERS])
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
