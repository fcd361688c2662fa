"""Is every field of config.json known, and does llama.cpp follow its value?

Goes in: config.json and the rules of its architecture. Comes out: the fields under their usual names, the
context that is exact. Never does: skip a field that it does not know.
"""

from __future__ import annotations

from typing import Any

from advisor.errors import ExportError
from advisor.gguf_rules import Architecture, rules

_READ = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "hidden_act", "hidden_activation", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "layer_types", "quantization_config", "partial_rotary_factor", "no_rope_layers",
    "query_pre_attn_scalar", "rope_local_base_freq", "original_max_position_embeddings",
}  # fmt: skip
_READ_ALWAYS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
}  # fmt: skip
_ONLY_SOME = {
    "query_pre_attn_scalar": "head_scale_layers",
    "no_rope_layers": "no_rope_interval",
    "rope_local_base_freq": "window_period",
    "original_max_position_embeddings": "partial_rotary",
}
"""Field -> the rule without which an architecture does not know it."""
_MERGED = "This model cannot be exported to GGUF; export --to merged instead."


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Return the rules of the architecture that config.json names.

    Raises:
        ExportError: the architecture is not in kb/rules/gguf.toml, or the weights are quantised.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    known = rules().architectures
    if name not in known:
        raise ExportError(
            f"The architecture {name} is not known here. Known: {', '.join(sorted(known))}.",
            "Ask for --to gguf alone, which llama.cpp's own converter then writes; or --to merged.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ExportError(
            f"The base weights are quantised ({method}); a GGUF must be made from the unquantised model.",
            "Name the original 16-bit model as the base.",
        )
    return known[name]


def vocabulary_rows(config: dict[str, Any]) -> int:
    """Return the rows of the embedding.

    Raises:
        ExportError: config.json names none, as those of models with several parts do.
    """
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        raise ExportError(
            "config.json names no vocab_size: it describes a model of several parts, or is incomplete.",
            "Export the language model alone, saved with save_pretrained.",
        )
    return rows


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the base shares embedding and output layer; any architecture, known or not."""
    known = rules().architectures.get((config.get("architectures") or [""])[0])
    return bool(config.get("tie_word_embeddings", known is not None and known.tied))


def usual_fields(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return config.json under the usual names, with the architecture's defaults, once it is all understood.

    Raises:
        ExportError: a field is unknown, missing, or has a value that llama.cpp does not follow.
    """
    own = {theirs: usual for usual, theirs in architecture.names.items()}
    fields = {**architecture.defaults, **{own.get(key, key): value for key, value in config.items()}}
    if fields.get("intermediate_size") is None and architecture.inner_factor and fields.get("hidden_size"):
        fields["intermediate_size"] = architecture.inner_factor * fields["hidden_size"]
    _check_known(fields, architecture)
    _check_values(fields, architecture)
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    _check_heads(fields, architecture)
    return fields


def _check_known(fields: dict[str, Any], architecture: Architecture) -> None:
    known = _READ | set(rules().config.without_effect) | set(architecture.fixed) | set(architecture.biases)
    known |= set(architecture.floats.values())
    known -= {field for field, rule in _ONLY_SOME.items() if not getattr(architecture, rule)}
    unknown = sorted(key for key, value in fields.items() if key not in known and value is not None)
    if unknown:
        raise ExportError(
            f"config.json has fields whose effect on the arithmetic is not known here: {', '.join(unknown)}.",
            "If they change nothing, remove them from a copy of config.json; otherwise export --to merged.",
        )
    missing = sorted(
        architecture.names.get(key, key)
        for key in _READ_ALWAYS | set(architecture.required)
        if fields.get(key) is None
    )
    if missing:
        raise ExportError(
            f"config.json lacks {', '.join(missing)}.", "Save the model again with save_pretrained."
        )


def _check_values(fields: dict[str, Any], architecture: Architecture) -> None:
    expected = {
        **architecture.fixed, "hidden_act": architecture.activation,
        "hidden_activation": architecture.activation,
    }  # fmt: skip
    if not architecture.partial_rotary:
        expected["partial_rotary_factor"] = (1, 1.0)
    for key, values in expected.items():
        given = fields.get(key)
        if given is None or given in values:
            continue
        computed = f"with {values[0]!r}" if values else "without it"
        raise ExportError(
            f"config.json says {architecture.names.get(key, key)} = {given!r}; llama.cpp computes "
            f"{architecture.gguf} {computed}.",
            _MERGED,
        )


def _check_heads(fields: dict[str, Any], architecture: Architecture) -> None:
    heads, hidden, head_dim = fields["num_attention_heads"], fields["hidden_size"], fields["head_dim"]
    if not architecture.free_head_dim and head_dim * heads != hidden:
        raise ExportError(
            f"{heads} heads of {head_dim} dimensions are not the width {hidden}, which llama.cpp assumes for "
            f"{architecture.gguf}.",
            "This model cannot be exported to GGUF.",
        )
    scale = fields.get("query_pre_attn_scalar")
    by_width = fields["num_hidden_layers"] == architecture.head_scale_layers
    usual = hidden // heads if by_width else head_dim
    if scale is not None and scale != usual:
        raise ExportError(
            f"config.json says query_pre_attn_scalar = {scale}; llama.cpp computes {architecture.gguf} of "
            f"this size with {usual}.",
            _MERGED,
        )
    given = fields.get("no_rope_layers")
    every = architecture.no_rope_interval
    layers = fields["num_hidden_layers"]
    if given is not None and every and list(given[:layers]) != _pattern(layers, every):
        raise ExportError(
            f"config.json leaves the rotation out of other layers than every {every}th, as llama.cpp does.",
            _MERGED,
        )


def _pattern(layers: int, period: int) -> list[int]:
    return [int((number + 1) % period != 0) for number in range(layers)]


def exact_context(
    fields: dict[str, Any], architecture: Architecture
) -> tuple[int, int | None, tuple[str, ...]]:
    """Return the context in tokens, the window that llama.cpp itself applies, and notes.

    Where llama.cpp attends to everything, a sliding window shortens the context.
    """
    context: int = fields["max_position_embeddings"]
    window, types = fields.get("sliding_window"), fields.get("layer_types")
    if architecture.window == "alternating":
        return context, _alternating(fields, architecture), ()
    slides = architecture.window == "always" or bool(fields.get("use_sliding_window"))
    slides = slides or "sliding_attention" in (types or ())
    if not slides or window is None or window >= context:
        return context, None, ()
    if architecture.window == "never":
        raise ExportError(
            f"config.json asks for a sliding window, which llama.cpp does not apply to {architecture.gguf}.",
            _MERGED,
        )
    note = (
        f"context shortened from {context} to the sliding window of {window} tokens, within which it is exact"
    )
    return int(window), None, (note,)


def _alternating(fields: dict[str, Any], architecture: Architecture) -> int | None:
    layers, period = fields["num_hidden_layers"], architecture.window_period
    usual = ["sliding_attention" if slides else "full_attention" for slides in _pattern(layers, period)]
    given = list(fields.get("layer_types") or usual)
    window = fields.get("sliding_window")
    can_be_off = "sliding_window" not in architecture.required
    if can_be_off and (window is None or set(given) == {"full_attention"}):
        return None
    if given != usual:
        raise ExportError(
            f"config.json alternates full and sliding attention differently from llama.cpp, for which every "
            f"{period}th layer of {architecture.gguf} attends to everything.",
            _MERGED,
        )
    return int(fields["sliding_window"])
