"""What llama.cpp must be told about a model: its metadata and the complete list of its tensors.

Goes in: config.json and the rules of its architecture. Comes out: `ModelPlan`. Never does: skip a field of
config.json that it does not know; touch weights.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError
from advisor.export.checkpoint import Floats
from advisor.export.rules import Architecture, rules
from advisor.types import Record

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_READ = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "hidden_act", "tie_word_embeddings", "sliding_window", "use_sliding_window",
    "layer_types", "quantization_config", "partial_rotary_factor",
}  # fmt: skip
_ROPE_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
        "truncate",
    },
}  # fmt: skip
MetaValue = int | float | bool | str


class PlannedTensor(Record, frozen=True, kw_only=True):
    """One tensor of the GGUF file and where its numbers come from."""

    name: str
    origin: str
    """Name of the parameter in transformers."""
    shape: tuple[int, ...]
    heads: int = 0
    """Not 0: the rows of so many heads are reordered for llama.cpp's rotation."""


class ModelPlan(Record, frozen=True, kw_only=True):
    """The model as llama.cpp sees it."""

    architecture: Architecture
    metadata: dict[str, MetaValue]
    tensors: tuple[PlannedTensor, ...]
    layers: int
    vocab: int
    rope_factors: tuple[float, ...] = ()
    """One for each pair of rotated dimensions; empty: none."""
    notes: tuple[str, ...] = ()


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Return the rules of the architecture that config.json names.

    Raises:
        ExportError: the architecture is not in kb/rules/gguf.toml, or the weights are quantised.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    known = rules().architectures
    if name not in known:
        raise ExportError(
            f"The architecture {name} cannot be exported to GGUF here. Known: {', '.join(sorted(known))}.",
            "Export merged weights instead: ftadvisor export FOLDER --to merged",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ExportError(
            f"The base weights are quantised ({method}); a GGUF must be made from the unquantised model.",
            "Name the original 16-bit model as the base.",
        )
    return known[name]


def plan_model(config: dict[str, Any], *, own_head: bool) -> ModelPlan:
    """Work out metadata and tensors; refuse what llama.cpp would compute differently.

    Args:
        config: config.json.
        own_head: the output layer has weights of its own in the file (not tied, or untied by an adapter).

    Raises:
        ExportError: a field is unknown, or has a value that llama.cpp does not follow.
    """
    architecture = architecture_of(config)
    _check_fields(config, architecture)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    if not architecture.free_head_dim and head_dim * heads != hidden:
        raise ExportError(
            f"{heads} heads of {head_dim} dimensions are not the width {hidden}, which llama.cpp assumes for "
            f"{architecture.gguf}.",
            "This model cannot be exported to GGUF.",
        )
    context, notes = _context(config, architecture)
    rope, factors = _rope(config, architecture, head_dim)
    keys = gguf.Keys
    metadata: dict[str, MetaValue] = {
        keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        keys.LLM.CONTEXT_LENGTH: context,
        keys.LLM.EMBEDDING_LENGTH: hidden,
        keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        keys.Attention.HEAD_COUNT: heads,
        keys.Attention.HEAD_COUNT_KV: config.get("num_key_value_heads") or heads,
        keys.Attention.LAYERNORM_RMS_EPS: float(config["rms_norm_eps"]),
        keys.Attention.KEY_LENGTH: head_dim,
        keys.Attention.VALUE_LENGTH: head_dim,
        keys.Rope.DIMENSION_COUNT: head_dim,
        keys.LLM.VOCAB_SIZE: config["vocab_size"],
        **rope,
    }
    return ModelPlan(
        architecture=architecture,
        metadata={key.format(arch=architecture.gguf): value for key, value in metadata.items()},
        tensors=_tensors(config, architecture, head_dim, own_head=own_head),
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        rope_factors=factors,
        notes=notes,
    )


def _check_fields(config: dict[str, Any], architecture: Architecture) -> None:
    known = _READ | set(rules().config.without_effect) | set(architecture.fixed) | set(architecture.biases)
    unknown = sorted(key for key, value in config.items() if key not in known and value is not None)
    if unknown:
        raise ExportError(
            f"config.json has fields whose effect on the arithmetic is not known here: {', '.join(unknown)}.",
            "If they change nothing, remove them from a copy of config.json; otherwise export --to merged.",
        )
    missing = sorted(
        _READ_ALWAYS - {key for key, value in config.items() if value is not None},
    )
    if missing:
        raise ExportError(
            f"config.json lacks {', '.join(missing)}.", "Save the model again with save_pretrained."
        )
    expected = {**architecture.fixed, "hidden_act": (architecture.activation,)}
    if config.get("partial_rotary_factor") is not None:
        expected["partial_rotary_factor"] = (1, 1.0)
    for key, values in expected.items():
        given = config.get(key)
        if given is not None and given not in values:
            raise ExportError(
                f"config.json says {key} = {given!r}; llama.cpp computes {architecture.gguf} with "
                f"{values[0]!r}.",
                "This model cannot be exported to GGUF; export --to merged instead.",
            )


_READ_ALWAYS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
}  # fmt: skip


