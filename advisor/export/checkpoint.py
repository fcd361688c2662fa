"""Reads the weights of a Hugging Face folder, row by row, without torch and without loading them.

Goes in: a folder with model.safetensors or its shards. Comes out: float32 rows of any tensor.
Never does: hold a whole model in memory; read a quantised checkpoint as if it were not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from advisor.errors import ExportError, ModelError
from advisor.types import Record

Floats = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.intp]
_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}


class Stored(Record, frozen=True, kw_only=True):
    """Where one tensor lies in its file."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


class Checkpoint:
    """The tensors of one folder, by name."""

    def __init__(self, tensors: dict[str, Stored]) -> None:
        self.tensors = tensors

    def rows(self, name: str, rows: Rows, *, transposed: bool = False) -> Floats:
        """Return some rows of a tensor (all of a vector's entries are its rows) in float32.

        Args:
            name: Of the tensor.
            rows: Which ones.
            transposed: Rows of the transposed tensor are meant.

        Raises:
            ExportError: the tensor is stored in a type that is no floating point.
        """
        stored = self.tensors[name]
        if stored.dtype not in _STORED:
            raise ExportError(
                f"{stored.path}: tensor {name} is stored as {stored.dtype}: these weights are quantised.",
                "Export from the unquantised model.",
            )
        dtype = _STORED[stored.dtype]
        if 0 in stored.shape:
            return np.zeros(stored.shape, dtype=np.float32)
        mapped = np.memmap(
            stored.path, dtype=dtype, mode="r", offset=stored.offset, shape=stored.shape or (1,)
        )
        part = np.ascontiguousarray((mapped.T if transposed else mapped)[rows])
        if stored.dtype == "BF16":
            wide = part.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return part.astype(np.float32, copy=False)


def open_checkpoint(folder: Path, *, stem: str = "model") -> Checkpoint:
    """Open `<stem>.safetensors` or the shards that `<stem>.safetensors.index.json` names.

    Raises:
        ModelError: nothing there, a shard missing, or a file cut short.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        paths = [folder / name for name in names]
    elif single.is_file():
        paths = [single]
    else:
        old = " (only a .bin file, which is not read)" if list(folder.glob("*.bin")) else ""
        raise ModelError(
            f"{folder} has no {stem}.safetensors{old}.",
            "Save the weights as safetensors, or download the model again.",
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ModelError(
            f"{folder} is incomplete: {', '.join(missing) or 'its index names no file'} is missing.",
            "Download or copy the model again.",
        )
    tensors: dict[str, Stored] = {}
    for path in paths:
        tensors |= _header(path)
    return Checkpoint(tensors)


def _header(path: Path) -> dict[str, Stored]:
    """Read where each tensor lies; the library first checks that the file is whole."""
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as problem:
        raise ModelError(
            f"{path} cannot be read: {problem}. It is damaged or was cut short.",
            "Download or copy it again.",
        ) from problem
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = msgspec.json.decode(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Stored(
            path=str(path),
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def optional_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where there is no file."""
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ModelError: the file is missing, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ModelError(
            f"Cannot read {path}: {problem.strerror or problem}.", "Give a complete model folder."
        ) from problem
    except ValueError as problem:
        raise ModelError(f"{path} is not valid JSON: {problem}", "Copy or download it again.") from problem
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.", "Copy or download it again.")
    return value
