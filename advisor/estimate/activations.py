"""How many bytes does one block keep for the backward pass, and how many does the loss need?

Goes in: a ModelSpec, its Layout and MemorySettings. Comes out: bytes for one token or one batch.
Never does: sum up a phase; that is memory.py. Counts follow the operators that the model library runs: a tensor is
kept when an operator's backward reads it.
"""

from __future__ import annotations

from advisor.estimate.layers import GEMMA, Layout, targeted
from advisor.estimate.tunable import LOW_RANK, VIRTUAL, tuner_name
from advisor.types import MemorySettings, ModelSpec

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
PAIRED = frozenset({"dpo", "orpo", "simpo", "reward"})


def compute_bytes(settings: MemorySettings) -> int:
    """Bytes of one activation entry."""
    return 4 if settings.precision == "fp32" else 2


def rows(settings: MemorySettings) -> int:
    """Sequences in one forward pass: a preference row is a chosen and a rejected one."""
    return settings.micro_batch * (2 if settings.objective in PAIRED else 1)


def tokens(settings: MemorySettings) -> int:
    """Tokens in one forward pass, virtual ones included."""
    extra = settings.virtual_tokens if tuner_name(settings.tuner) in ("prompt_tuning", "p_tuning") else 0
    return rows(settings) * (settings.seq_len + extra)


def stream_bytes(settings: MemorySettings) -> int:
    """Bytes of one entry of the residual stream: weights in 32 bits keep it in 32 bits."""
    return 4 if settings.weight_bits == 32 else compute_bytes(settings)


def saved_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes that one block keeps for each token when nothing is recomputed."""
    return (
        _norms(spec, plan, settings)
        + _attention(spec, settings)
        + _mlp(spec, settings)
        + _tuner(spec, plan, settings)
    )


def _norms(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """The 32-bit input of each norm; with a trained scale, its normalised output too."""
    entries = sum(
        spec.shape.heads * spec.shape.head_dim if name == "q_norm"
        else spec.shape.kv_heads * spec.shape.head_dim if name == "k_norm"
        else spec.shape.hidden
        for name, _ in plan.norm_entries
    )  # fmt: skip
    kept = 4 * entries
    if spec.model_type in GEMMA:
        kept += 4 * entries
    if tuner_name(settings.tuner) in ("full", "layernorm"):
        kept += compute_bytes(settings) * entries
    return kept


def _attention(spec: ModelSpec, settings: MemorySettings) -> int:
    """Query, key, value, output and what the attention kernel keeps."""
    shape, size = spec.shape, compute_bytes(settings)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if settings.attention == "eager":
        keys = settings.seq_len + settings.virtual_tokens
        scores = shape.heads * keys * (4 if size == 4 else 6)
        return size * 4 * query + scores
    if masked(settings):
        return size * 4 * query + 4 * shape.heads
    return size * (2 * query + 2 * key) + 4 * shape.heads


def masked(settings: MemorySettings) -> bool:
    """True when a padded batch hands SDPA a mask: keys and values are then repeated for every head."""
    return settings.attention == "sdpa" and (
        settings.packed or rows(settings) > 1 or settings.virtual_tokens > 0
    )


def _mlp(spec: ModelSpec, settings: MemorySettings) -> int:
    """Gate, its activation and the up projection."""
    return compute_bytes(settings) * 3 * spec.shape.intermediate


def _tuner(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """What training the weights (or the adapters beside them) keeps beyond a frozen block."""
    tuner, size = tuner_name(settings.tuner), compute_bytes(settings)
    hidden, ffn = spec.shape.hidden, spec.shape.intermediate
    if tuner == "full":
        return size * (2 * hidden + ffn)
    if tuner in LOW_RANK:
        chosen = targeted(plan.linears, settings.target)
        width = adapter_bytes(settings)
        return sum(width * one.inputs + size * settings.lora_r for one in chosen)
    if tuner in ("ia3", "vera", "adapter"):
        chosen = targeted(plan.linears, settings.target)
        return (
            sum(size * (one.inputs + one.outputs) // 2 for one in chosen)
            if tuner != "adapter"
            else 4 * size * hidden
        )
    return 0 if tuner in VIRTUAL else 0


def adapter_bytes(settings: MemorySettings) -> int:
    """Bytes of one adapter weight: 32 bits beside a 16-bit base, 16 bits beside a quantised one."""
    if settings.precision == "fp32":
        return 4
    return 2 if settings.weight_bits in (4, 8) else 4


def loss_bytes(spec: ModelSpec, settings: MemorySettings, head_trained: int) -> int:
    """Bytes of logits, their gradient and the loss at their peak."""
    if settings.objective == "reward":
        return 0
    count, size = tokens(settings), compute_bytes(settings)
    if settings.loss == "full_logits":
        return count * spec.shape.vocab * (size + 12)
    tile = min(count, TILE_TOKENS) * min(spec.shape.vocab, TILE_VOCABULARY)
    copies = size if settings.device == "cuda" else size + 20
    return tile * copies + 4 * count * spec.shape.hidden + 4 * head_trained
