"""Real training processes without the cost of starting them: forked from one that has the libraries loaded.

Goes in: run folders. Comes out: processes with the shipped programs and the shipped supervisor, to be killed
at will. Never does: train in this process. For programs of one thread; a benchmark is one, pytest is not.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

import advisor.run.launch
from advisor.run.lock import is_locked
from training import run


def load_libraries() -> None:
    """Load once what every program would load."""
    import torch  # noqa: F401
    import trl  # noqa: F401

    import advisor.train.reinforcement
    import advisor.train.trainer  # noqa: F401


def forked(work: Callable[[], int], log: Path) -> int:
    """Do something in a fork that writes to a log and ends with the status that it returns; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing may leave the fork but its status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class Forked(subprocess.Popen[bytes]):
    """Stands in for subprocess.Popen: the program goes on in a fork."""

    def __init__(self, command: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, **_: Any) -> None:
        self.args, self.stdin, self.stdout, self.stderr = command, None, None, None
        self._waitpid_lock, self.returncode, self._child_created = threading.Lock(), None, True

        def work() -> int:
            os.setpgid(0, 0)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(cwd)
            sys.argv = command[-2:]
            runpy.run_path(command[-2], run_name="__main__")
            return 0

        self.pid = forked(work, Path(stdout.name))


def fork_programs() -> None:
    """Make the supervisor of this process fork its programs instead of starting them."""
    advisor.run.launch.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )


def supervise(folder: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run a folder as `ftadvisor run --resume` does, in a forked process, and return its id.

    Args:
        folder: the run folder.
        before: done first, in that process.
    """

    def work() -> int:
        before()
        fork_programs()
        return 0 if run(folder, resume=True).status == "done" else 1

    return forked(work, folder / "train.log")


def ended(pid: int, *, within: float | None) -> int | None:
    """Wait for a process and return its status, None when it still runs after `within` seconds."""
    deadline = None if within is None else time.monotonic() + within
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill_supervisor(folder: Path, pid: int, *, program_too: bool) -> None:
    """Kill a supervisor, with its program as when the machine goes off; wait until the program has ended."""
    children = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    for child in children if program_too else ():
        child.kill()
    ended(pid, within=None)
    unlocked(folder)


def unlocked(folder: Path) -> None:
    """Wait until no program of a killed supervisor works in a folder any more."""
    while is_locked(folder):
        time.sleep(0.01)
