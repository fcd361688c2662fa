"""How long does training take?

Goes in: a ModelSpec, MemorySettings, the amount of data and the device. Comes out: a TimeEstimate with steps,
seconds a step and a band. Never does: measure; look at the machine; pretend to know a device it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from advisor.estimate import rates
from advisor.estimate.activations import rows as sequences_of
from advisor.estimate.layers import layout
from advisor.estimate.tunable import count
from advisor.types import (
    AcceleratorFacts,
    Band,
    Hardware,
    Histogram,
    MemorySettings,
    ModelSpec,
    TimeEstimate,
)

ONLINE = frozenset({"rloo", "grpo"})


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
    heldout_rows: int = 0,
    evaluations: int = 0,
) -> TimeEstimate:
    """Estimate steps and seconds of a training stage.

    Args:
        spec: the model.
        settings: micro_batch, seq_len, tuner, precision, checkpointing, packing, device and gpus are read.
        rows: training rows.
        epochs: passes over them; a part of one is allowed.
        effective_batch: rows (packed: sequences) of one optimizer step, over all devices.
        max_steps: number of steps, whatever `epochs` says; None or negative for as many as the epochs need.
        mean_tokens: mean length of a row in tokens.
        lengths: distribution of the lengths, when known; batches are then padded to their longest row.
        accelerator: facts of the device; None when it is not in kb/, or there is none.
        hardware: the machine; cores and features of the CPU are read, and what was measured here.
        rules: tables of kb/rules/time.toml.
        heldout_rows: rows that are measured on and not trained on.
        evaluations: how often, at most.

    Returns:
        Steps, and bands of seconds a step, seconds (with the start of the program, the evaluations and the
        scoring of a reference), and tokens a second (padding not counted).
    """
    mean = min(float(settings.seq_len), max(mean_tokens, 1.0))
    steps = count_steps(settings, rows, epochs, effective_batch, max_steps, mean)
    computed, real = _micro_tokens(settings, mean, lengths)
    micro_steps = max(1.0, effective_batch / max(settings.micro_batch * settings.gpus, 1))
    plan = layout(spec)
    device = rates.rate(plan, settings, accelerator, hardware, rules)
    length = computed / sequences_of(settings)
    work = rates.flops(spec, plan, settings, rules, tokens=computed, length=length)
    micro = work / device.flops + device.overhead_seconds
    micro += rates.dequantise_seconds(plan, settings, device, rules)
    micro += rates.elementwise_seconds(spec, plan, settings, device, tokens=computed)
    micro = max(
        micro, rates.gather_seconds(plan, settings, device)
    )  # fetched while the block before computes
    forward = micro * rules["run"]["forward_share"] / max(settings.micro_batch, 1)
    measured = min(evaluations, 2 + steps // rules["run"]["steps_between_evaluations"])
    passes = measured * heldout_rows + rules["run"]["reference_passes"].get(settings.objective, 0) * rows
    second = micro_steps * micro
    trainable = count(spec, plan, settings)
    second += rates.optimizer_seconds(settings, device, rules, trainable)
    second += rates.reduce_seconds(settings, device, trainable)
    notes = list(device.notes)
    if settings.objective in ONLINE:
        stored = settings.weight_bits / 8 * plan.parameters
        second += settings.completion_tokens * (device.token_seconds + stored / device.bytes)
        notes.append("the time to generate answers depends on their length and is the least certain part")
    band = Band(low=second * device.low, expected=second, high=second * device.high)
    tokens = micro_steps * real * settings.gpus
    start = rules["run"]["start_seconds"] + forward * passes if steps else 0.0
    return TimeEstimate(
        steps=steps,
        seconds_per_step=band,
        seconds=Band(
            low=start + band.low * steps,
            expected=start + band.expected * steps,
            high=start + band.high * steps,
        ),
        tokens_per_second=Band(
            low=tokens / band.high, expected=tokens / band.expected, high=tokens / band.low
        ),
        source=device.source,
        notes=tuple(notes),
    )


def count_steps(
    settings: MemorySettings,
    rows: int,
    epochs: float,
    effective_batch: int,
    max_steps: int | None,
    mean_tokens: float,
) -> int:
    """Return the optimizer steps: the trainer rounds up in every epoch; `max_steps` overrules the epochs."""
    sequences = math.ceil(rows * mean_tokens / settings.seq_len) if settings.packed else rows
    steps = math.ceil(math.ceil(sequences / max(effective_batch, 1)) * epochs)
    return steps if max_steps is None or max_steps < 0 else max_steps if rows else 0


def _micro_tokens(settings: MemorySettings, mean: float, lengths: Histogram | None) -> tuple[float, float]:
    """Tokens computed, and tokens that are not padding, of one micro batch."""
    number = sequences_of(settings)
    if settings.packed:
        full = float(settings.micro_batch * settings.seq_len)
        return full, full
    if lengths is None or not sum(lengths.counts):
        return number * mean, number * mean
    return number * expected_longest(lengths, number, settings.seq_len), number * mean_length(
        lengths, settings.seq_len
    )


def expected_longest(lengths: Histogram, number: int, limit: int) -> float:
    """Return the mean length of the longest of `number` rows drawn at random, cut at `limit` tokens."""
    total, seen, mean, below = sum(lengths.counts), 0, 0.0, 0.0
    for index, rows in enumerate(lengths.counts):
        seen += rows
        upto = (seen / total) ** number
        mean += (upto - below) * min(_middle(lengths, index), limit)
        below = upto
    return mean


def mean_length(lengths: Histogram, limit: float = math.inf) -> float:
    """Return the mean length of the rows, each cut at `limit` tokens; 0 without rows."""
    if not sum(lengths.counts):
        return 0.0
    total = sum(lengths.counts)
    return sum(n * min(_middle(lengths, i), limit) for i, n in enumerate(lengths.counts)) / total


def _middle(lengths: Histogram, index: int) -> float:
    below = lengths.edges[index - 1] if index else 0
    return (below + lengths.edges[index]) / 2
