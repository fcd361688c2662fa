"""Puts files in place only when they are complete.

Goes in: the final path and a function that writes. Comes out: the file under its name, or nothing.
Never does: leave a half file under the final name, or a forgotten one beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from advisor.errors import DiskError
from advisor.units import format_bytes

RESERVE_BYTES = 16 << 20
"""Left free for logs and records written afterwards."""
_HALF = (".*.gguf.part", ".*-merged.part", ".*-adapter.part", ".*-prefix.state.part")


def proof_file(gguf: Path) -> Path:
    """Return where the proof of a file lies."""
    return gguf.with_name(f"{gguf.stem}.verification.json")


def need_space(folder: Path, needed_bytes: int) -> None:
    """Check free space before anything is written, once what killed exports left is gone.

    Raises:
        DiskError: too little, with both figures, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
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


def _clear(folder: Path) -> None:
    """Remove half files and folders that nobody writes any more."""
    for left in (one for form in _HALF for one in folder.glob(form)):
        # It is being written, or whoever wrote it has just put it in place.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            _remove_unlocked(left)


def _remove_unlocked(left: Path) -> None:
    lock = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    finally:
        os.close(lock)


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
        proof_file(path).unlink(missing_ok=True)  # of the file that ends here
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


def need_only(folder: Path, names: Iterable[str]) -> None:
    """Check that a folder that is to be replaced holds nothing but such files.

    Raises:
        DiskError: it holds others, which would be lost, or is none.
    """
    if folder.exists() and not folder.is_dir():
        raise DiskError(f"{folder} is no folder.", "Move it away, or choose another folder with --out.")
    others = sorted({path.name for path in folder.iterdir()} - set(names)) if folder.is_dir() else []
    if others:
        raise DiskError(
            f"{folder} also holds {', '.join(others[:3])}, which no export wrote and which would be lost.",
            "Move it away, or choose another folder with --out.",
        )


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write to; at the end it becomes `path`, at an error or Ctrl-C it is removed.

    Raises:
        DiskError: the disk is full, the place not writable, or another export writes the same folder.
    """
    aside, old = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    lock = None
    try:
        lock = _locked_folder(aside)
        yield aside
        # A folder is not replaced in one step: a half removed one must never stand under the final name.
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.replace(old)
        aside.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    except BlockingIOError as problem:
        raise DiskError(f"Another export is writing {path}.", "Wait for it to end.") from problem
    except BaseException as problem:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not path.exists():
            old.replace(path)
        if isinstance(problem, OSError):
            raise _disk_error(path, problem) from problem
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked_folder(folder: Path) -> int:
    """Make a folder, or empty the one that a killed export left; return what keeps others out of it.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), folder.stat()):  # it became the final one meanwhile
            raise BlockingIOError
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except BaseException:
        os.close(lock)
        raise
    return lock


def _disk_error(path: Path, problem: OSError) -> DiskError:
    return DiskError(
        f"Cannot write {path}: {problem.strerror or problem}.",
        "Free some space or choose another folder with --out.",
    )
