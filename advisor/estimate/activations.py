"""How many bytes does one block keep for the backward pass, and how many does the loss need?

Goes in: a ModelSpec, its Layout and MemorySettings. Comes out: bytes for one token, one block or one batch.
Never does: sum up a phase; that is memory.py.

A tensor is kept when the backward of an operator reads it. The counts were read off the saved tensors of each
family on the meta device and hold for every width. Letters: h hidden, f intermediate, q and kv projection
widths, a bytes of an activation entry, s bytes of an entry of the residual stream.
"""

from __future__ import annotations

from advisor.estimate import adapted, stated
from advisor.estimate.layers import ATTENTION, FOUR_NORMS, GEMMA, QK_NORM_WHOLE, Layout, Linear, targeted
from advisor.estimate.tunable import (
    LOW_RANK,
    adapters_in_block,
    ia3_targets,
    outputs,
    preserved,
    tuner_name,
    tunes_norm,
)
from advisor.types import MemorySettings, ModelSpec

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
PAIRED = frozenset({"dpo", "orpo", "simpo", "reward"})
ALWAYS_CHUNKED = frozenset({"dpo", "kto", "rloo", "grpo"})
"""Objectives whose trainer computes the loss tile by tile, whatever the setting says."""
PAIR_LOSS = frozenset({"orpo", "simpo"})
"""Objectives whose loss is our own: it drops the logits as soon as it has their log-probabilities."""
PASSING = frozenset({
    "activations", "recomputed", "activation_gradients", "adapted_product", "final_norm", "logits_and_loss",
})  # fmt: skip
"""Parts that come and go with every micro batch, by name."""
SOFT_CAPPED = frozenset({"gemma2"})
INTO_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"})
INTO_MLP = frozenset({"gate_proj", "up_proj", "gate_up_proj", "c_fc"})
OUT_OF_MLP = frozenset({"down_proj", "mlp.c_proj"})


def compute_bytes(settings: MemorySettings) -> int:
    """Bytes of one activation entry (a)."""
    return 4 if settings.precision == "fp32" else 2


def mixed(settings: MemorySettings) -> bool:
    """True when matrix products cast their inputs: autocast in a half precision."""
    return settings.autocast and settings.precision != "fp32"


def stream_bytes(settings: MemorySettings) -> int:
    """Bytes of one entry of the residual stream (s): 32-bit weights keep it in 32 bits."""
    return 4 if settings.weight_bits == 32 else compute_bytes(settings)


def adapter_bytes(settings: MemorySettings) -> int:
    """Bytes of one adapter weight; 32 bits unless told otherwise, since small updates vanish in 16."""
    return (settings.adapter_bits or 32) // 8


def rows(settings: MemorySettings) -> int:
    """Sequences in one forward pass: a preference row is a chosen and a rejected one."""
    return settings.micro_batch * (2 if settings.objective in PAIRED else 1)


def tokens(settings: MemorySettings) -> int:
    """Positions in one forward pass, virtual tokens included."""
    extra = settings.virtual_tokens if tuner_name(settings.tuner) in ("prompt_tuning", "p_tuning") else 0
    return rows(settings) * (settings.seq_len + extra)


def masked(settings: MemorySettings) -> bool:
    """True when SDPA gets a mask: keys and values are then repeated for every query head and kept."""
    return settings.attention == "sdpa" and (settings.packed or rows(settings) > 1)


def trains_everything(settings: MemorySettings) -> bool:
    """True when every matrix has a gradient."""
    return tuner_name(settings.tuner) == "full"


