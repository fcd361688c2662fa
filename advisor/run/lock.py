"""Makes sure that one training at a time works in a run folder.

Goes in: the folder. Comes out: a lock that the kernel releases when supervisor and trainer have both ended.
Never
does: wait; trust a process id, which may have been given to another process.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from advisor.errors import DiskError, RefusedError

NAME = ".lock"


class FolderLock:
    """Context manager that holds the lock; `handle` is inherited by the trainer, so that it holds it too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.handle = -1

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
            RefusedError: another process holds it; the message says which.
            DiskError: the folder is not writable.
        """
        path = self._folder / NAME
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as problem:
            raise DiskError(
                f"Cannot write into {self._folder}: {problem.strerror}.",
                "Check the permissions of the folder.",
            ) from problem
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            holder = os.pread(self.handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self.handle)
            raise RefusedError(
                f"Another run is working in {self._folder} (process {holder}, or the training it started).",
                f"Wait for it to end, or stop it: kill {holder}",
                code="folder_locked",
            ) from problem
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.handle)


def is_locked(folder: Path) -> bool:
    """Tell whether a run works in a folder now; nothing is written."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
