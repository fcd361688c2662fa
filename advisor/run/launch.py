"""Starts a training program in one process, or one for each device, and passes signals on.

Goes in: a run folder and a recipe file. Comes out: the running processes. Never does: import torch; let the
program reach the network, or touch the terminal."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType

import advisor
from advisor.errors import DiskError, MissingPackageError, RefusedError
from advisor.probe.host import cpu_cores
from advisor.resources import recipes_dir
from advisor.run.events import stage_of
from advisor.types import Recipe

LOG = "train.log"
NEEDED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "USE_HUB_KERNELS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # Threads that wait must not spin: on a machine that does other work too, a step took 8 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
}
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""How torch finds the other processes of a training; also set by queues for their own ends."""
GRACE_SECONDS = 10.0
"""So long the others may take to end by themselves once one has failed."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def require_packages(recipe: Recipe) -> None:
    """Refuse to start without what training needs, before the slow imports.

    Raises:
        MissingPackageError: names the first missing package and its extra.
        RefusedError: what the curves are to be written with is missing.
    """
    eight_bit = "8bit" in str(recipe.settings.get("optimizer", ""))
    extra = ("bitsandbytes",) if recipe.tuner == "qlora" or eight_bit else ()
    require_installed((*NEEDED, *extra))
    place = str(recipe.settings.get("report_to", "none"))
    if place != "none" and importlib.util.find_spec(place) is None:
        raise RefusedError(
            f"The curves are to be written to {place}, which is not installed.",
            f"Install it (pip install {place}), or plan with --set report_to=none.",
        )
    if recipe.parallel is not None and recipe.parallel.kind == "zero3":
        require_installed(("deepspeed",), extra="deepspeed")


def require_installed(names: tuple[str, ...], *, extra: str = "train") -> None:
    """Refuse where a package of an extra is missing, without importing any.

    Raises:
        MissingPackageError: names the first missing package and its extra.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(name, extra)


def start_program(
    folder: Path,
    recipe_file: Path,
    recipe: Recipe,
    *,
    lock: int | None,
    variables: Mapping[str, str] | None = None,
) -> Workers:
    """Start the recipe's program, each process in a group of its own, with its output in train.log.

    Args:
        folder: run folder, the program's working folder.
        recipe_file: inside the folder.
        recipe: says which program, and how many processes.
        lock: descriptor of the folder's lock, which the program keeps open as long as it lives; None for a
            folder that nobody else uses.
        variables: more of the environment.

    Raises:
        DiskError: train.log cannot be written.
    """
    script = recipes_dir() / recipe.program / "train.py"
    # Below the run folder, which is the program's working folder and may be moved.
    curves = {"TENSORBOARD_LOGGING_DIR": f"tensorboard/{stage_of(recipe_file.name, recipe.objective)}"}
    try:
        log = (folder / LOG).open("ab")
    except OSError as problem:
        raise DiskError(
            f"Cannot write {folder / LOG}: {problem.strerror}.", "Check the permissions of the folder."
        ) from problem
    with log:
        return Workers(
            [
                subprocess.Popen(
                    [sys.executable, "-P", str(script), recipe_file.name],
                    cwd=folder,
                    env={**values, **curves, **(variables or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    pass_fds=() if lock is None else (lock,),
                )
                for values in _environments(recipe.parallel.processes if recipe.parallel else None)
            ]
        )


def _environments(processes: int | None) -> list[dict[str, str]]:
    """Return the environment of each process; None: one that knows of no others."""
    values = {**os.environ, **QUIET_AND_OFFLINE, "FTADVISOR_PARENT": str(os.getpid())}
    # More threads than free cores cost far more than they give.
    cores = cpu_cores(Path("/proc"), Path("/sys"))
    values.setdefault("OMP_NUM_THREADS", str(max(1, cores // (processes or 1))))
    root = Path(advisor.__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), values.get("PYTHONPATH", "")]))
    if processes is None:
        # Several visible cards without a distributed launcher would be refused by the trainer.
        values.setdefault("CUDA_VISIBLE_DEVICES", "0")
        return [{name: value for name, value in values.items() if name not in RENDEZVOUS}]
    port = str(_free_port())
    return [
        {
            **values, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        for number in range(processes)
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Workers:
    """The processes of one training: they end together, and the first that fails ends the others."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        self._failed: int | None = None
        self._failed_at = 0.0

    @property
    def pid(self) -> int:
        """Return the process id of the one that writes the events."""
        return self._processes[0].pid

    def poll(self) -> int | None:
        """Return how the training ended: 0, or the status of the first that failed; None while it runs."""
        statuses = [process.poll() for process in self._processes]
        if self._failed is None:
            self._failed = next((status for status in statuses if status), None)
            self._failed_at = time.monotonic()
        if None not in statuses:
            return self._failed or 0
        if self._failed is not None and time.monotonic() - self._failed_at > GRACE_SECONDS:
            self.kill()  # they would wait for ever for the one that is gone
        return None

    def ask_to_stop(self) -> None:
        """Ask all to save and end after the step."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all and whatever they started, where they still live."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of raising, so that the trainer can save first."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> Interrupts:
        # Python allows signal handlers in the main thread only; elsewhere the caller's own handling stays.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)  # type: ignore[assignment]  # ours only
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
