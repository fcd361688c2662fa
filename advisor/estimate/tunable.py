"""How many parameters does a tuner train, and with which extra weights beside the model?

Goes in: a ModelSpec and MemorySettings. Comes out: exact counts, equal to what PEFT or requires_grad gives.
Never does: import PEFT; count for a tuner it does not know (it says so).
"""

from __future__ import annotations

from advisor.errors import UnknownNameError
from advisor.estimate import stated
from advisor.estimate.layers import Layout, Linear, layout, targeted
from advisor.types import MemorySettings, ModelSpec

LOW_RANK = frozenset({"lora", "qlora", "rslora", "pissa", "dora", "classifier_head"})
VIRTUAL = frozenset({"prompt_tuning", "p_tuning", "prefix_tuning"})
TUNERS = LOW_RANK | VIRTUAL | {"full", "osf", "ia3", "bitfit", "layernorm", "adapter"}
ALIASES = {
    "prompt": "prompt_tuning", "prefix": "prefix_tuning", "ptuning": "p_tuning", "ln_tuning": "layernorm",
    "layer_norm": "layernorm", "bottleneck": "adapter", "houlsby": "adapter", "ia_3": "ia3",
    "orthogonal_subspace": "osf",
}  # fmt: skip
IA3_QUERY_VALUE = frozenset({"qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"})
POST_ATTENTION_ONLY = frozenset({"qwen2", "qwen3"})


def tuner_name(tuner: str) -> str:
    """Return the tuner's id with underscores, other common names resolved."""
    plain = tuner.lower().replace("-", "_")
    return ALIASES.get(plain, plain)


def trainable_parameters(spec: ModelSpec, settings: MemorySettings) -> int:
    """Return how many parameters the tuner trains; the exact count of PEFT for exact layouts.

    Args:
        spec: the model.
        settings: tuner, target, lora_r, virtual_tokens, the two of bottleneck adapters, preserved_share and
            classes are read.

    Raises:
        UnknownNameError: the tuner is not known.
    """
    return count(spec, layout(spec), settings)


def count(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    """Like `trainable_parameters`, with the layout at hand."""
    tuner = tuner_name(settings.tuner)
    head = spec.shape.hidden * outputs(settings)
    if settings.stated is not None:
        return stated.trained(settings.stated, _targets(plan, settings), plan.blocks, settings.lora_r) + head
    if tuner not in TUNERS:
        raise UnknownNameError("tuner", settings.tuner, TUNERS, "ftadvisor explain tuners")
    if tuner == "full":
        return plan.parameters - (plan.head if outputs(settings) else 0) + head
    if tuner in LOW_RANK:
        return (
            plan.blocks * sum(_low_rank(tuner, one, settings.lora_r) for one in _targets(plan, settings))
            + head
        )
    if tuner in VIRTUAL:
        return _virtual(tuner, spec, settings) + head
    return _small(tuner, spec, plan, settings) + head


def outputs(settings: MemorySettings) -> int:
    """Return how many scores a head gives in place of a vocabulary; 0 for a language model."""
    if tuner_name(settings.tuner) == "classifier_head":
        return max(settings.classes, 1)
    return 1 if settings.objective == "reward" else 0


def _targets(plan: Layout, settings: MemorySettings) -> tuple[Linear, ...]:
    return targeted(plan.linears, settings.target)


def _low_rank(tuner: str, linear: Linear, rank: int) -> int:
    pair = rank * (linear.inputs + linear.outputs)
    return pair + (linear.outputs if tuner == "dora" else 0)


def _virtual(tuner: str, spec: ModelSpec, settings: MemorySettings) -> int:
    hidden, tokens = spec.shape.hidden, settings.virtual_tokens
    if tuner == "prefix_tuning":
        return tokens * spec.shape.layers * 2 * spec.shape.kv_heads * spec.shape.head_dim
    if tuner == "p_tuning":
        return tokens * hidden + 3 * (hidden * hidden + hidden)
    return tokens * hidden


def _small(tuner: str, spec: ModelSpec, plan: Layout, settings: MemorySettings) -> int:
    if tuner == "ia3":
        return plan.blocks * sum(_ia3(one, settings) for one in ia3_targets(spec, plan, settings))
    if tuner == "layernorm":
        tuned = sum(entries for name, entries in plan.norm_entries if tunes_norm(spec, name))
        return plan.blocks * tuned + (0 if spec.model_type in POST_ATTENTION_ONLY else plan.final_norm)
    if tuner == "bitfit":
        return _biases(spec, plan)
    if tuner == "osf":
        share = settings.preserved_share
        return plan.blocks * sum(_trained_subspace(one, share) for one in _targets(plan, settings))
    per_adapter = 2 * settings.bottleneck * spec.shape.hidden + settings.bottleneck + spec.shape.hidden
    return plan.blocks * adapters_in_block(settings) * per_adapter


def adapters_in_block(settings: MemorySettings) -> int:
    """Return behind how many sublayers of a block a bottleneck adapter stands."""
    return 1 if settings.bottleneck_style == "pfeiffer" else 2


def ia3_targets(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> tuple[Linear, ...]:
    """Return PEFT's own choice (keys or queries, values, the way out of the MLP), or what is scaled in place
    of it where it has none, unless modules are named."""
    if settings.target not in ("all-linear", "default", "keys-values-feedforward"):
        return _targets(plan, settings)
    first = "q_proj" if spec.model_type in IA3_QUERY_VALUE else "k_proj"
    return targeted(plan.linears, f"{first},v_proj,down_proj,qkv_proj,c_attn,mlp.c_proj")


def tunes_norm(spec: ModelSpec, name: str) -> bool:
    """True when layer-norm tuning trains the norm `name`: PEFT's own choice for each family that it knows,
    in others every norm but those of single heads."""
    if spec.model_type in POST_ATTENTION_ONLY:
        return name == "post_attention_layernorm"
    return name not in ("q_norm", "k_norm")


def preserved(linear: Linear, share: float) -> int:
    """Singular directions of a matrix that orthogonal-subspace tuning leaves as they are."""
    return int(min(linear.inputs, linear.outputs) * share)


def _trained_subspace(linear: Linear, share: float) -> int:
    """The other directions: left and right vectors and a singular value each."""
    moving = min(linear.inputs, linear.outputs) - preserved(linear, share)
    return moving * (linear.inputs + linear.outputs + 1)


def frozen_subspace(linear: Linear, share: float) -> int:
    """Entries held beside the trained ones: those directions as they were; the preserved right vectors, whose
    memory PEFT keeps with the trained ones; the preserved left ones where they are longer."""
    held = linear.inputs + (linear.outputs if linear.outputs > linear.inputs else 0)
    return _trained_subspace(linear, share) + held * preserved(linear, share)


def _ia3(linear: Linear, settings: MemorySettings) -> int:
    """A scale for each output; for what leads out of the MLP (and into it, when named), for each input."""
    feedforward = linear.name in ("down_proj", "mlp.c_proj")
    return linear.inputs if feedforward else linear.outputs


def _biases(spec: ModelSpec, plan: Layout) -> int:
    """Biases that the model has; where it has none, those that are added to every linear layer."""
    native = plan.blocks * plan.block_biases
    if spec.model_type == "gpt2":
        return native + plan.blocks * plan.block_norms // 2 + plan.final_norm // 2
    if native:
        return native
    return plan.blocks * sum(one.outputs for one in plan.linears)
