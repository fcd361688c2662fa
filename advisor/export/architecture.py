"""What llama.cpp must be told about a model: its metadata and the complete list of its tensors.

Goes in: config.json and the rules of its architecture. Comes out: `ModelPlan`. Never does: skip a field of
config.json that it does not know; touch weights.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError
from advisor.export.checkpoint import Floats
from advisor.export.config_fields import architecture_of, exact_context, usual_fields
from advisor.export.rotary import rotation
from advisor.gguf_rules import Architecture
from advisor.types import Record

MetaValue = int | float | bool | str


class PlannedTensor(Record, frozen=True, kw_only=True):
    """One tensor of the GGUF file and where its numbers come from."""

    name: str
    origin: str
    """Name of the parameter in transformers."""
    shape: tuple[int, ...]
    """In the file, (out, in); `transposed` ones are stored the other way round."""
    heads: int = 0
    """Not 0: the rows of so many heads are reordered for llama.cpp's rotation."""
    offset: float = 0.0
    """Added to every entry."""
    transposed: bool = False
    exact: bool = False
    """Stays F32 in every quantisation."""


class ModelPlan(Record, frozen=True, kw_only=True):
    """The model as llama.cpp sees it."""

    architecture: Architecture
    metadata: dict[str, MetaValue]
    tensors: tuple[PlannedTensor, ...]
    layers: int
    vocab: int
    context: int
    """Tokens for which the file is exact."""
    factors: dict[str, tuple[float, ...]] = {}
    """Tensors that hold no weights but factors of the rotation."""
    notes: tuple[str, ...] = ()


def plan_model(config: dict[str, Any], *, own_head: bool) -> ModelPlan:
    """Work out metadata and tensors; refuse what llama.cpp would compute differently.

    Args:
        config: config.json.
        own_head: the output layer has weights of its own in the file (not tied, or untied by an adapter).

    Raises:
        ExportError: a field is unknown, or has a value that llama.cpp does not follow.
    """
    architecture = architecture_of(config)
    fields = usual_fields(config, architecture)
    if own_head and architecture.head == "shared":
        raise ExportError(
            f"Output layer and embedding differ; llama.cpp has one for both in {architecture.gguf}.",
            "Train without changing lm_head or the embedding alone, or export --to merged instead.",
        )
    context, window, notes = exact_context(fields, architecture)
    turned = rotation(fields, architecture)
    keys = gguf.Keys
    norm = keys.Attention.LAYERNORM_RMS_EPS if architecture.norm == "rms" else keys.Attention.LAYERNORM_EPS
    metadata: dict[str, MetaValue] = {
        keys.LLM.BLOCK_COUNT: fields["num_hidden_layers"],
        keys.LLM.CONTEXT_LENGTH: context,
        keys.LLM.EMBEDDING_LENGTH: fields["hidden_size"],
        keys.LLM.FEED_FORWARD_LENGTH: fields["intermediate_size"],
        keys.Attention.HEAD_COUNT: fields["num_attention_heads"],
        keys.Attention.HEAD_COUNT_KV: fields["num_key_value_heads"],
        norm: float(fields["rms_norm_eps"]),
        keys.Attention.KEY_LENGTH: fields["head_dim"],
        keys.Attention.VALUE_LENGTH: fields["head_dim"],
        keys.LLM.VOCAB_SIZE: fields["vocab_size"],
        **turned.metadata,
    }
    if window is not None:
        metadata[keys.Attention.SLIDING_WINDOW] = window
    floats = {f"{{arch}}.{key}": fields.get(field) for key, field in architecture.floats.items()}
    metadata |= {key: float(value) for key, value in floats.items() if value is not None}
    return ModelPlan(
        architecture=architecture,
        metadata={key.format(arch=architecture.gguf): value for key, value in metadata.items()},
        tensors=_tensors(fields, architecture, own_head=own_head),
        layers=fields["num_hidden_layers"],
        vocab=fields["vocab_size"],
        context=context,
        factors=turned.tensors,
        notes=notes + turned.notes,
    )


def _shapes(fields: dict[str, Any], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each module's weight by its name in a block."""
    hidden, inner, head_dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    queries = fields["num_attention_heads"] * head_dim
    keys = fields["num_key_value_heads"] * head_dim
    wide = architecture.wide_norms
    narrow = dict.fromkeys(architecture.norms, (hidden,))
    return {
        **narrow,
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "self_attn.qkv_proj": (queries + 2 * keys, hidden), "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "self_attn.q_norm": (queries if wide else head_dim,),
        "self_attn.k_norm": (keys if wide else head_dim,),
        "attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (inner, hidden), "mlp.c_proj": (hidden, inner),
    }  # fmt: skip


def _tensors(
    fields: dict[str, Any], architecture: Architecture, *, own_head: bool
) -> tuple[PlannedTensor, ...]:
    layers, hidden, vocab = fields["num_hidden_layers"], fields["hidden_size"], fields["vocab_size"]
    names = gguf.get_tensor_name_map(_enum(architecture.gguf), layers)

    def planned(origin: str, shape: tuple[int, ...], place: str = "", **more: Any) -> PlannedTensor:
        name = names.get_name(place or origin, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"{origin} has no name in {architecture.gguf}.", "Report this model's config.json."
            )
        return PlannedTensor(name=name, origin=origin, shape=shape, **more)

    offset, final = architecture.norm_offset, architecture.final_norm
    found = [planned(architecture.embedding, (vocab, hidden))]
    if architecture.positions:
        found.append(planned(architecture.positions, (fields["max_position_embeddings"], hidden), exact=True))
    found.append(planned(f"{final}.weight", (hidden,), offset=offset))
    if architecture.final_bias:
        found.append(planned(f"{final}.bias", (hidden,)))
    if own_head or architecture.head == "required":
        source = architecture.head_weight if own_head else architecture.embedding
        found.append(planned(source, (vocab, hidden), architecture.head_weight))
    for number in range(layers):
        found += _block(f"{architecture.block}.{number}", fields, architecture, planned)
    return tuple(found)


def _block(
    block: str, fields: dict[str, Any], architecture: Architecture, planned: Any
) -> list[PlannedTensor]:
    shapes, found = _shapes(fields, architecture), []
    turned = {
        "self_attn.q_proj": fields["num_attention_heads"], "self_attn.k_proj": fields["num_key_value_heads"],
    }  # fmt: skip
    biased = {
        module
        for field, modules in architecture.biases.items()
        if field == "always" or fields.get(field)
        for module in modules
    }
    for module in architecture.linears + architecture.norms:
        heads = turned.get(module, 0) if architecture.permute else 0
        offset = architecture.norm_offset if module in architecture.norms else 0.0
        found.append(
            planned(
                f"{block}.{module}.weight", shapes[module], heads=heads, offset=offset,
                transposed=module in architecture.transposed,
            )
        )  # fmt: skip
        if module in biased:
            found.append(planned(f"{block}.{module}.bias", shapes[module][:1], heads=heads))
    return found


def _enum(name: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def row_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Return, for each row in the file, the row of transformers that belongs there.

    transformers rotates dimension i with i + half; llama.cpp's `llama` rotates neighbours.
    """
    half = rows // heads // 2
    index = np.arange(rows, dtype=np.intp).reshape(heads, 2, half)
    return index.swapaxes(1, 2).reshape(rows)


def factor_tensors(plan: ModelPlan) -> dict[str, Floats]:
    """Return the factors of the rotation, where the model scales it."""
    return {name: np.array(values, dtype=np.float32) for name, values in plan.factors.items()}
