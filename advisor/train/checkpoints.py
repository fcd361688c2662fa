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
HELDOUT = "heldout.json"
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
    learning_rate: float | None = None
    """With which it was trained; a resume with another one must say so to the scheduler."""
    optimizer: str | None = None
    """Whose state it holds."""


class Heldout(Record, frozen=True, kw_only=True):
    """How good a checkpoint is on rows that are not trained on; written after it is complete."""

    loss: float


class Fit(Record, frozen=True, kw_only=True):
    """Which checkpoints belong to a recipe: its own, and those of the recipes that it was derived from."""

    sha256: str
    of: tuple[str, ...] = ()
    newest_step: int | None = None
    """Later checkpoints of `of` are not used."""


class Choice(Record, frozen=True, kw_only=True):
    """The checkpoint to resume from, and those that were passed over."""

    folder: str | None
    step: int
    rejected: dict[str, str]
    """Folder name -> reason, the newest first."""
    marker: Marker | None = None


def finish(
    folder: Path, *, step: int, recipe_sha256: str, learning_rate: float | None = None,
    optimizer: str | None = None,
) -> int:  # fmt: skip
    """Sync all files of a checkpoint to disk, then write its marker.

    Args:
        folder: as the trainer wrote it.
        step: the step that it was written after.
        recipe_sha256: of the recipe file that was trained.
        learning_rate: of that recipe.
        optimizer: of that recipe.

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
    marker = Marker(
        step=step, recipe_sha256=recipe_sha256, files=files, learning_rate=learning_rate, optimizer=optimizer
    )
    write_json(folder / MARKER, marker)
    _sync(folder)
    return sum(one.bytes for one in files.values())


def note_heldout(folder: Path, loss: float) -> None:
    """Write down how good a complete checkpoint is.

    Raises:
        DiskError: it cannot be written.
    """
    write_json(folder / HELDOUT, Heldout(loss=loss))


def problem(folder: Path, fit: Fit) -> str | Marker:
    """Return why a checkpoint cannot be used, or its marker when it can."""
    if not (folder / MARKER).is_file():
        return "it was not finished"
    try:
        marker = read_record(folder / MARKER, Marker)
    except InputError:
        return "its marker is damaged"
    if marker.recipe_sha256 not in (fit.sha256, *fit.of):
        return "it belongs to another recipe"
    inherited = marker.recipe_sha256 != fit.sha256
    if inherited and fit.newest_step is not None and marker.step > fit.newest_step:
        return "training has gone back behind it"
    for name, stored in marker.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != stored.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {stored.bytes}"
        if stored.sha256 is not None and file_sha256(path) != stored.sha256:
            return f"{name} was changed"
    return marker


def newest(root: Path, fit: Fit) -> Choice:
    """Return the newest checkpoint that is whole, with the newer ones that are not."""
    rejected: dict[str, str] = {}
    for step, folder in sorted(_checkpoints(root), reverse=True):
        found = problem(folder, fit)
        if isinstance(found, Marker):
            return Choice(folder=str(folder), step=step, rejected=rejected, marker=found)
        rejected[folder.name] = found
    return Choice(folder=None, step=0, rejected=rejected)


def remove_unusable(root: Path, choice: Choice) -> None:
    """Remove the rejected checkpoints, so that the trainer does not write into their remains."""
    for name in choice.rejected:
        shutil.rmtree(root / name)


def rotate(root: Path, *, keep: int) -> None:
    """Keep `keep` complete checkpoints and what is newer than the newest of them; remove all others.

    The newest is always kept, to go on from; the one with the lowest held-out loss comes second, to go back
    to; then the next newest."""
    marked = [
        (step, folder)
        for step, folder in sorted(_checkpoints(root), reverse=True)
        if (folder / MARKER).is_file()
    ]
    if not marked:
        return
    measured = [(loss, step) for step, folder in marked if (loss := _heldout_loss(folder)) is not None]
    wanted = dict.fromkeys([marked[0][0], *([min(measured)[1]] if measured else []), *(s for s, _ in marked)])
    kept = set(list(wanted)[:keep])
    for step, folder in _checkpoints(root):
        if step < marked[0][0] and step not in kept:
            # The marker goes first: a removal that is cut short must not leave a folder that looks whole.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _heldout_loss(folder: Path) -> float | None:
    if not (folder / HELDOUT).is_file():
        return None
    try:
        return read_record(folder / HELDOUT, Heldout).loss
    except InputError:
        return None


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = ((STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return [(int(match.group(1)), path) for match, path in found if match]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, HELDOUT))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
