"""Puts files in place only when they are complete.

Goes in: the final path and a function that writes. Comes out: the file under its name, or nothing.
Never does: leave a half file under the final name, or a forgotten one beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from advisor.errors import DiskError
from advisor.units import format_bytes

RESERVE_BYTES = 16 << 20
"""Left free for logs and records written afterwards."""


def need_space(folder: Path, needed_bytes: int) -> None:
    """Check free space before anything is written.

    Raises:
        DiskError: too little, with both figures, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        raise DiskError(
            f"Cannot write to {folder}: {problem.strerror or problem}.", "Choose another folder with --out."
        ) from problem
    if not os.access(folder, os.W_OK):
        raise DiskError(f"{folder} is not writable.", "Choose another folder with --out.")
    if free < needed_bytes + RESERVE_BYTES:
        raise DiskError(
            f"The export needs {format_bytes(needed_bytes + RESERVE_BYTES)} in {folder}; "
            f"{format_bytes(free)} is free.",
            "Free some space, choose another folder with --out, or fewer quantisations with --quant.",
        )


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; at the end it becomes `path`, at an error or Ctrl-C it is removed.

    Raises:
        DiskError: the disk is full, the folder not writable, or another export writes the same file.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        lock = os.open(aside, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise _disk_error(path, problem) from problem
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
        descriptor = os.open(aside, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        aside.replace(path)
    except BlockingIOError as problem:
        raise DiskError(f"Another export is writing {path}.", "Wait for it to end.") from problem
    except BaseException as problem:
        aside.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise _disk_error(path, problem) from problem
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write to; at the end it becomes `path`, at an error or Ctrl-C it is removed.

    Raises:
        DiskError: the disk is full or the place not writable.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
    except BaseException as problem:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(problem, OSError):
            raise _disk_error(path, problem) from problem
        raise


def _disk_error(path: Path, problem: OSError) -> DiskError:
    return DiskError(
        f"Cannot write {path}: {problem.strerror or problem}.",
        "Free some space or choose another folder with --out.",
    )