def _context(config: dict[str, Any], architecture: Architecture) -> tuple[int, tuple[str, ...]]:
    """Return the context in tokens; a sliding window shortens it, because llama.cpp attends to everything."""
    context: int = config["max_position_embeddings"]
    window = config.get("sliding_window")
    slides = architecture.window == "always" or bool(config.get("use_sliding_window"))
    slides = slides or "sliding_attention" in (config.get("layer_types") or ())
    if not slides or window is None or window >= context:
        return context, ()
    if architecture.window == "never":
        raise ExportError(
            f"config.json asks for a sliding window, which llama.cpp does not apply to {architecture.gguf}.",
            "This model cannot be exported to GGUF; export --to merged instead.",
        )
    note = (
        f"context shortened from {context} to the sliding window of {window} tokens, within which it is exact"
    )
    return int(window), (note,)


def _rope(
    config: dict[str, Any], architecture: Architecture, head_dim: int
) -> tuple[dict[str, MetaValue], tuple[float, ...]]:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in architecture.rope:
        raise ExportError(
            f"Rotary scaling {kind!r} is not supported for {architecture.gguf}; "
            f"supported: {', '.join(architecture.rope)}.",
            "This model cannot be exported to GGUF; export --to merged instead.",
        )
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    fields = {key: value for key, value in scaling.items() if value is not None}
    unknown = sorted(
        set(fields) - _ROPE_FIELDS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    )
    if unknown or fields.get("partial_rotary_factor", 1) != 1 or not _yarn_is_plain(kind, fields):
        raise ExportError(
            f"Rotary scaling {kind!r} with these fields is not known here: {fields}.",
            "This model cannot be exported to GGUF; export --to merged instead.",
        )
    keys = gguf.Keys.Rope
    found: dict[str, MetaValue] = {keys.FREQ_BASE: theta}
    if kind == "llama3":
        return found, _llama3_factors(fields, theta, head_dim)
    if kind != "default":
        found |= {keys.SCALING_TYPE: kind, keys.SCALING_FACTOR: float(fields["factor"])}
    if kind == "yarn":
        original = fields.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found[keys.SCALING_ORIG_CTX_LEN] = int(original)
    return found, ()


def _yarn_is_plain(kind: str, fields: dict[str, Any]) -> bool:
    """Whether the optional YaRN fields have the values that both sides take by default."""
    if kind != "yarn":
        return True
    usual = 0.1 * math.log(fields["factor"]) + 1
    return (
        fields.get("beta_fast", 32) == 32
        and fields.get("beta_slow", 1) == 1
        and fields.get("truncate", True) is True
        and math.isclose(fields.get("attention_factor", usual), usual, rel_tol=1e-4)
    )


def _llama3_factors(fields: dict[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Return by how much each rotation slows down.

    Wavelengths below the high-frequency limit keep their speed, those above the low-frequency limit are
    stretched by `factor`, and those between are interpolated in frequency.
    """
    original = fields["original_max_position_embeddings"]
    low, high, factor = fields["low_freq_factor"], fields["high_freq_factor"], fields["factor"]
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequency / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(value) for value in 1.0 / (share + (1.0 - share) / factor))


def _tensors(
    config: dict[str, Any], architecture: Architecture, head_dim: int, *, own_head: bool
) -> tuple[PlannedTensor, ...]:
    names = gguf.get_tensor_name_map(_enum(architecture.gguf), config["num_hidden_layers"])
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
    }  # fmt: skip
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads} if architecture.permute else {}
    biased = {
        module
        for field, modules in architecture.biases.items()
        if field == "always" or config.get(field)
        for module in modules
    }

    def planned(origin: str, shape: tuple[int, ...], heads_: int = 0) -> PlannedTensor:
        name = names.get_name(origin, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"{origin} has no name in {architecture.gguf}.", "Report this model's config.json."
            )
        return PlannedTensor(name=name, origin=origin, shape=shape, heads=heads_)

    found = [planned(EMBEDDING, (vocab, hidden)), planned(FINAL_NORM, (hidden,))]
    if own_head:
        found.append(planned(HEAD, (vocab, hidden)))
    for i in range(config["num_hidden_layers"]):
        for module in architecture.linears + architecture.norms:
            origin = f"model.layers.{i}.{module}"
            found.append(planned(f"{origin}.weight", shapes[module], turned.get(module, 0)))
            if module in biased:
                found.append(planned(f"{origin}.bias", shapes[module][:1], turned.get(module, 0)))
    return tuple(found)


def _enum(name: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def row_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Return, for each row in the file, the row of transformers that belongs there.

    transformers rotates dimension i with i + half; llama.cpp's `llama` rotates neighbours.
    """
    half = rows // heads // 2
    index = np.arange(rows, dtype=np.intp).reshape(heads, 2, half)
    return index.swapaxes(1, 2).reshape(rows)


def rope_tensor(plan: ModelPlan) -> tuple[str, Floats] | None:
    """Return name and values of the rotation factors, where the model scales its rotations."""
    if not plan.rope_factors:
        return None
    name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
    return name, np.array(plan.rope_factors, dtype=np.float32)
