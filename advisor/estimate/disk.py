"""How much disk does a plan need: download, checkpoints, the result, the exported files?

Goes in: a ModelSpec, MemorySettings and bits per weight of each export. Comes out: bytes by purpose.
Never does: look at a disk; write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advisor.estimate.activations import adapter_bytes
from advisor.estimate.layers import layout
from advisor.estimate.tunable import count, tuner_name
from advisor.types import MemorySettings, ModelSpec

GGUF_HEADER_BYTES = 8 * 1024 * 1024
"""Room for the tokenizer and the metadata of a GGUF file beside its tensors."""
NORM_BITS = 32


def gguf_bytes(spec: ModelSpec, bits_per_weight: float) -> int:
    """Size of a GGUF file whose matrices average `bits_per_weight`; norms stay in 32 bits.

    Args:
        spec: the model.
        bits_per_weight: mean over all matrices, embeddings included, as llama.cpp reports it.
    """
    plan = layout(spec)
    vectors = plan.blocks * (plan.block_norms + plan.block_biases) + plan.final_norm
    matrices = plan.parameters - vectors
    vocabulary = spec.shape.vocab * 24
    return (
        round(matrices * bits_per_weight / 8) + vectors * NORM_BITS // 8 + vocabulary + GGUF_HEADER_BYTES // 8
    )


def estimate_disk(
    spec: ModelSpec,
    settings: MemorySettings,
    *,
    tuner: str,
    keep_checkpoints: int,
    quants: Sequence[str],
    bits_per_weight: Mapping[str, float],
) -> dict[str, int]:
    """Estimate the disk that a plan needs.

    Args:
        spec: the model.
        settings: those of the training stage.
        tuner: how the weights move; full tuning saves all of them.
        keep_checkpoints: checkpoints kept at a time; one more exists while a new one is written.
        quants: names of the GGUF files to write.
        bits_per_weight: bits of each of those names.

    Returns:
        Bytes for `download` (0 when the model is a folder here), `checkpoints`, `result`, `export`, `total`.
    """
    plan = layout(spec)
    trained = count(spec, plan, settings)
    full = tuner_name(tuner) == "full"
    width = (4 if settings.weight_bits == 32 else 2) if full else adapter_bytes(settings)
    weights = trained * width
    stored = 4 if spec.weight_dtype in ("float32", "fp32") else 2
    found = {
        "download": 0 if spec.path else spec.parameters * stored,
        "checkpoints": (keep_checkpoints + 1) * weights * 3,
        "result": weights,
        "export": sum(gguf_bytes(spec, bits_per_weight[name]) for name in quants),
    }
    return {**found, "total": sum(found.values())}
