"""How long does training take?

Goes in: a ModelSpec, MemorySettings, the amount of data and the device. Comes out: a TimeEstimate with steps,
seconds a step and a band. Never does: measure; look at the machine; pretend to know a device it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from advisor.estimate import rates
from advisor.estimate.activations import rows as sequences_of
from advisor.estimate.layers import Layout, layout
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
    computed, real = _micro_tokens(settings, mean, lengths, rates.padding(settings, rules))
    micro_steps = max(1.0, effective_batch / max(settings.micro_batch * settings.gpus, 1))
    plan = layout(spec)
    device = rates.rate(plan, settings, accelerator, hardware, rules)
    micro = _micro_seconds(spec, plan, settings, device, rules, tokens=computed)
    row = _row_seconds(spec, plan, settings, device, rules, mean, lengths)
    scored = rules["run"]["step_passes"].get(settings.objective, 0) * settings.micro_batch * row
    second = micro_steps * (micro + scored)
    trainable = count(spec, plan, settings)
    second += rates.optimizer_seconds(settings, device, rules, trainable)
    second += rates.reduce_seconds(settings, device, trainable)
    notes = list(device.notes)
    if settings.objective in ONLINE:
        second += settings.completion_tokens * rates.token_seconds(plan, settings, device, answers=1)
        notes.append("the time to generate answers depends on their length and is the least certain part")
    band = Band(low=second * device.low, expected=second, high=second * device.high)
    tokens = micro_steps * real * settings.gpus
    measured = min(evaluations, 2 + steps // rules["run"]["steps_between_evaluations"])
    around = _around(
        plan, settings, device, rules, rows=rows, heldout=heldout_rows, measured=measured, row=row, mean=mean
    )
    start = around if steps else 0.0
    return TimeEstimate(
        steps=steps,
        seconds_per_step=band,
        seconds=Band(
            low=start * device.low + band.low * steps,
            expected=start + band.expected * steps,
            high=start * device.high + band.high * steps,
        ),
        tokens_per_second=Band(
            low=tokens / band.high, expected=tokens / band.expected, high=tokens / band.low
        ),
        source=device.source,
        notes=tuple(notes),
    )


def _micro_seconds(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, device: rates.Rate, rules: Mapping[str, Any], *,
    tokens: float,
) -> float:  # fmt: skip
    """Seconds of one micro batch of `tokens` tokens, forward and backward."""
    work = rates.flops(spec, plan, settings, rules, tokens=tokens, length=tokens / sequences_of(settings))
    seconds = work / device.flops + device.overhead_seconds
    seconds += rates.dequantise_seconds(plan, settings, device, rules)
    seconds += rates.elementwise_seconds(spec, plan, settings, device, tokens=tokens)
    # Shards are fetched while the block before computes.
    return max(seconds, rates.gather_seconds(plan, settings, device))


def _row_seconds(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, device: rates.Rate, rules: Mapping[str, Any],
    mean: float, lengths: Histogram | None,
) -> float:  # fmt: skip
    """Seconds of the forward pass of one row; rows that are only scored are padded, not packed."""
    padded = msgspec.structs.replace(settings, packed=False)
    tokens, _ = _micro_tokens(padded, mean, lengths, rates.padding(settings, rules))
    micro = _micro_seconds(spec, plan, padded, device, rules, tokens=tokens)
    return float(micro * rules["run"]["forward_share"] / max(settings.micro_batch, 1))


def _around(
    plan: Layout, settings: MemorySettings, device: rates.Rate, rules: Mapping[str, Any], *,
    rows: int, heldout: int, measured: int, row: float, mean: float,
) -> float:  # fmt: skip
    """Seconds beside the steps: start, rows made ready, reference, held-out rows, questions before and after.

    Args:
        plan: of the model.
        settings: objective and batch are read.
        device: what it reaches.
        rules: tables of kb/rules/time.toml.
        rows: training rows.
        heldout: rows that are measured on.
        measured: how often.
        row: seconds of the forward pass of one row.
        mean: its tokens.
    """
    run, asked, objective = rules["run"], rules["asked"], settings.objective
    quantised = run["quantised_start_seconds"] if settings.weight_bits < 16 else 0.0
    seconds = run["start_seconds"] + quantised + run["row_seconds"] * (rows + heldout)
    seconds += run["reference_passes"].get(objective, 0) * rows * row
    first = objective in run["scored_at_first"]
    seconds += (measured + first) * run["heldout_passes"].get(objective, 1) * heldout * row
    if settings.gpus > 1:
        return float(seconds)  # several devices are asked nothing
    scored = min(heldout, asked["rows"]) if objective in asked["scores_rows"] else 0
    seconds += asked["row_passes"] * scored * row
    if objective not in asked["objectives"]:
        return float(seconds)
    answers = asked["together"]
    batch = answers * asked["question_tokens"] * row / mean
    batch += asked["answer_tokens"] * rates.token_seconds(plan, settings, device, answers=answers)
    batches = asked["batches"] + (1 if scored else 0)
    return float(seconds + 2 * min(batches * batch, max(asked["most_seconds"], batch)))


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


def _micro_tokens(
    settings: MemorySettings, mean: float, lengths: Histogram | None, padding: float
) -> tuple[float, float]:
    """Tokens computed, and tokens that are not padding, of one micro batch.

    Args:
        settings: batch, length and packing are read.
        mean: tokens of a row.
        lengths: their distribution, when known.
        padding: tokens by which a padded length is longer than its longest row, in the mean.
    """
    number = sequences_of(settings)
    if settings.packed:
        full = float(settings.micro_batch * settings.seq_len)
        return full, full
    if lengths is None or not sum(lengths.counts):
        return number * (mean + padding), number * mean
    longest = expected_longest(lengths, number, settings.seq_len)
    return number * (longest + padding), number * mean_length(lengths, settings.seq_len)


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
