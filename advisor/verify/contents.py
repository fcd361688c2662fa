"""Reads the GGUF file that is to be proved: metadata, vocabulary, tensors.

Goes in: a path. Comes out: `Contents`, or what is wrong with the file. Never does: load it into llama.cpp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from advisor.probe.gguf_file import check_gguf

PART_BYTES = 32 << 20


class DamagedError(ValueError):
    """The file is GGUF, but cut short or inconsistent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A GGUF file, mapped into memory."""

    fields: dict[str, Any]
    """Key -> value; lists for arrays."""
    tensors: dict[str, Any]
    """Name -> the library's tensor."""

    @property
    def quant(self) -> str:
        """Return the quantisation that the file says it is."""
        kind = self.fields.get("general.file_type", "none")
        names: dict[object, str] = {int(member): member.name for member in gguf.LlamaFileType}
        return names.get(kind, f"file type {kind}").removeprefix("MOSTLY_").removeprefix("ALL_")

    def parts(self, name: str) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Yield a tensor's rows in float32, dequantised, part by part."""
        tensor = self.tensors[name]
        data = np.asarray(tensor.data)
        step = max(1, PART_BYTES // max(1, data[0:1].nbytes * 4)) if data.ndim > 1 else data.shape[0]
        for start in range(0, data.shape[0], step):
            rows = slice(start, min(start + step, data.shape[0]))
            yield rows, quants.dequantize(np.ascontiguousarray(data[rows]), tensor.tensor_type)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the order of transformers."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))


def read_contents(path: Path) -> Contents:
    """Read a GGUF file.

    Raises:
        InputError: it is missing or no GGUF.
        DamagedError: it is cut short or inconsistent.
    """
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, TypeError) as problem:
        raise DamagedError(f"the file is cut short or damaged: {problem}") from problem
    return Contents(fields=fields, tensors=tensors)
