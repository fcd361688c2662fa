"""Starts a training program in a process of its own and passes signals on to it.

Goes in: a run folder and a recipe file. Comes out: the running process. Never does: import torch; let the
program reach the network, or touch the terminal."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType

import advisor
from advisor.errors import DiskError, MissingPackageError
from advisor.probe.host import cpu_cores
from advisor.resources import recipes_dir
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
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def require_packages(recipe: Recipe) -> None:
    """Refuse to start without what training needs, before the slow imports.

    Raises:
        MissingPackageError: names the first missing package and its extra.
    """
    eight_bit = "8bit" in str(recipe.settings.get("optimizer", ""))
    extra = ("bitsandbytes",) if recipe.tuner == "qlora" or eight_bit else ()
    require_installed((*NEEDED, *extra))


def require_installed(names: tuple[str, ...]) -> None:
    """Refuse where a package of the extra `train` is missing, without importing any.

    Raises:
        MissingPackageError: names the first missing package and its extra.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(name, "train")


def start_program(
    folder: Path,
    recipe_file: Path,
    program: str,
    *,
    lock: int | None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start recipes/<program>/train.py on a recipe, in its own process group, with its output in train.log.

    Args:
        folder: run folder, the program's working folder.
        recipe_file: inside the folder.
        program: a folder under recipes/.
        lock: descriptor of the folder's lock, which the program keeps open as long as it lives; None for a
            folder that nobody else uses.
        variables: more of the environment.

    Raises:
        DiskError: train.log cannot be written.
    """
    script = recipes_dir() / program / "train.py"
    try:
        log = (folder / LOG).open("ab")
    except OSError as problem:
        raise DiskError(
            f"Cannot write {folder / LOG}: {problem.strerror}.", "Check the permissions of the folder."
        ) from problem
    with log:
        return subprocess.Popen(
            [sys.executable, "-P", str(script), recipe_file.name],
            cwd=folder,
            env={**_environment(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=() if lock is None else (lock,),
        )


def _environment() -> dict[str, str]:
    values = {**os.environ, **QUIET_AND_OFFLINE, "FTADVISOR_PARENT": str(os.getpid())}
    # More threads than free cores cost far more than they give.
    values.setdefault("OMP_NUM_THREADS", str(cpu_cores(Path("/proc"), Path("/sys"))))
    # Several visible cards without a distributed launcher would be refused by the trainer.
    values.setdefault("CUDA_VISIBLE_DEVICES", "0")
    root = Path(advisor.__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), values.get("PYTHONPATH", "")]))
    return values


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