def saved_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes that one block keeps for each token when nothing is recomputed."""
    return (
        _norms(spec, plan, settings)
        + _attention(spec, settings)
        + _mlp(spec, settings)
        + _inputs(spec, plan, settings)
    )


def saved_casts(plan: Layout, settings: MemorySettings, trainable: int) -> int:
    """Bytes of weights that one block makes and keeps: 16-bit copies under autocast, orthogonal subspaces put
    together anew (old and new directions side by side), or what is stated."""
    if settings.stated is not None:
        return stated.kept_bytes(settings.stated, targeted(plan.linears, settings.target), settings.lora_r)
    subspaces = tuner_name(settings.tuner) == "osf"
    joined = compute_bytes(settings) * 2 * trainable // max(plan.blocks, 1) if subspaces else 0
    if not mixed(settings):
        return joined
    if subspaces:
        return joined + (2 * plan.block_weights if settings.weight_bits == 32 else 0)
    copies = 2 * plan.block_weights if settings.weight_bits == 32 else 0
    if not trains_everything(settings) and adapter_bytes(settings) == 4:
        copies += 2 * trainable // max(plan.blocks, 1)
    return copies


def _norm_width(spec: ModelSpec, name: str) -> int:
    if name == "q_norm":
        return spec.shape.heads * spec.shape.head_dim
    return spec.shape.kv_heads * spec.shape.head_dim if name == "k_norm" else spec.shape.hidden


def _norms(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    return sum(_norm(spec, settings, name) for name, _ in plan.norm_entries)


def _norm(spec: ModelSpec, settings: MemorySettings, name: str) -> int:
    """The 32-bit input of a norm and its scale factor; with a trained scale, the normalised output too."""
    width, tuner = _norm_width(spec, name), tuner_name(settings.tuner)
    own_type = compute_bytes(settings) if name in ("q_norm", "k_norm") else stream_bytes(settings)
    if spec.model_type == "gpt2":
        return (4 if mixed(settings) else own_type) * width + 8
    kept = 4 * width + 4 * max(1, width // spec.shape.head_dim if name in ("q_norm", "k_norm") else 1)
    if tuner == "full" or (tuner == "layernorm" and tunes_norm(spec, name)):
        kept += (4 if spec.model_type in GEMMA | QK_NORM_WHOLE else own_type) * width
    return kept


def _attention(spec: ModelSpec, settings: MemorySettings) -> int:
    """Query, key, value, output and what the attention kernel keeps."""
    shape, a = spec.shape, compute_bytes(settings)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    prefix = settings.virtual_tokens if tuner_name(settings.tuner) == "prefix_tuning" else 0
    longer = 1 + prefix / settings.seq_len
    if settings.attention == "eager":
        return round(a * (2 * query + 2 * query * longer)) + shape.heads * (settings.seq_len + prefix) * (
            4 if a == 4 else 6
        )
    fused = a * (query + key) if spec.model_type == "phi3" else 0
    if masked(settings) and shape.kv_heads < shape.heads:
        repeated = query if shape.kv_heads > 1 else key
        positions = tokens(settings) // rows(settings)
        cached = (
            2 * key * longer if prefix else 0
        )  # the cache that hands over the prefix, beside the repeated
        return round(a * (2 * query + 2 * repeated * longer + cached)) + 4 * shape.heads + a * positions
    bias = a * (tokens(settings) // rows(settings)) if masked(settings) else 0
    return round(a * (2 * query + 2 * key * longer)) + 4 * shape.heads + fused + bias


def _inner_bytes(settings: MemorySettings) -> int:
    """Bytes of one entry inside the MLP: orthogonal subspaces give back the format that they are given."""
    return stream_bytes(settings) if tuner_name(settings.tuner) == "osf" else compute_bytes(settings)


def _mlp(spec: ModelSpec, settings: MemorySettings) -> int:
    """Gate, its activation and the up projection; GPT-2 composes its activation of four."""
    return _inner_bytes(settings) * (4 if spec.model_type == "gpt2" else 3) * spec.shape.intermediate


def _reads_hidden(linear: Linear) -> bool:
    return linear.name not in OUT_OF_MLP and linear.name not in ("o_proj", "attn.c_proj")


def _inputs(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Inputs of matrix products whose weights have a gradient, and what adapters keep beside them."""
    tuner, a = tuner_name(settings.tuner), compute_bytes(settings)
    hidden, ffn = spec.shape.hidden, spec.shape.intermediate
    if tuner == "full":
        copied = mixed(settings) and settings.weight_bits == 32
        readers = sum(_reads_hidden(one) for one in plan.linears) if copied else 2
        return a * (readers * hidden + ffn)
    chosen = targeted(plan.linears, settings.target)
    if settings.stated is not None:
        return stated.token_bytes(settings.stated, chosen, settings.lora_r)
    if tuner == "osf":
        moving = sum(
            min(one.inputs, one.outputs) - preserved(one, settings.preserved_share) for one in chosen
        )
        return _adapter_inputs(spec, chosen, settings, inner=2 * moving)
    if tuner in LOW_RANK:
        kept = _adapter_inputs(spec, chosen, settings, inner=settings.lora_r * len(chosen))
        if tuner == "dora":  # the magnitude's gradient reads both results
            kept += (a + widths(settings).product) * sum(one.outputs for one in chosen)
        return kept
    if tuner == "ia3":
        scaled = ia3_targets(spec, plan, settings)
        return sum(4 * one.inputs if one.name in OUT_OF_MLP else a * one.outputs for one in scaled)
    if tuner == "adapter":
        return adapters_in_block(settings) * a * (hidden + 2 * settings.bottleneck)
    return 0


