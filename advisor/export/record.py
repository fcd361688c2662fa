"""What lies in an export folder: what was just written, and what was there before and still is of this model.

Goes in: the folder, what was written, the trained model. Comes out: `Export`, also written as export.json.
Never does: count a file of before that was changed, or that was made of the model in another state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from advisor.errors import InputError
from advisor.export.importance import Importance
from advisor.export.source import Trained
from advisor.storage import file_sha256, read_record, write_json
from advisor.types import Export, ExportedFile

EXPORT = "export.json"
_READ = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.*",
)  # fmt: skip
"""All files of a model that an export depends on."""


def write_record(
    out: Path,
    made: Export,
    trained: Trained,
    importance: Importance | None,
    on_progress: Callable[[str], None],
) -> Export:
    """Write export.json, and keep in it what earlier exports wrote of the same model.

    Args:
        out: Folder of the files.
        made: What was written just now.
        trained: What it was made of.
        importance: Of the columns, where it was asked for.
        on_progress: Told what is left out.

    Returns:
        `made` with the earlier files, and the notes that go with all of them.
    """
    model = _stamp(trained)
    notes = made.notes if importance is None else (*made.notes, importance.note)
    kept: tuple[ExportedFile, ...] = ()
    earlier = _earlier(out, on_progress)
    if earlier is not None:
        written = {Path(file.path) for file in made.files}
        others = [file for file in (*earlier.files, *earlier.kept) if Path(file.path) not in written]
        kept = tuple(file for file in others if earlier.model == model and _is_whole(file))
        left = [Path(file.path).name for file in others if file not in kept and file.kind != "card"]
        if left:
            on_progress(f"not of this model as it is now, so not in the table: {', '.join(left)}")
    if earlier is not None and kept:
        marked = any(file.importance for file in kept)
        notes += tuple(note for note in earlier.notes if marked or not Importance.is_note(note))
    made = msgspec.structs.replace(made, kept=kept, model=model, notes=tuple(dict.fromkeys(notes)))
    write_json(out / EXPORT, made)
    return made


def read_export(out: Path) -> Export:
    """Return what export.json says, each file where it lies now; those that are gone are left out.

    Raises:
        InputError: it is not there, or no record of an export.
    """
    made = read_record(out / EXPORT, Export)
    return msgspec.structs.replace(made, files=_located(made.files, out), kept=_located(made.kept, out))


def _located(files: Sequence[ExportedFile], out: Path) -> tuple[ExportedFile, ...]:
    found = []
    for file in files:
        path = Path(file.path)
        here = out / path.parent.name / path.name if file.kind in ("merged", "adapter") else out / path.name
        if here.is_file():
            found.append(msgspec.structs.replace(file, path=str(here)))
    return tuple(found)


def _earlier(out: Path, on_progress: Callable[[str], None]) -> Export | None:
    if not (out / EXPORT).is_file():
        return None
    try:
        return read_export(out)
    except InputError as problem:
        on_progress(f"nothing of before is kept: {problem.message}")
        return None


def _is_whole(file: ExportedFile) -> bool:
    return file.kind != "card" and file_sha256(Path(file.path)) == file.sha256


def _stamp(trained: Trained) -> str:
    """Return a checksum of names, sizes and times of change, which any training or editing alters.

    The contents are not read: they may be many times what is exported of them.
    """
    total = hashlib.sha256()
    for folder in (trained.base, trained.adapter, trained.tokenizer):
        found = {path for pattern in _READ for path in Path(folder).glob(pattern)} if folder else set()
        for path in sorted(found):
            state = path.stat()
            total.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return total.hexdigest()
