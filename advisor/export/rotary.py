"""How a model's rotary positions are told to llama.cpp.

Goes in: the fields of config.json, the rules of the architecture. Comes out: `Rotation`. Never does: accept a
scaling, or a field of one, that llama.cpp computes differently.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from advisor.errors import ExportError
from advisor.gguf_rules import Architecture
from advisor.types import Record

_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
        "truncate",
    },
    "longrope": {
        "factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor",
    },
}  # fmt: skip
_ANY_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OLD_NAMES = {"su": "longrope"}
_USUAL_THETA = 10000.0
_MERGED = "This model cannot be exported to GGUF; export --to merged instead."


class Rotation(Record, frozen=True, kw_only=True):
    """Metadata and tensors of the rotary positions."""

    metadata: dict[str, int | float | bool | str] = {}
    tensors: dict[str, tuple[float, ...]] = {}
    """One factor for each pair of rotated dimensions."""
    notes: tuple[str, ...] = ()


def rotation(fields: dict[str, Any], architecture: Architecture) -> Rotation:
    """Return what the file must say.

    Raises:
        ExportError: llama.cpp does not rotate as config.json asks.
    """
    if not architecture.rope:
        return Rotation()
    scaling, local = _scaling(fields)
    kind = _kind(scaling, architecture)
    given = _checked(scaling, kind, architecture)
    theta = float(scaling.get("rope_theta") or fields.get("rope_theta") or _USUAL_THETA)
    share = given.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    rotated = int(fields["head_dim"] * share)
    keys = gguf.Keys.Rope
    metadata: dict[str, int | float | bool | str] = {keys.DIMENSION_COUNT: rotated, keys.FREQ_BASE: theta}
    if architecture.window_period and local is not None:
        metadata[keys.FREQ_BASE_SWA] = local
    if kind == "llama3":
        factors = _llama3_factors(given, theta, rotated)
        return Rotation(metadata=metadata, tensors={_tensor(gguf.MODEL_TENSOR.ROPE_FREQS): factors})
    if kind == "longrope":
        return _longrope(given, fields, rotated, metadata)
    if kind in ("linear", "yarn"):
        metadata |= {keys.SCALING_TYPE: kind, keys.SCALING_FACTOR: float(given["factor"])}
    if kind == "yarn":
        original = given.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        metadata[keys.SCALING_ORIG_CTX_LEN] = int(original)
    return Rotation(metadata=metadata)


def _tensor(which: gguf.MODEL_TENSOR) -> str:
    return str(gguf.TENSOR_NAMES[which]) + ".weight"


def _scaling(fields: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the scaling of layers that attend to everything, and the base of those with a window."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    local = fields.get("rope_local_base_freq")
    if "full_attention" not in given and "sliding_attention" not in given:
        return given, None if local is None else float(local)
    sliding = given.get("sliding_attention") or {}
    if sliding.get("rope_type", "default") != "default":
        raise ExportError("Layers with a window scale their rotation, which llama.cpp does not.", _MERGED)
    return given.get("full_attention") or {}, float(sliding.get("rope_theta") or local or _USUAL_THETA)


def _kind(scaling: dict[str, Any], architecture: Architecture) -> str:
    given = scaling.get("rope_type", scaling.get("type", "default"))
    kind = _OLD_NAMES.get(given, given)
    if kind not in architecture.rope:
        raise ExportError(
            f"Rotary scaling {given!r} is not supported for {architecture.gguf}; "
            f"supported: {', '.join(architecture.rope)}.",
            _MERGED,
        )
    return str(kind)


def _checked(scaling: dict[str, Any], kind: str, architecture: Architecture) -> dict[str, Any]:
    given = {key: value for key, value in scaling.items() if value is not None}
    known = _FIELDS[kind] | _ANY_FIELDS
    # Phi-3 repeats the length there whatever the scaling.
    known |= {"original_max_position_embeddings"} if architecture.partial_rotary else set()
    partial = given.get("partial_rotary_factor", 1) != 1 and not architecture.partial_rotary
    if set(given) - known or partial or not _yarn_is_plain(kind, given):
        raise ExportError(f"Rotary scaling {kind!r} with these fields is not known here: {given}.", _MERGED)
    return given


def _yarn_is_plain(kind: str, given: dict[str, Any]) -> bool:
    """Whether the optional YaRN fields have the values that both sides take by default."""
    if kind != "yarn":
        return True
    usual = 0.1 * math.log(given["factor"]) + 1
    return (
        given.get("beta_fast", 32) == 32
        and given.get("beta_slow", 1) == 1
        and given.get("truncate", True) is True
        and math.isclose(given.get("attention_factor", usual), usual, rel_tol=1e-4)
    )


def _llama3_factors(given: dict[str, Any], theta: float, rotated: int) -> tuple[float, ...]:
    """Return by how much each rotation slows down.

    Wavelengths below the high-frequency limit keep their speed, those above the low-frequency limit are
    stretched by `factor`, and those between are interpolated in frequency.
    """
    original = given["original_max_position_embeddings"]
    low, high, factor = given["low_freq_factor"], given["high_freq_factor"], given["factor"]
    frequency = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    turns = original * frequency / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(value) for value in 1.0 / (share + (1.0 - share) / factor))


def _longrope(
    given: dict[str, Any],
    fields: dict[str, Any],
    rotated: int,
    metadata: dict[str, int | float | bool | str],
) -> Rotation:
    """Two sets of factors: one within the original length, one for longer contexts."""
    original = given.get("original_max_position_embeddings") or fields["original_max_position_embeddings"]
    factor = given.get("factor") or fields["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    keys, names = gguf.Keys.Rope, gguf.MODEL_TENSOR
    tensors = {
        _tensor(names.ROPE_FACTORS_LONG): tuple(map(float, given["long_factor"])),
        _tensor(names.ROPE_FACTORS_SHORT): tuple(map(float, given["short_factor"])),
    }
    if any(len(values) != rotated // 2 for values in tensors.values()):
        raise ExportError(f"longrope needs {rotated // 2} factors in each of its two lists.", _MERGED)
    metadata |= {
        keys.SCALING_ORIG_CTX_LEN: int(original),
        keys.SCALING_ATTN_FACTOR: float(given.get("attention_factor") or usual),
    }
    note = (
        f"llama.cpp takes the factors for long texts whenever its context is set above {original} tokens; "
        "the trained model takes them only for texts that long"
    )
    return Rotation(metadata=metadata, tensors=tensors, notes=(note,))