def missing_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes a token that the first block does not keep: no gradient passes its first trained weight.

    Zero where the input itself has one: under checkpointing, with a trained embedding or virtual tokens."""
    tuner = tuner_name(settings.tuner)
    if settings.gradient_checkpointing or tuner in ("full", "prompt_tuning", "p_tuning", "bitfit"):
        return 0
    before = {"input_layernorm", "ln_1"}
    if tuner == "prefix_tuning":
        return sum(_norm(spec, settings, name) for name, _ in plan.norm_entries if name in before)
    if tuner == "layernorm" and tunes_norm(spec, "input_layernorm"):
        return 4 * spec.shape.hidden
    chosen = ia3_targets(spec, plan, settings) if tuner == "ia3" else targeted(plan.linears, settings.target)
    names = {one.name for one in chosen}
    if tuner not in ("layernorm", "adapter") and names & INTO_ATTENTION:
        return sum(_norm(spec, settings, name) for name, _ in plan.norm_entries if name in before)
    skipped = _attention(spec, settings)
    after = {"post_feedforward_layernorm"} | ({"post_attention_layernorm"} if tuner == "layernorm" else set())
    return skipped + sum(_norm(spec, settings, name) for name, _ in plan.norm_entries if name not in after)


def widths(settings: MemorySettings) -> adapted.Widths:
    """Bytes of the entries that an adapted layer works on."""
    a, adapter = compute_bytes(settings), adapter_bytes(settings)
    return adapted.Widths(
        activation=a, adapter=adapter, product=a if mixed(settings) else max(a, adapter),
        weight=4 if settings.weight_bits == 32 else 2,
    )  # fmt: skip


def kept_after(spec: ModelSpec, plan: Layout, settings: MemorySettings, linear: Linear) -> int:
    """Bytes a token that a block keeps from the result of `linear` on, while that layer still runs."""
    a, dora = compute_bytes(settings), tuner_name(settings.tuner) == "dora"
    order = [one.name for one in plan.linears]
    later = [
        one for one in targeted(plan.linears, settings.target)
        if order.index(one.name) > order.index(linear.name)
    ]  # fmt: skip
    kept = sum(adapted.kept(one, settings, widths(settings), dora=dora) for one in later)
    if adapter_bytes(settings) <= a and any(one.name in OUT_OF_MLP for one in later):
        kept += a * spec.shape.intermediate
    norms = {"post_feedforward_layernorm"}
    if linear.name not in OUT_OF_MLP:
        kept += a * spec.shape.intermediate if linear.name == "up_proj" else _mlp(spec, settings)
    if linear.name in ATTENTION:
        norms |= {"post_attention_layernorm", "pre_feedforward_layernorm", "ln_2"}
    if linear.name in INTO_ATTENTION:
        kept += _attention(spec, settings)
        norms |= {"q_norm", "k_norm"}
    return kept + sum(_norm(spec, settings, name) for name, _ in plan.norm_entries if name in norms)


def _adapter_inputs(
    spec: ModelSpec, chosen: tuple[Linear, ...], settings: MemorySettings, *, inner: int
) -> int:
    """What adapters keep for a token, `inner` entries between their two matrices among it.

    Under autocast 32-bit adapters copy their input each; else those of one width share it."""
    a, width = compute_bytes(settings), adapter_bytes(settings)
    inner *= a if mixed(settings) else width
    if width > a:
        each = a if mixed(settings) else width
        return inner + each * sum(one.inputs for one in chosen)
    names = {one.name for one in chosen}
    shared = bool(names & INTO_ATTENTION) + bool(names & INTO_MLP)
    down = spec.shape.intermediate if names & OUT_OF_MLP else 0
    return inner + a * (shared * spec.shape.hidden + down)


def ends_block(spec: ModelSpec, linear: Linear) -> bool:
    """True when nothing is kept after `linear`: it leads out of the MLP, and no norm follows."""
    return linear.name in OUT_OF_MLP and spec.model_type not in FOUR_NORMS | QK_NORM_WHOLE


def embedded_beside(spec: ModelSpec, settings: MemorySettings) -> int:
    """Bytes of the embedded text under checkpointing with virtual tokens before it.

    Its gradient is asked for, as always with adapters, so that it is kept beside the joined sequence."""
    if not settings.gradient_checkpointing or tuner_name(settings.tuner) not in ("prompt_tuning", "p_tuning"):
        return 0
    return rows(settings) * settings.seq_len * stream_bytes(settings) * spec.shape.hidden


def arriving_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes a token of the gradients that wait while a block is computed again.

    That begins when the first of its operators needs what it kept: a norm after the MLP widens the gradient
    before it does, an adapter scales it, and DoRA widens, scales and copies it for the base's product."""
    stream, hidden = stream_bytes(settings) * spec.shape.hidden, spec.shape.hidden
    if spec.model_type in FOUR_NORMS | QK_NORM_WHOLE:
        return stream + (4 * hidden if stream_bytes(settings) < 4 else 0)
    if not any(one.name in OUT_OF_MLP for one in targeted(plan.linears, settings.target)):
        return stream
    sizes = widths(settings)
    if tuner_name(settings.tuner) != "dora":
        return stream + sizes.product * hidden
    wide = sizes.adapter > sizes.activation
    return stream + (sizes.activation + 2 * sizes.adapter if wide else sizes.activation) * hidden


