"""Makes a checkpoint trustworthy: a marker written last, checked before a resume.

Goes in: the folder `checkpoint-<step>` that the trainer wrote. Comes out: `complete.json` in it, or the
reason why it cannot be used. Never does: load weights; pick a checkpoint whose marker is missing or does not
agree."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from advisor.errors import InputError
from advisor.storage import file_sha256, read_record, write_json
from advisor.types import Record

MARKER = "complete.json"
HASHED_BELOW_BYTES = 1 << 20
"""Smaller files are compared by content, larger ones by size only."""
STEP = re.compile(r"checkpoint-(\d+)")


class StoredFile(Record, frozen=True, kw_only=True):
    """One file of a checkpoint."""

    bytes: int
    sha256: str | None = None


class Marker(Record, frozen=True, kw_only=True):
    """What a complete checkpoint holds."""

    step: int
    recipe_sha256: str
    files: dict[str, StoredFile]


class Choice(Record, frozen=True, kw_only=True):
    """The checkpoint to resume from, and those that were passed over."""

    folder: str | None
    step: int
    rejected: dict[str, str]
    """Folder name -> reason, the newest first."""


def finish(folder: Path, *, step: int, recipe_sha256: str) -> int:
    """Sync all files of a checkpoint to disk, then write its marker.

    Returns:
        The checkpoint's size in bytes.

    Raises:
        DiskError: the marker cannot be written.
    """
    files = {}
    for path in _files(folder):
        _sync(path)
        size = path.stat().st_size
        digest = file_sha256(path) if size < HASHED_BELOW_BYTES else None
        files[path.relative_to(folder).as_posix()] = StoredFile(bytes=size, sha256=digest)
    _sync(folder)
    write_json(folder / MARKER, Marker(step=step, recipe_sha256=recipe_sha256, files=files))
    _sync(folder)
    return sum(one.bytes for one in files.values())


def problem(folder: Path, *, recipe_sha256: str) -> str | None:
    """Return why a checkpoint cannot be used, or None when it can."""
    if not (folder / MARKER).is_file():
        return "it was not finished"
    try:
        marker = read_record(folder / MARKER, Marker)
    except InputError:
        return "its marker is damaged"
    if marker.recipe_sha256 != recipe_sha256:
        return "it belongs to another recipe"
    for name, stored in marker.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != stored.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {stored.bytes}"
        if stored.sha256 is not None and file_sha256(path) != stored.sha256:
            return f"{name} was changed"
    return None


def newest(root: Path, *, recipe_sha256: str) -> Choice:
    """Return the newest checkpoint that is whole, with the newer ones that are not."""
    rejected: dict[str, str] = {}
    for step, folder in sorted(_checkpoints(root), reverse=True):
        reason = problem(folder, recipe_sha256=recipe_sha256)
        if reason is None:
            return Choice(folder=str(folder), step=step, rejected=rejected)
        rejected[folder.name] = reason
    return Choice(folder=None, step=0, rejected=rejected)


def remove_unusable(root: Path, choice: Choice) -> None:
    """Remove the rejected checkpoints, so that the trainer does not write into their remains."""
    for name in choice.rejected:
        shutil.rmtree(root / name)


def rotate(root: Path, *, keep: int) -> None:
    """Keep the newest `keep` checkpoints that have a marker; remove all older folders."""
    ordered = sorted(_checkpoints(root), reverse=True)
    marked = [step for step, folder in ordered if (folder / MARKER).is_file()]
    if len(marked) < keep:
        return
    oldest = marked[keep - 1]
    for step, folder in ordered:
        if step < oldest:
            # The marker goes first: a removal that is cut short must not leave a folder that looks whole.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = ((STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return [(int(match.group(1)), path) for match, path in found if match]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
