"""How many operations does one micro batch take, and how fast does the device do them?

Goes in: a ModelSpec, MemorySettings, the facts of the device and kb/rules/time.toml. Comes out: operations,
and a `Rate`. Never does: measure; count steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.estimate.activations import in_tiles, saved_per_token, trains_everything
from advisor.estimate.layers import Layout
from advisor.estimate.states import trained_bytes
from advisor.estimate.tunable import outputs
from advisor.types import AcceleratorFacts, Hardware, MemorySettings, ModelSpec, Record

Rules = Mapping[str, Any]


class Rate(Record, frozen=True, kw_only=True):
    """What one device does in a second, and what it loses each time."""

    flops: float
    """Floating-point operations a second that training reaches."""
    bytes: float
    """Bytes a second that memory moves."""
    overhead_seconds: float
    """Of one micro batch, whatever its size."""
    token_seconds: float
    """Of one generated token of a batch, beyond reading the weights."""
    kept_byte_seconds: float = 0.0
    """For each byte that a block keeps for its backward pass: what is not a matrix product."""
    logit_seconds: float = 0.0
    """For each logit of a loss in tiles, beyond its matrix product."""
    link: float = 1.0
    """Bytes a second between two devices of one machine."""
    low: float
    high: float
    """Factors of the band."""
    notes: tuple[str, ...] = ()


def flops(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, rules: Rules, *, tokens: float, length: float
) -> float:
    """Operations of one micro batch of `tokens` tokens in sequences of `length`, forward and backward.

    The input embedding is a table and costs nothing; attention is causal, so a token sees half of the length.
    """
    table = rules["flops_per_parameter"]
    group = "full" if trains_everything(settings) else "adapters"
    factor = table[group + ("_checkpointed" if settings.gradient_checkpointing else "")]
    active = spec.active_parameters or plan.parameters
    matrices = active - (plan.embedding if plan.head else 0) - plan.positions
    if outputs(settings):
        matrices -= plan.head or plan.embedding
    attention = 4 * spec.shape.heads * spec.shape.head_dim * plan.blocks * length / 2
    return float(tokens * factor * (matrices + attention / 2))


def rate(
    plan: Layout,
    settings: MemorySettings,
    accelerator: AcceleratorFacts | None,
    hardware: Hardware,
    rules: Rules,
) -> Rate:
    """Return what the device reaches; an unknown device gets a slow guess, a wide band and a note."""
    if settings.device == "cpu":
        return _processor(settings, hardware, rules["cpu"])
    facts = rules["gpu"]
    group = "full" if trains_everything(settings) else "adapters"
    layer = facts["layer_seconds_quantised" if settings.weight_bits < 16 else f"layer_seconds_{group}"]
    notes: tuple[str, ...] = ()
    low, high = facts["spread"]["low"], facts["spread"]["high"]
    tflops = accelerator.tflops if accelerator else None
    bandwidth = accelerator.bandwidth_gb_per_s if accelerator else None
    if tflops is None or bandwidth is None:
        notes = ("the rate of this device is not known: a slow one is assumed and the range is wide",)
        low, high = facts["unknown_spread"]["low"], facts["unknown_spread"]["high"]
    generation = accelerator.generation if accelerator else ""
    reached = facts["utilisation"].get(generation, facts["utilisation"]["other"])
    share = facts["fp32_share"].get(generation, facts["fp32_share"]["other"])
    wide = share if settings.precision == "fp32" else 1.0
    return Rate(
        flops=(tflops or facts["unknown_tflops"]) * 1e12 * reached * wide,
        bytes=(bandwidth or facts["unknown_gb_per_s"]) * 1e9 * facts["bandwidth_share"],
        overhead_seconds=layer * plan.blocks,
        token_seconds=facts["token_layer_seconds"] * plan.blocks,
        link=_link(accelerator, rules["link"]),
        low=low,
        high=high,
        notes=notes,
    )


def _link(accelerator: AcceleratorFacts | None, facts: Mapping[str, Any]) -> float:
    """Bytes a second between devices: fast links by the form in the name, else the bus of the machine."""
    name = accelerator.name.lower() if accelerator else ""
    fast = any(word in name for word in facts["fast_names"])
    return float(facts["fast_gb_per_s" if fast else "bus_gb_per_s"]) * 1e9


def gather_seconds(plan: Layout, settings: MemorySettings, device: Rate) -> float:
    """Seconds of one micro batch that fetching the shards of the others takes, forward and backward."""
    if settings.shard == "none" or settings.gpus < 2:
        return 0.0
    weights = plan.blocks * plan.block_weights * settings.weight_bits / 8
    return 2 * weights * (settings.gpus - 1) / settings.gpus / device.link


def reduce_seconds(settings: MemorySettings, device: Rate, trainable: int) -> float:
    """Seconds of one optimizer step that averaging the gradients of all devices takes."""
    if settings.gpus < 2:
        return 0.0
    return 2 * trainable * trained_bytes(settings) * (settings.gpus - 1) / settings.gpus / device.link


def _processor(settings: MemorySettings, hardware: Hardware, facts: Mapping[str, Any]) -> Rate:
    features, half = set(hardware.cpu_features), settings.precision != "fp32"
    kind = "plain"
    if half and features & set(facts["amx_features"]):
        kind = "amx"
    elif half and features & set(facts["bf16_features"]):
        kind = "bf16"
    elif features & set(facts["avx512_features"]):
        kind = "avx512"
    several = max(1, hardware.cpu_cores) ** facts["scaling_exponent"]
    group = "full" if trains_everything(settings) else "adapters"
    return Rate(
        flops=facts["flops_per_core"][kind] * several,
        kept_byte_seconds=facts["kept_byte_seconds"][group] / several,
        logit_seconds=facts["logit_seconds"] / several,
        bytes=facts["gb_per_s"] * 1e9,
        overhead_seconds=facts["overhead_seconds"],
        token_seconds=facts["token_seconds"],
        low=facts["spread"]["low"],
        high=facts["spread"]["high"],
    )


def elementwise_seconds(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, device: Rate, *, tokens: float
) -> float:
    """Seconds of one micro batch of `tokens` tokens that are no matrix products, where a device has a figure.

    What a block keeps for its backward pass is what its other operators write and read.
    """
    kept = saved_per_token(spec, plan, settings) * plan.blocks * device.kept_byte_seconds
    logits = spec.shape.vocab * device.logit_seconds
    tiled = in_tiles(settings) and settings.objective != "reward"
    return float(tokens * (kept + (logits if tiled else 0.0)))


def optimizer_seconds(settings: MemorySettings, memory: Rate, rules: Rules, trainable: int) -> float:
    """Seconds of one optimizer step: it reads and writes weights, gradients and states once or more."""
    facts = rules["optimizer"]
    passes = facts["passes"] + (facts["passes_unfused"] if settings.optimizer in facts["unfused"] else 0.0)
    return float(trainable * trained_bytes(settings) * passes / memory.bytes)


def dequantise_seconds(plan: Layout, settings: MemorySettings, memory: Rate, rules: Rules) -> float:
    """Seconds of one micro batch that turning 4-bit weights into 16 bits takes, in each pass over them."""
    if settings.weight_bits >= 16:
        return 0.0
    facts = rules["quantised"]
    passes = 3 if settings.gradient_checkpointing else 2
    return float(passes * plan.blocks * plan.block_weights * facts["bytes_per_weight"] / memory.bytes)