def backward_extra_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes of gradients for each token at the fullest moment of a block's backward: leaving the MLP."""
    tuner, a, s = tuner_name(settings.tuner), _inner_bytes(settings), stream_bytes(settings)
    hidden, ffn = spec.shape.hidden, spec.shape.intermediate
    if spec.model_type in FOUR_NORMS or spec.model_type in QK_NORM_WHOLE:
        passed = 8 * hidden if tuner in ("full", "layernorm") else 4 * hidden
        return _leaving_mlp(plan, settings, s * hidden, a * ffn) - passed
    return _leaving_mlp(plan, settings, s * hidden, a * ffn)


def _leaving_mlp(plan: Layout, settings: MemorySettings, stream: int, ffn: int) -> int:
    """Gradients at that moment, less what the way out of the MLP has let go of already."""
    tuner, a = tuner_name(settings.tuner), compute_bytes(settings)
    if tuner == "full":
        return stream + 2 * ffn
    if tuner == "ia3":
        return stream + 6 * ffn
    chosen = targeted(plan.linears, settings.target) if tuner in LOW_RANK else ()
    if not any(one.name in OUT_OF_MLP for one in chosen):
        return stream + 3 * ffn
    hidden = stream // stream_bytes(settings)
    results = 2 * a * hidden if tuner == "dora" else 0
    if adapter_bytes(settings) <= a:
        return stream + 2 * ffn - results
    return (5 * a * hidden + 3 * ffn if mixed(settings) else 6 * a * hidden + 2 * ffn) - results


def after_dequantising_per_token(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Bytes of `backward_extra_per_token` that exist only when the base's product has let go of its matrix.

    The gradients of wide adapters come after it, so that the two are never held together.
    """
    extra = backward_extra_per_token(spec, plan, settings)
    plain = stream_bytes(settings) * spec.shape.hidden + 2 * compute_bytes(settings) * spec.shape.intermediate
    wide = adapter_bytes(settings) > compute_bytes(settings)
    return max(0, extra - plain) if wide and tuner_name(settings.tuner) in LOW_RANK else 0


def final_per_token(spec: ModelSpec, settings: MemorySettings) -> int:
    """Bytes kept for each token after the last block: the final norm and what the output matrix reads."""
    hidden, a, s = spec.shape.hidden, compute_bytes(settings), stream_bytes(settings)
    kept = 4 * hidden + (s * hidden if in_tiles(settings) else 0)
    if tuner_name(settings.tuner) in ("full", "layernorm"):
        kept += (4 if spec.model_type in GEMMA else s) * hidden
    if not in_tiles(settings) and trains_everything(settings):
        kept += a * hidden
    return kept


def in_tiles(settings: MemorySettings) -> bool:
    """True when the logits are never held whole."""
    return settings.loss == "chunked" or settings.objective in ALWAYS_CHUNKED


def loss_bytes(spec: ModelSpec, settings: MemorySettings, *, backward: bool) -> int:
    """Bytes of logits and loss at their peak, gradient of the output matrix excluded.

    Args:
        spec: the model.
        settings: loss, batch, length and precision are read.
        backward: False counts the forward part alone (evaluation).
    """
    if outputs(settings):
        return 0
    count, a = tokens(settings), compute_bytes(settings)
    if not in_tiles(settings):
        capped = a if spec.model_type in SOFT_CAPPED else 0
        if backward:  # log-probabilities, their gradient and that of the logits, all in 32 bits
            return count * spec.shape.vocab * (capped + 12 + _held_logits(settings))
        if settings.objective in PAIR_LOSS:  # logits of the answers are copied; in 16 bits the copy is brief
            return count * spec.shape.vocab * (capped + a + 8)
        return count * spec.shape.vocab * (capped + (8 if a == 4 else a + 8))
    tile = min(count, TILE_TOKENS) * TILE_VOCABULARY * a
    if settings.device == "cpu":
        tile += min(count, TILE_TOKENS) * min(spec.shape.vocab, TILE_VOCABULARY) * 20
    if backward:
        return tile + (4 + a) * count * spec.shape.hidden
    return tile + (a * count * spec.shape.hidden if settings.device == "cuda" else 0)


def _held_logits(settings: MemorySettings) -> int:
    """Bytes of a logit that the trainer refers to during the backward pass; our pair loss drops them."""
    return 0 if settings.objective in PAIR_LOSS else compute_bytes(settings)


def head_bytes(spec: ModelSpec, settings: MemorySettings) -> int:
    """Bytes of logits when the gradient of the output matrix is computed: theirs, and those still held."""
    if outputs(settings) or in_tiles(settings):
        return 0
    each = compute_bytes(settings) + _held_logits(settings)
    return tokens(settings) * spec.shape.vocab * each
