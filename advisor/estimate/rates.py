"""How many operations does one micro batch take, and how fast does the device do them?

Goes in: a ModelSpec, MemorySettings, the facts of the device and, with the Hardware, what was measured of it;
kb/rules/time.toml. Comes out: operations, and a `Rate`. Never does: measure; count steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.estimate.activations import PAIRED, in_tiles, saved_per_token, trains_everything
from advisor.estimate.layers import Layout
from advisor.estimate.states import trained_bytes
from advisor.estimate.tunable import LOW_RANK, outputs, tuner_name
from advisor.types import AcceleratorFacts, Hardware, MatrixBench, MemorySettings, ModelSpec, Record

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
    """For each logit of the loss, beyond its matrix product."""
    link: float = 1.0
    """Bytes a second between two devices of one machine."""
    low: float
    high: float
    """Factors of the band."""
    source: str
    """As in TimeEstimate."""
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
    """Return what the device reaches: by what was measured there where that is known, else by kb/.

    An unknown device that was not measured gets a slow guess, a wide band and a note.
    """
    measured = _measured(settings, hardware)
    if settings.device == "cpu":
        return _processor(plan, settings, hardware, measured, rules["cpu"])
    facts = rules["gpu"]
    group = "full" if trains_everything(settings) else "adapters"
    layer = facts["layer_seconds_quantised" if settings.weight_bits < 16 else f"layer_seconds_{group}"]
    known = accelerator is not None and None not in (accelerator.tflops, accelerator.bandwidth_gb_per_s)
    flops, moved = _nominal(settings, accelerator, facts)
    if measured is not None:
        reached, product = (
            _by_generation(facts[name], accelerator) for name in ("utilisation", "product_share")
        )
        flops, moved = (
            measured.flops[settings.precision] * reached / product,
            measured.copy_bytes_per_second,
        )
    spread = facts["spread" if known or measured else "unknown_spread"]
    slow = "the rate of this device is not known: a slow one is assumed and the range is wide"
    return Rate(
        flops=flops,
        bytes=moved,
        overhead_seconds=layer * plan.blocks,
        token_seconds=facts["token_layer_seconds"] * plan.blocks,
        link=_link(accelerator, rules["link"]),
        low=spread["low"],
        high=spread["high"],
        source=measured_here(measured) if measured else facts["source"],
        notes=() if known or measured else (slow,),
    )


def _measured(settings: MemorySettings, hardware: Hardware) -> MatrixBench | None:
    """What was measured of the device that trains, in the precision that it computes in; None: nothing."""
    found = hardware.rates
    if found is None or (found.threads > 0) != (settings.device == "cpu"):
        return None
    return found if settings.precision in found.flops else None


def measured_here(found: MatrixBench) -> str:
    """Say of which measurement a rate is: when, and with which versions."""
    threads = f", {found.threads} threads" if found.threads > 1 else ", 1 thread" if found.threads else ""
    return f"measured here on {found.date} (torch {found.torch}{threads})"


def _nominal(
    settings: MemorySettings, accelerator: AcceleratorFacts | None, facts: Mapping[str, Any]
) -> tuple[float, float]:
    """(operations a second that training reaches, bytes a second that memory moves) by kb/."""
    tflops = accelerator.tflops if accelerator else None
    bandwidth = accelerator.bandwidth_gb_per_s if accelerator else None
    wide = _by_generation(facts["fp32_share"], accelerator) if settings.precision == "fp32" else 1.0
    return (
        (tflops or facts["unknown_tflops"]) * 1e12 * _by_generation(facts["utilisation"], accelerator) * wide,
        (bandwidth or facts["unknown_gb_per_s"]) * 1e9 * facts["bandwidth_share"],
    )


def _by_generation(table: Mapping[str, float], accelerator: AcceleratorFacts | None) -> float:
    return float(table.get(accelerator.generation if accelerator else "", table["other"]))


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


def _processor(
    plan: Layout, settings: MemorySettings, hardware: Hardware, measured: MatrixBench | None,
    facts: Mapping[str, Any],
) -> Rate:  # fmt: skip
    features, half = set(hardware.cpu_features), settings.precision != "fp32"
    kind = "plain"
    if half and features & set(facts["amx_features"]):
        kind = "amx"
    elif half and features & set(facts["bf16_features"]):
        kind = "bf16"
    elif features & set(facts["avx512_features"]):
        kind = "avx512"
    several = max(1, hardware.cpu_cores) ** facts["scaling_exponent"]
    group = "low_rank" if tuner_name(settings.tuner) in LOW_RANK else "other"
    product = facts["flops_per_core"][kind] * several
    if measured is not None:
        product = measured.flops[settings.precision] * facts["product_share"]
    return Rate(
        flops=product,
        kept_byte_seconds=facts["kept_byte_seconds"][group] / several,
        logit_seconds=_logit_seconds(settings, facts) / several,
        bytes=measured.copy_bytes_per_second if measured else facts["gb_per_s"] * 1e9,
        overhead_seconds=facts["block_seconds"][group] * plan.blocks,
        token_seconds=facts["token_block_seconds"] * plan.blocks,
        low=facts["spread"]["low"],
        high=facts["spread"]["high"],
        source=measured_here(measured) if measured else facts["source"],
    )


def _logit_seconds(settings: MemorySettings, facts: Mapping[str, Any]) -> float:
    """Seconds of one core for each logit of the loss; a head with other outputs has none."""
    if outputs(settings):
        return 0.0
    every = in_tiles(settings) or settings.objective in PAIRED
    return float(facts["logit_seconds" if every else "plain_logit_seconds"])


def elementwise_seconds(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, device: Rate, *, tokens: float
) -> float:
    """Seconds of one micro batch of `tokens` tokens that are no matrix products, where a device has a figure.

    What a block keeps for its backward pass is what its other operators write and read.
    """
    kept = saved_per_token(spec, plan, settings) * plan.blocks * device.kept_byte_seconds
    return float(tokens * (kept + spec.shape.vocab * device.logit_seconds))


def token_seconds(plan: Layout, settings: MemorySettings, device: Rate, *, answers: int) -> float:
    """Seconds of one more token of `answers` answers that are generated together."""
    stored = settings.weight_bits / 8 * plan.parameters
    return device.token_seconds + stored / device.bytes + 2 * answers * plan.parameters / device.flops


def padding(settings: MemorySettings, rules: Rules) -> float:
    """Tokens that pad a batch beyond its longest row, in the mean: a processor takes whole multiples."""
    if settings.device != "cpu" or settings.precision != "bf16":
        return 0.0
    return float((rules["cpu"]["pad_multiple"] - 1) / 2)


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
