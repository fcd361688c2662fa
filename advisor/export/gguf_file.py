"""Writes a GGUF file in one pass: metadata, tokenizer, tensors row by row from the merged weights.

Goes in: the plan of the model, its weights, its vocabulary. Comes out: a file, and what it holds.
Never does: hold more than one part of a tensor in memory; write under the final name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeAlias

import gguf
import numpy as np
from threadpoolctl import threadpool_limits

from advisor.errors import ExportError
from advisor.export.architecture import MetaValue, ModelPlan, PlannedTensor, factor_tensors, row_order
from advisor.export.checkpoint import Floats
from advisor.export.encode import Type, encode_rows, row_bytes, type_for
from advisor.export.importance import Importance
from advisor.export.merged import Merged
from advisor.export.tokenizer import Vocabulary
from advisor.gguf_rules import rules
from advisor.probe.gguf_file import NORMALISER_KEY
from advisor.probe.load import free_cores
from advisor.types import Record

Types: TypeAlias = dict[str, Type]
_SUPPRESSED = "tokenizer.ggml.suppress_tokens"
"""Tokens that llama.cpp's samplers leave out."""
PART_BYTES = 4 << 20
"""Rows are read and converted in parts of about this size (in float32)."""


class Contents(Record, frozen=True, kw_only=True):
    """What a GGUF file holds, in numbers."""

    mix: dict[str, int]
    """Tensor type -> number of tensors."""
    weights: int
    weight_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Return the mean over all tensors, vectors included."""
        return 8 * self.weight_bytes / self.weights


def check_complete(plan: ModelPlan, merged: Merged) -> None:
    """Match the planned tensors with those of the checkpoint, both ways.

    Raises:
        ExportError: a tensor is missing, has another shape, or would be lost.
    """
    planned = {tensor.origin: tensor for tensor in plan.tensors}
    ignored = rules().config.tensors_without_effect
    left = {name for name in merged.names() - set(planned) if not name.endswith(ignored)}
    if not merged.own_head:
        left.discard(merged.layout.head)
    wrong = [f"{name} is missing" for name in planned if not merged.shape(name)]
    wrong += [
        f"{name} is {merged.shape(name)} instead of {tensor.shape}"
        for name, tensor in planned.items()
        if merged.shape(name) and merged.shape(name) != tensor.shape
    ]
    wrong += [f"{name} has no place in a {plan.architecture.gguf} GGUF" for name in sorted(left)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ExportError(
            f"The weights do not fit the architecture: {'; '.join(wrong[:4])}{more}.",
            "The checkpoint is incomplete, or was changed in a way that llama.cpp cannot follow.",
        )


def contents(tensors: Iterable[tuple[tuple[int, ...], Type]]) -> Contents:
    """Sum up tensors of given shapes and types."""
    found = list(tensors)
    return Contents(
        mix=dict(Counter(kind.name for _, kind in found)),
        weights=sum(math.prod(shape) for shape, _ in found),
        weight_bytes=sum(_tensor_bytes(shape, kind) for shape, kind in found),
    )


def planned_contents(plan: ModelPlan, types: Types) -> Contents:
    """Return what a file will hold."""
    found: list[tuple[tuple[int, ...], Type]] = [
        (tensor.shape, types[tensor.name]) for tensor in plan.tensors
    ]
    found += [((len(values),), Type.F32) for values in plan.factors.values()]
    return contents(found)


def uniform_types(plan: ModelPlan, quant: str) -> Types:
    """Return the type of each tensor where all weights have the same."""
    return {t.name: Type.F32 if t.exact else type_for(quant, t.shape) for t in plan.tensors}


def write_gguf(
    path: Path,
    *,
    plan: ModelPlan,
    merged: Merged | None,
    vocabulary: Vocabulary,
    quant: str,
    types: Types,
    name: str,
    importance: Importance | None,
    on_progress: Callable[[str], None],
) -> Contents:
    """Write a model, each tensor in its type.

    Args:
        path: The file.
        plan: Metadata and tensors.
        merged: The weights; None leaves a hole in the file where they would be, and the tokenizer out, to ask
            llama.cpp about it.
        vocabulary: The tokenizer.
        quant: What the file says it is.
        types: Of each tensor, by its name in the file.
        name: Of the model.
        importance: Of the columns of each matrix; None counts all alike.
        on_progress: Told now and then.

    Raises:
        ExportError: a weight is not finite or overflows.
        OSError: the disk is full.
    """
    writer = gguf.GGUFWriter(path, plan.architecture.gguf)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(_name(name, vocabulary))
        writer.add_file_type(_file_type(quant))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_metadata(writer, {**plan.metadata, **({} if importance is None else importance.metadata())})
        if merged is not None:
            add_vocabulary(writer, vocabulary)
        factors = factor_tensors(plan)
        for key, values in factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes, Type.F32)
        for tensor in plan.tensors:
            kind = types[tensor.name]
            size = _tensor_bytes(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, tensor.shape, encode_dtype(kind), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        # Each of our threads multiplies alone: those that numpy would add only wait for one another.
        with threadpool_limits(1, user_api="blas"):
            for number, tensor in enumerate(plan.tensors, start=1):
                kind = types[tensor.name]
                if merged is None:
                    writer.write_tensor_data(_Hole(_tensor_bytes(tensor.shape, kind)))
                    continue
                writer.write_tensor_data(
                    _Stream(tensor, merged, kind, None if importance is None else importance.of(tensor))
                )
                if number % 50 == 0:
                    on_progress(f"{quant}: tensor {number} of {len(plan.tensors)}")
    finally:
        writer.close()
    return planned_contents(plan, types)


def _name(name: str, vocabulary: Vocabulary) -> str:
    """Return a name that makes llama.cpp treat special tokens as the tokenizer does."""
    names = rules().stripping.names
    told = any(word in name.lower() for word in names)
    if vocabulary.strips:
        return name if told else f"{names[0]} {name}"
    for word in names:
        name = re.sub(re.escape(word), " ".join(re.findall("[a-z]+|[0-9]+", word)), name, flags=re.IGNORECASE)
    return name


@functools.cache
def _threads() -> int:
    """Return how many threads encode; measured once, which takes a moment."""
    return free_cores()


def encode_dtype(kind: Type) -> str:
    """Return a numpy type for the writer, which takes the shape as it is unless this is uint8."""
    return "float16" if kind == Type.F16 else "float32"


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What the writer takes for an array: it only asks for the size and to be put into the file."""

    tensor: PlannedTensor
    merged: Merged
    kind: Type
    importance: Floats | None

    @property
    def nbytes(self) -> int:
        return _tensor_bytes(self.tensor.shape, self.kind)

    def tofile(self, file: IO[bytes]) -> None:
        rows = self.tensor.shape[0]
        columns = math.prod(self.tensor.shape[1:])
        step = max(1, PART_BYTES // (4 * columns)) if len(self.tensor.shape) > 1 else rows
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        if len(parts) == 1:
            file.write(self._encoded(parts[0]))
            return
        count = _threads()
        with ThreadPoolExecutor(count) as pool:
            for first in range(0, len(parts), count):
                file.writelines(pool.map(self._encoded, parts[first : first + count]))

    def _encoded(self, part: slice) -> bytes:
        rows = self.tensor.shape[0]
        order = row_order(rows, self.tensor.heads) if self.tensor.heads else None
        data = self.merged.rows(self.tensor.origin, part if order is None else order[part])
        if self.tensor.offset:
            data = data + np.float32(self.tensor.offset)
        return encode_rows(self.tensor.name, data, self.kind, self.importance).tobytes()


@dataclasses.dataclass(frozen=True)
class _Hole:
    """As much of nothing: the file system stores no byte of it."""

    nbytes: int

    def tofile(self, file: IO[bytes]) -> None:
        file.truncate(file.seek(self.nbytes, os.SEEK_CUR))


def _tensor_bytes(shape: tuple[int, ...], kind: Type) -> int:
    return math.prod(shape[:-1]) * row_bytes(shape[-1], kind)


def _file_type(quant: str) -> int:
    name = "ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"
    return int(gguf.LlamaFileType[name])


def _add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, MetaValue]) -> None:
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write the tokenizer, by a writer of the gguf library or what takes the same calls."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    else:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores and vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_eot_token_id(vocabulary.eot)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.virtual:
        last = len(vocabulary.tokens)
        writer.add_array(_SUPPRESSED, list(range(last - vocabulary.virtual, last)))
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    if vocabulary.normaliser is not None:
        writer.add_string(NORMALISER_KEY, vocabulary.normaliser)
