"""Turns float32 rows into the bytes of a GGUF tensor type.

Goes in: rows. Comes out: bytes as ggml stores them. Never does: let a value become infinite unnoticed.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from advisor.errors import ExportError
from advisor.export.checkpoint import Floats

Type: TypeAlias = gguf.GGMLQuantizationType


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


def encode_rows(name: str, rows: Floats, kind: Type) -> npt.NDArray[Any]:
    """Return the rows as contiguous data of a type.

    Raises:
        ExportError: a weight is not finite, or overflows in F16.
    """
    if not np.isfinite(rows).all():
        raise ExportError(
            f"The tensor {name} holds infinite or undefined values: the training diverged, "
            "or the file is damaged.",
            "Train again with a lower learning rate, or go back to an earlier checkpoint.",
        )
    if kind == Type.F32:
        return np.ascontiguousarray(rows, dtype=np.float32)
    if kind == Type.F16:
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        if not np.isfinite(half).all():
            raise ExportError(
                f"The tensor {name} has values up to {np.abs(rows).max():.4g}; F16 holds at most 65504.",
                "Use --quant BF16 (or Q8_0, which is made from the full values).",
                code="f16_overflow",
            )
        return np.ascontiguousarray(half)
    return np.ascontiguousarray(quants.quantize(rows, kind))
