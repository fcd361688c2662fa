"""Keeps a trained prefix as a sequence state of llama.cpp, and puts it on a loaded model.

Goes in: keys and values of virtual tokens in every layer. Comes out: a file that llama_state_seq_load_file
reads into a context with a 32-bit key-value cache and without flash attention. Never does: change the model
file; hand llama.cpp a damaged state.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from advisor.errors import InputError
from advisor.running import Said

Floats = npt.NDArray[np.float32]
MAGIC, VERSION = 0x67677371, 3
"""LLAMA_STATE_SEQ_MAGIC and LLAMA_STATE_SEQ_VERSION of llama.h."""
_F32 = 0
_PLACEHOLDER = 0
"""Stands for a virtual token in the list of tokens; it is never evaluated."""
_REMEDY = "Make one with: ftadvisor export RUN_DIR --to prefix-state"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """What every text finds in the key-value cache before it, at positions 0 to tokens - 1."""

    keys: Floats
    """(layers, tokens, width), as attention compares them: nothing rotates them again."""
    values: Floats
    """(layers, tokens, width)."""


def write_state(path: Path, caches: Sequence[Prefix]) -> None:
    """Write the file.

    Args:
        path: The file.
        caches: Keys in llama.cpp's order of rows. Two where llama.cpp keeps layers with a sliding
            window apart, those last.

    Raises:
        OSError: the disk is full.
    """
    tokens = caches[0].keys.shape[1]
    with path.open("wb") as file:
        file.write(struct.pack("<III", MAGIC, VERSION, tokens))
        file.write(struct.pack(f"<{tokens}i", *[_PLACEHOLDER] * tokens))
        for cache in caches:
            _write_cache(file, cache)


def _write_cache(file: IO[bytes], cache: Prefix) -> None:
    layers, tokens, width = cache.keys.shape
    file.write(struct.pack("<II", 1, tokens))
    for position in range(tokens):
        file.write(struct.pack("<iIi", position, 1, 0))
    file.write(struct.pack("<II", 1, layers))
    for keys in cache.keys:
        file.write(struct.pack("<iQ", _F32, 4 * width) + np.ascontiguousarray(keys, "<f4").tobytes())
    for values in cache.values:
        file.write(struct.pack("<iII", _F32, 4, width) + np.ascontiguousarray(values.T, "<f4").tobytes())


def read_state(path: Path) -> tuple[Prefix, ...]:
    """Read what `write_state` wrote.

    Raises:
        InputError: the file is missing, cut short, or another state.
    """
    try:
        data = memoryview(path.read_bytes())
        magic, version, tokens = struct.unpack_from("<III", data)
        if (magic, version) != (MAGIC, VERSION):
            raise InputError(f"{path} is no sequence state of llama.cpp.", _REMEDY)
        offset, caches = 12 + 4 * tokens, list[Prefix]()
        while offset < len(data) or not caches:
            cache, offset = _read_cache(data, offset, tokens)
            caches.append(cache)
    except OSError as problem:
        raise InputError(f"Cannot read {path}: {problem.strerror or problem}.", _REMEDY) from problem
    except (struct.error, ValueError) as problem:
        raise InputError(f"{path} is cut short or damaged: {problem}.", _REMEDY) from problem
    return tuple(caches)


def _read_cache(data: memoryview, offset: int, tokens: int) -> tuple[Prefix, int]:
    """Read one cache; also return where the next begins."""
    streams, cells = struct.unpack_from("<II", data, offset)
    if (streams, cells) != (1, tokens):
        raise ValueError(f"{cells} cells in {streams} streams instead of {tokens} in one")
    transposed, layers = struct.unpack_from("<II", data, offset + 8 + 12 * cells)
    offset += 16 + 12 * cells
    keys, values = list[Floats](), list[Floats]()
    for _ in range(layers):
        kind, row_bytes = struct.unpack_from("<iQ", data, offset)
        keys.append(_numbers(data, offset + 12, (tokens, row_bytes // 4), kind))
        offset += 12 + keys[-1].nbytes
    for _ in range(layers):
        kind, _, width = struct.unpack_from("<iII", data, offset)
        values.append(_numbers(data, offset + 12, (width, tokens), kind).T)
        offset += 12 + values[-1].nbytes
    if transposed != 1:
        raise ValueError("its values are not stored by column")
    empty = np.zeros((0, tokens, 0), dtype=np.float32)
    return Prefix(
        keys=np.stack(keys) if keys else empty, values=np.stack(values) if values else empty
    ), offset


def _numbers(data: memoryview, offset: int, shape: tuple[int, int], kind: int) -> Floats:
    if kind != _F32:
        raise ValueError(f"numbers of type {kind} instead of 32 bits")
    return np.frombuffer(data, "<f4", count=shape[0] * shape[1], offset=offset).reshape(shape)


def put_on(model: Any, path: Path, said: Said) -> list[int]:
    """Let a loaded model begin with the prefix; return the ids that stand for it before every prompt.

    Args:
        model: llama-cpp-python's model, with a 32-bit cache and without flash attention.
        path: The file.
        said: What llama.cpp reports.

    Raises:
        InputError: the file is missing, no such state, or of another model.
    """
    import llama_cpp

    # llama.cpp ends the process on a file that is cut short.
    read_state(path)
    room = model.n_ctx()
    ids, count = (llama_cpp.llama_token * room)(), ctypes.c_size_t(0)
    model.reset()
    used = llama_cpp.llama_state_seq_load_file(
        model._ctx.ctx, str(path).encode(), 0, ids, room, ctypes.byref(count)
    )
    if not used:
        model._ctx.kv_cache_clear()
        raise InputError(
            f"llama.cpp does not take the prefix {path}: {said.reason() or 'it does not fit'}",
            "Put it on the base model that it was trained on.",
        )
    found = list(ids[: count.value])
    model.input_ids[: len(found)] = found
    model.n_tokens = len(found)
    return found
