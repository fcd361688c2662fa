"""How long does training take?

Goes in: a ModelSpec, MemorySettings, the amount of data and the rate of the device. Comes out: a TimeEstimate with
steps, seconds a step and a band. Never does: measure; look at the machine; pretend to know a device it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from advisor.estimate.activations import PAIRED
from advisor.estimate.layers import Layout, layout
from advisor.estimate.tunable import tuner_name
from advisor.types import AcceleratorFacts, Band, Hardware, Histogram, MemorySettings, ModelSpec, TimeEstimate


def estimate_time(
    spec: ModelSpec,
    settings: MemorySettings,
    *,
    rows: int,
    epochs: float,
    effective_batch: int,
    max_steps: int | None,
    mean_tokens: float,
    lengths: Histogram | None,
    accelerator: AcceleratorFacts | None,
    hardware: Hardware,
    rules: Mapping[str, Any],
) -> TimeEstimate:
    """Estimate steps and seconds of a training stage.

    Args:
        spec: the model.
        settings: micro_batch, seq_len, tuner, precision, checkpointing, packing, device and gpus are read.
        rows: training rows.
        epochs: passes over them.
        effective_batch: rows (packed: sequences) of one optimizer step, over all devices.
        max_steps: upper bound of the steps, if any.
        mean_tokens: mean length of a row in tokens.
        lengths: distribution of the lengths, when known.
        accelerator: facts of the device, None when it is not in kb/ or there is none.
        hardware: the machine; for the CPU its cores and features are read.
        rules: tables of kb/rules/time.toml.

    Returns:
        Steps, and bands of seconds a step, seconds and tokens a second (tokens that are not padding).
    """
    per_row = min(float(settings.seq_len), max(mean_tokens, 1.0))
    sequences = math.ceil(rows * per_row / settings.seq_len) if settings.packed else rows
    steps = max(1, math.ceil(sequences / max(effective_batch, 1)) * epochs) if rows else 0
    steps = math.ceil(steps) if max_steps is None or max_steps < 0 else min(math.ceil(steps), max_steps)
    notes: list[str] = []
    computed, real = _micro_tokens(settings, per_row, lengths)
    micro_steps = max(1.0, effective_batch / max(settings.micro_batch * settings.gpus, 1))
    rate, spread, overhead = _rate(spec, settings, accelerator, hardware, rules, computed, notes)
    flops = computed * _flops_per_token(
        spec, layout(spec), settings, rules, computed / max(_sequences(settings), 1)
    )
    second = micro_steps * (flops / rate + overhead)
    band = Band(low=second * spread["low"], expected=second, high=second * spread["high"])
    tokens = micro_steps * real * settings.gpus
    return TimeEstimate(
        steps=steps,
        seconds_per_step=band,
        seconds=Band(low=band.low * steps, expected=band.expected * steps, high=band.high * steps),
        tokens_per_second=Band(
            low=tokens / band.high, expected=tokens / band.expected, high=tokens / band.low
        ),
        notes=tuple(notes),
    )


def _sequences(settings: MemorySettings) -> int:
    return settings.micro_batch * (2 if settings.objective in PAIRED else 1)


def _micro_tokens(settings: MemorySettings, per_row: float, lengths: Histogram | None) -> tuple[float, float]:
    """Tokens computed and tokens that are not padding, of one micro batch."""
    count = _sequences(settings)
    if settings.packed:
        full = float(settings.micro_batch * settings.seq_len)
        return full, full
    if lengths is None or not sum(lengths.counts):
        return count * per_row, count * per_row
    return count * _expected_longest(lengths, count, settings.seq_len), count * _mean(
        lengths, settings.seq_len
    )


def _mean(lengths: Histogram, limit: int) -> float:
    total = sum(lengths.counts)
    return sum(n * min(_middle(lengths, i), limit) for i, n in enumerate(lengths.counts)) / total


def _middle(lengths: Histogram, index: int) -> float:
    below = lengths.edges[index - 1] if index else 0
    return (below + lengths.edges[index]) / 2


def _expected_longest(lengths: Histogram, count: int, limit: int) -> float:
    """Mean of the longest of `count` rows drawn at random: a batch is padded to it."""
    total, seen, mean, below = sum(lengths.counts), 0, 0.0, 0.0
    for index, rows in enumerate(lengths.counts):
        seen += rows
        upto = (seen / total) ** count
        mean += (upto - below) * min(_middle(lengths, index), limit)
        below = upto
    return mean


def _flops_per_token(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, rules: Mapping[str, Any], length: float
) -> float:
    table = rules["flops_per_parameter"]
    group = "full" if tuner_name(settings.tuner) == "full" else "adapters"
    factor = table[group + ("_checkpointed" if settings.gradient_checkpointing else "")]
    active = spec.active_parameters or plan.parameters
    head = 0 if plan.head else plan.embedding
    matrices = active - plan.embedding + head if plan.head else active
    attention = 4 * spec.shape.heads * spec.shape.head_dim * plan.blocks * length / 2
    return float(factor * matrices + (factor / 2) * attention)


def _rate(
    spec: ModelSpec, settings: MemorySettings, accelerator: AcceleratorFacts | None, hardware: Hardware,
    rules: Mapping[str, Any], computed: float, notes: list[str],
) -> tuple[float, Mapping[str, float], float]:  # fmt: skip
    """Floating-point operations a second of one device, the band's factors, and seconds of overhead a micro step."""
    if settings.device == "cpu":
        facts = rules["cpu"]
        fast = any(feature in hardware.cpu_features for feature in facts["bf16_features"])
        low_precision = settings.precision == "bf16" and fast
        rate = facts["flops_per_core_bf16"] if low_precision else facts["flops_per_core_fp32"]
        return rate * max(hardware.cpu_cores, 1), facts["spread"], facts["overhead_seconds"]
    facts = rules["gpu"]
    if accelerator is None or accelerator.tflops is None:
        notes.append("the rate of this device is not known; an old card is assumed and the range is wide")
        return (
            facts["unknown_tflops"] * 1e12 * facts["utilisation_adapters"],
            facts["unknown_spread"],
            facts["overhead_seconds"],
        )
    group = "full" if tuner_name(settings.tuner) == "full" else "adapters"
    use = facts[f"utilisation_{group}"]
    if settings.weight_bits == 4:
        use *= facts["nf4_factor"]
    use *= computed / (computed + facts["half_rate_tokens"])
    return accelerator.tflops * 1e12 * use, facts["spread"], facts["overhead_seconds"]
