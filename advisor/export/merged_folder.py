"""Writes the trained model as an ordinary Hugging Face folder: safetensors, config, tokenizer.

Goes in: base and adapter. Comes out: a folder that loads without peft. Never does: change the precision that
the base is stored in.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advisor.export.checkpoint import Floats
from advisor.export.encode import Type, encode_rows
from advisor.export.files import complete_folder, need_only
from advisor.export.gguf_file import PART_BYTES
from advisor.export.merged import Merged
from advisor.export.source import Trained
from advisor.storage import encode_json, file_sha256
from advisor.types import ExportedFile

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_COPIED = ("generation_config.json",)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


_STORED_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def _stored(merged: Merged, name: str) -> str:
    """Return the type to store a parameter in: the base's, which config.json need not tell."""
    kind = merged.dtype(name)
    return kind if kind in _STORED_BYTES else "F32"


def _names(merged: Merged) -> list[str]:
    """Return the parameters in the order of the file: wide types first, so that each is aligned."""
    head = {merged.layout.head}
    names = merged.names() | head if merged.own_head else merged.names() - head
    return sorted(names, key=lambda name: (-_STORED_BYTES[_stored(merged, name)], name))


def _stored_shape(merged: Merged, name: str) -> tuple[int, ...]:
    shape = merged.shape(name)
    return shape[::-1] if merged.is_transposed(name) else shape


def merged_bytes(merged: Merged) -> int:
    """Return the bytes of the weights."""
    return sum(_bytes(merged, name) for name in _names(merged))


def _bytes(merged: Merged, name: str) -> int:
    return math.prod(merged.shape(name)) * _STORED_BYTES[_stored(merged, name)]


def write_merged(
    folder: Path, trained: Trained, config: dict[str, Any], merged: Merged
) -> list[ExportedFile]:
    """Write the folder, complete or not at all, and return its weights file.

    Raises:
        DiskError: the disk is full, or the folder holds what no export wrote.
        ExportError: a weight is not finite, or overflows.
    """
    need_only(folder, (_WEIGHTS, _CONFIG, *_COPIED, *TOKENIZER_FILES))
    with complete_folder(folder) as aside:
        _write_weights(aside / _WEIGHTS, merged)
        changed = {**config, "tie_word_embeddings": not merged.own_head}
        (aside / _CONFIG).write_bytes(encode_json(changed))
        for names, place in ((_COPIED, trained.base), (TOKENIZER_FILES, trained.tokenizer)):
            for name in names:
                if (Path(place) / name).is_file():
                    shutil.copyfile(Path(place) / name, aside / name)
    path = folder / _WEIGHTS
    return [
        ExportedFile(
            path=str(path), kind="merged", quant=None, bytes=path.stat().st_size, sha256=file_sha256(path)
        )
    ]


def _write_weights(path: Path, merged: Merged) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _names(merged):
        end = offset + _bytes(merged, name)
        header[name] = {
            "dtype": _stored(merged, name), "shape": _stored_shape(merged, name),
            "data_offsets": (offset, end),
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in _names(merged):
            shape, stored = merged.shape(name), _stored(merged, name)
            if merged.is_transposed(name):
                file.write(_encode(name, merged.rows(name).T, stored).tobytes())
                continue
            step = max(1, PART_BYTES // (4 * max(1, math.prod(shape[1:]))))
            for start in range(0, shape[0], step):
                rows = merged.rows(name, slice(start, min(start + step, shape[0])))
                file.write(_encode(name, rows, stored).tobytes())


def _encode(name: str, rows: Floats, stored: str) -> npt.NDArray[Any]:
    """Return the rows in the stored type; BF16 rounds to the nearest even value, as torch does."""
    if stored != "BF16":
        return encode_rows(name, rows, getattr(Type, stored))
    bits = encode_rows(name, rows, Type.F32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
