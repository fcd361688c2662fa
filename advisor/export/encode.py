"""Turns float32 rows into the bytes of a GGUF tensor type.

Goes in: rows. Comes out: bytes as ggml stores them, by ggml itself. Never does: let a value
become infinite unnoticed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError, MissingPackageError
from advisor.export.checkpoint import Floats

Type: TypeAlias = gguf.GGMLQuantizationType
_F16_ROUNDS_TO_INFINITY = 65520
_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def row_bytes(columns: int, kind: Type) -> int:
    """Return the bytes of one row; the columns fill whole blocks."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(columns // block * size)


def type_for(quant: str, shape: tuple[int, ...]) -> Type:
    """Return the type of a tensor: vectors stay F32; rows that fill no whole block become F16."""
    if len(shape) < 2:
        return Type.F32
    wanted = getattr(Type, quant)
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Type.F16


def encode_rows(name: str, rows: Floats, kind: Type, importance: Floats | None = None) -> npt.NDArray[Any]:
    """Return the rows as contiguous data of a type.

    Args:
        name: Of the tensor, for messages.
        rows: (rows, columns), or a vector.
        kind: Type.
        importance: Of each column, (columns,); types with fewer than eight bits keep those more exactly.

    Raises:
        ExportError: a weight is not finite, or overflows in F16.
    """
    largest = max(float(rows.max()), -float(rows.min())) if rows.size else 0.0
    if not math.isfinite(largest) or np.isnan(rows.min()):
        raise ExportError(
            f"The tensor {name} holds infinite or undefined values: the training diverged, "
            "or the file is damaged.",
            "Train again with a lower learning rate, or go back to an earlier checkpoint.",
        )
    if kind == Type.F32:
        return np.ascontiguousarray(rows, dtype=np.float32)
    if kind == Type.F16 and largest >= _F16_ROUNDS_TO_INFINITY:
        raise ExportError(
            f"The tensor {name} has values up to {largest:.4g}; F16 holds at most 65504.",
            "Use --quant BF16 (or Q8_0, which is made from the full values).",
            code="f16_overflow",
        )
    return _by_ggml(np.ascontiguousarray(rows, dtype=np.float32), kind, importance)


def _by_ggml(rows: Floats, kind: Type, importance: Floats | None) -> npt.NDArray[np.uint8]:
    """Quantise with ggml's own function; it lets other threads run meanwhile."""
    columns = rows.shape[-1]
    count = rows.size // columns
    made = np.empty((count, row_bytes(columns, kind)), dtype=np.uint8)
    pointer = ctypes.c_void_p
    weights = None if importance is None else pointer(importance.ctypes.data)
    _ggml().ggml_quantize_chunk(
        int(kind), pointer(rows.ctypes.data), pointer(made.ctypes.data), 0, count, columns, weights
    )
    return made


@functools.cache
def _ggml() -> ctypes.CDLL:
    """Open the library that llama-cpp-python brings, without importing that package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise MissingPackageError("llama-cpp-python", "gguf")
    name = _LIBRARY.get(sys.platform, "libggml-base.so")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return library
