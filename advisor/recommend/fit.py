"""With which batch, length and sharding does a proposal fit this machine, if at all?

Goes in: a Proposal and a Situation. Comes out: Fit (a MemorySettings and estimate for each stage) or
NoFit with the bytes that would be needed. Decides on the upper end of the estimate at the longest batch.
Never does: weigh methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from advisor.estimate.memory import estimate_memory
from advisor.knowledge import Knowledge
from advisor.recommend.chains import PAIR_OBJECTIVES, REINFORCEMENT
from advisor.recommend.gates import Proposal, estimated_as, unknown_of
from advisor.recommend.lengths import Lengths, lengths_of, round_up
from advisor.recommend.rank import rank_for
from advisor.recommend.situation import Situation, counted_rows, datasets_of, rule
from advisor.types import (
    MemoryEstimate,
    MemorySettings,
    ModelSpec,
    Objective,
    Parallel,
    Record,
)
from advisor.units import format_bytes

Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"]


class Layout(Record, frozen=True, kw_only=True):
    """How the work is spread over the devices."""

    parallel: Parallel = "none"
    shard: Literal["none", "fsdp"] = "none"
    gpus: int = 1
    offload: bool = False
    exact: bool = False
    """Only the most exact way of storing weights is tried, because sharding allows it anyway."""


class StageFit(Record, frozen=True, kw_only=True):
    """Settings of one stage that fit, and their estimate."""

    objective: Objective
    settings: MemorySettings
    estimate: MemoryEstimate
    lengths: Lengths
    rank: int
    completion_tokens: int = 0
    shortened: bool = False
    """True when the sequence had to be shorter than the data asks for."""
    cut: bool = False
    """True when the length is below what the rows need, because nothing else fits."""
    cramped: bool = False
    """True when the rank had to be smaller than the data asks for."""
    least_batch: bool = False
    """True when nothing but the smallest micro-batch fits."""


class Fit(Record, frozen=True, kw_only=True):
    """A proposal that fits."""

    stages: tuple[StageFit, ...]
    layout: Layout
    tight: bool

    @property
    def whole(self) -> bool:
        """True when neither length nor rank had to give way."""
        return not any(stage.shortened or stage.cramped for stage in self.stages)

    @property
    def peak_high(self) -> float:
        """Upper end of the largest stage, in bytes on the fullest device."""
        return max(stage.estimate.peak_bytes.high for stage in self.stages)


class NoFit(Record, frozen=True, kw_only=True):
    """A proposal that does not fit, at its most frugal."""

    needed_bytes: float
    free_bytes: int
    reason: str
    rough: bool = False
    """True when only the weights were counted."""


class _Try(Record, frozen=True, kw_only=True):
    micro_batch: int
    seq_len: int
    checkpointing: bool = True
    weight_bits: Literal[4, 8, 16, 32] = 16
    optimizer: Optimizer = "adamw_torch"
    rank: int = 16
    completion: int = 0
    loss: Literal["full_logits", "chunked"] = "chunked"


def fit(
    proposal: Proposal, situation: Situation, knowledge: Knowledge, *, offload: bool = False
) -> Fit | NoFit:
    """Find the largest batch and length, without or (`offload`) with host memory, that fits every stage."""
    worst: NoFit | None = None
    squeezed: Fit | None = None
    for layout in _layouts(proposal, situation, knowledge, offload=offload):
        found = _fit_chain(proposal, layout, situation, knowledge)
        if isinstance(found, NoFit):
            worst = found
        elif found.whole:
            return found
        else:
            squeezed = squeezed or found
    free = situation.machine.free_bytes
    nowhere = NoFit(needed_bytes=0, free_bytes=free, reason="there is no host memory to move to")
    return squeezed or worst or nowhere


def _fit_chain(proposal: Proposal, layout: Layout, situation: Situation, knowledge: Knowledge) -> Fit | NoFit:
    """All stages in one layout, or the first that does not fit."""
    stages: list[StageFit] = []
    for objective in proposal.chain:
        found = _fit_stage(proposal, objective, layout, situation, knowledge)
        if isinstance(found, NoFit):
            return found
        stages.append(found)
    high = max(stage.estimate.peak_bytes.high for stage in stages)
    share = rule(knowledge, "choice", "fit")["tight_share"]
    tight = (
        layout.offload
        or high > share * situation.machine.free_bytes
        or any(stage.shortened or stage.cramped for stage in stages)
    )
    return Fit(stages=tuple(stages), layout=layout, tight=tight)


def _layouts(
    proposal: Proposal, situation: Situation, knowledge: Knowledge, *, offload: bool
) -> Iterator[Layout]:
    gpus = situation.machine.gpus
    if gpus == 1:
        if not offload:
            yield Layout()
        return
    if not offload:
        yield Layout(parallel="ddp", gpus=gpus, exact=proposal.tuner == "full")
        yield Layout(parallel="fsdp", shard="fsdp", gpus=gpus)
        return
    rules = rule(knowledge, "choice", "fit")
    bits = 4.2 if proposal.facts.quantised_base else 16.0
    per_parameter = rules["offload_bytes_full"] if proposal.tuner == "full" else bits / 8
    if proposal.spec.parameters * per_parameter <= situation.machine.ram_bytes * rules["host_share"]:
        yield Layout(parallel="fsdp", shard="fsdp", gpus=gpus, offload=True)


# --- one stage -----------------------------------------------------------------------------------


def _fit_stage(
    proposal: Proposal, objective: Objective, layout: Layout, situation: Situation, knowledge: Knowledge
) -> StageFit | NoFit:
    lengths = lengths_of(datasets_of(objective, situation), rule(knowledge, "data", "lengths"))
    free = _room(proposal, situation, knowledge)
    if objective == "cpt":
        lengths = _text_lengths(lengths, knowledge)
    tries = list(_tries(proposal, objective, lengths, layout, situation, knowledge))
    frugal = tries[-1]
    if alone := _weights_alone(proposal, frugal, layout, situation):
        return alone
    least = _estimate(proposal, objective, frugal, layout, situation, knowledge)
    if least[1].peak_bytes.high > free:
        needed = least[1].peak_bytes.high
        reason = (
            f"{objective} needs up to {format_bytes(needed)} with micro-batch {frugal.micro_batch} at "
            f"{least[0].seq_len:,} tokens, and {format_bytes(free)} are free"
        )
        return NoFit(needed_bytes=needed, free_bytes=free, reason=reason)
    comfortable = rule(knowledge, "choice", "fit")["tight_share"] * free
    for attempt in tries:
        settings, estimate = _estimate(proposal, objective, attempt, layout, situation, knowledge)
        limit = free if attempt.checkpointing or not proposal.facts.gradient_checkpointing else comfortable
        if estimate.peak_bytes.high <= limit:
            first = tries[0]
            return StageFit(
                objective=objective, settings=settings, estimate=estimate, lengths=lengths,
                rank=attempt.rank, completion_tokens=attempt.completion,
                shortened=attempt.seq_len < first.seq_len or attempt.completion < first.completion,
                cut=attempt.seq_len < min(lengths.least, first.seq_len), cramped=attempt.rank < first.rank,
                least_batch=attempt.micro_batch == frugal.micro_batch < first.micro_batch,
            )  # fmt: skip
    return NoFit(
        needed_bytes=least[1].peak_bytes.high, free_bytes=free, reason="no setting fits"
    )  # pragma: no cover - the last attempt is the frugal one, which fitted


def _room(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> int:
    """Bytes that a stage may take: of the device's memory only a share where the model's shape is guessed."""
    guessed = situation.named.how == "guessed" and proposal.spec == situation.spec
    share = rule(knowledge, "choice", "fit")["guessed_share"] if guessed else 1.0
    return round(situation.machine.free_bytes * share)


def too_large(proposal: Proposal, situation: Situation) -> NoFit | None:
    """The verdict without an estimate: weights that exceed all devices together."""
    bits = _variants(proposal, situation)[-1][0]
    gpus = situation.machine.gpus
    layout = Layout(gpus=gpus, shard="fsdp" if gpus > 1 else "none")
    return _weights_alone(proposal, _Try(micro_batch=1, seq_len=1, weight_bits=bits), layout, situation)


def _weights_alone(proposal: Proposal, frugal: _Try, layout: Layout, situation: Situation) -> NoFit | None:
    """Rule out at once what exceeds the device with its weights alone."""
    if layout.offload:
        return None
    shards = layout.gpus if layout.shard != "none" else 1
    alone = proposal.spec.parameters * frugal.weight_bits / 8 / shards
    free = situation.machine.free_bytes
    if alone <= free:
        return None
    share = f" on each of {shards} devices" if shards > 1 else ""
    reason = f"its weights alone take {format_bytes(alone)}{share}, and {format_bytes(free)} are free"
    return NoFit(needed_bytes=alone, free_bytes=free, reason=reason, rough=True)


def least_bytes(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> float:
    """What every device must have at least, at the most frugal settings of the largest stage."""
    gpus = situation.machine.gpus
    layout = Layout(gpus=gpus, shard="fsdp" if gpus > 1 else "none")
    peaks = []
    for objective in proposal.chain:
        lengths = lengths_of(datasets_of(objective, situation), rule(knowledge, "data", "lengths"))
        if objective == "cpt":
            lengths = _text_lengths(lengths, knowledge)
        *_, frugal = _tries(proposal, objective, lengths, layout, situation, knowledge)
        _, estimate = _estimate(proposal, objective, frugal, layout, situation, knowledge)
        peaks.append(estimate.peak_bytes.high)
    return max(peaks, default=0.0)


def _tries(
    proposal: Proposal, objective: Objective, lengths: Lengths, layout: Layout, situation: Situation,
    knowledge: Knowledge,
) -> Iterator[_Try]:  # fmt: skip
    """Settings from the wished to the most frugal, what costs least given up first."""
    limits = rule(knowledge, "data", "lengths")
    completion = _completion(objective, knowledge)
    most = max(proposal.spec.context_tokens - completion, limits["smallest"])
    target, least = min(lengths.target, most), min(lengths.least, most)
    rank = rank_for(proposal, objective, situation, knowledge)
    variants = _variants(proposal, situation)[: 1 if layout.exact else None]
    batches = _batches(proposal.spec, objective, target + completion, situation, knowledge)
    if layout.offload:
        batches = batches[-1:]
    bits, optimizer = variants[0]
    first = _Try(
        micro_batch=batches[0], seq_len=target, weight_bits=bits, optimizer=optimizer, rank=rank,
        completion=completion,
    )  # fmt: skip
    small = proposal.spec.parameters < rule(knowledge, "choice", "batch")["small_model_below"]
    frees = proposal.facts.gradient_checkpointing
    if not frees or small or situation.machine.device == "cpu":
        if situation.machine.device == "cpu" and objective in ("sft", "orpo", "simpo"):
            yield msgspec.structs.replace(first, checkpointing=False, loss="full_logits")
        yield msgspec.structs.replace(first, checkpointing=False)
    if not frees:
        for batch in batches[1:]:
            yield msgspec.structs.replace(first, checkpointing=False, micro_batch=batch)
        yield msgspec.structs.replace(first, checkpointing=False, micro_batch=batches[-1], seq_len=least)
        return
    last = first
    for bits, optimizer in variants:
        for batch in batches:
            last = msgspec.structs.replace(first, micro_batch=batch, weight_bits=bits, optimizer=optimizer)
            yield last
    shorter_rows = [round_up((target + least) / 2, limits), least]
    if situation.spec is not None and proposal.spec.id == situation.spec.id:
        shorter_rows.append(min(lengths.bare, most))
    shorter_rows = [n for n in dict.fromkeys(shorter_rows) if n < target]
    yield from _frugal(last, shorter_rows, proposal, knowledge)


def _frugal(last: _Try, shorter_rows: list[int], proposal: Proposal, knowledge: Knowledge) -> Iterator[_Try]:
    """What is given up when not even the smallest batch fits: length, then answers, then rank."""
    for seq_len in shorter_rows:
        last = msgspec.structs.replace(last, seq_len=seq_len)
        yield last
    for shorter in _shorter_completions(last.completion):
        last = msgspec.structs.replace(last, completion=shorter)
        yield last
    least_rank = rule(knowledge, "settings", "rank")["tight_memory"]
    while proposal.facts.group == "lora" and last.rank > least_rank:
        last = msgspec.structs.replace(last, rank=max(least_rank, last.rank // 2))
        yield last


def _text_lengths(lengths: Lengths, knowledge: Knowledge) -> Lengths:
    """Plain text is cut into sequences of a length of our own choice."""
    rules = rule(knowledge, "data", "text_volume")
    return Lengths(
        mean=rules["sequence"], target=rules["sequence"], least=rules["least_sequence"],
        bare=rules["least_sequence"], longest=None,
        said="plain text is joined and cut into full sequences",
    )  # fmt: skip


def _completion(objective: Objective, knowledge: Knowledge) -> int:
    if objective not in REINFORCEMENT:
        return 0
    value = knowledge.objectives[objective].settings.get("max_completion_length", 0)
    return int(value) if isinstance(value, int | float) else 0


def _shorter_completions(completion: int) -> tuple[int, ...]:
    return tuple(n for n in (512, 256) if n < completion)


def _variants(proposal: Proposal, situation: Situation) -> list[tuple[Literal[4, 16, 32], Optimizer]]:
    """(bits of the stored weights, optimizer), the most exact first."""
    if proposal.facts.quantised_base:
        return [(4, "adamw_torch")]
    if proposal.tuner == "full":
        plain: list[tuple[Literal[4, 16, 32], Optimizer]] = [(32, "adamw_torch")]
        if situation.machine.precision == "bf16":
            plain.append((16, "adamw_torch"))
            if situation.machine.bitsandbytes:
                plain.append((16, "adamw_8bit"))
        return plain
    wide = proposal.facts.stored_bits == 32 or situation.machine.precision == "fp32"
    return [(32 if wide else 16, "adamw_torch")]


def packs(objective: Objective, situation: Situation, knowledge: Knowledge) -> bool:
    """True when short rows are joined into full sequences: for plain text, and on a CPU when many.

    Not where tasks are mixed: rows of like length are joined, so that a step would hold one task only.
    """
    if objective == "cpt":
        return True
    if objective != "sft" or situation.machine.device != "cpu" or situation.mixes:
        return False
    lengths = lengths_of(datasets_of(objective, situation), rule(knowledge, "data", "lengths"))
    rows = counted_rows(objective, situation, knowledge)
    full = rows * lengths.mean / lengths.target
    return bool(full >= rule(knowledge, "platform", "cpu")["packing_rows_from"])


def _batches(
    spec: ModelSpec, objective: Objective, seq_len: int, situation: Situation, knowledge: Knowledge
) -> list[int]:
    """Micro-batches to try, from the one that keeps the device busy to the smallest."""
    rules = rule(knowledge, "choice", "batch")
    if packs(objective, situation, knowledge):
        return [1]
    small = spec.parameters < rules["small_model_below"]
    tokens = rules["tokens_small_model"] if small else rules["tokens"]
    floor = 2 if objective == "kto" else 1
    rows = 2 if objective in PAIR_OBJECTIVES else 1
    wanted = max(floor, min(int(rules["largest"]), int(tokens // max(rows * seq_len, 1))))
    if objective == "kto":
        wanted = max(wanted, 4)
    few = counted_rows(objective, situation, knowledge) < rule(knowledge, "data", "rows")["modest_below"]
    if objective == "sft" and few:
        wanted = min(wanted, int(rule(knowledge, "settings", "batch")["small_data"]))
    batches, batch = [], 1
    while batch <= wanted:
        batches.append(batch)
        batch *= 2
    return [b for b in reversed(batches) if b >= floor]


def _estimate(
    proposal: Proposal, objective: Objective, attempt: _Try, layout: Layout, situation: Situation,
    knowledge: Knowledge,
) -> tuple[MemorySettings, MemoryEstimate]:  # fmt: skip
    settings = memory_settings(proposal, objective, attempt, layout, situation, knowledge)
    return settings, estimate_memory(proposal.spec, settings, knowledge.rules["memory"])


def memory_settings(
    proposal: Proposal, objective: Objective, attempt: _Try, layout: Layout, situation: Situation,
    knowledge: Knowledge,
) -> MemorySettings:  # fmt: skip
    """The estimator's input for one attempt."""
    facts = proposal.facts.settings
    precision = situation.machine.precision
    if precision == "fp16" and not proposal.spec.fp16_safe:
        precision = "fp32"
    generations = knowledge.objectives[objective].settings.get("num_generations", 0)
    bits = attempt.weight_bits
    plain = proposal.spec.model_type in rule(knowledge, "choice", "attention")["eager_only"]
    return MemorySettings(
        tuner=estimated_as(proposal.tuner, proposal.facts), stated=proposal.facts.memory,
        unknown=unknown_of(proposal.tuner, proposal.facts), objective=objective, precision=precision,
        weight_bits=32 if precision == "fp32" and bits == 16 else bits,
        micro_batch=attempt.micro_batch, seq_len=attempt.seq_len + attempt.completion,
        gradient_checkpointing=attempt.checkpointing, optimizer=attempt.optimizer,
        lora_r=attempt.rank, target="all-linear", attention="eager" if plain else "sdpa", loss=attempt.loss,
        virtual_tokens=_int(facts.get("virtual_tokens")), bottleneck=_int(facts.get("bottleneck")),
        preserved_share=_share(facts),
        generations=_int(generations),
        classes=max([d.classes or 0 for d in situation.demos], default=0),
        gpus=layout.gpus, shard=layout.shard, offload=layout.offload, device=situation.machine.device,
        packed=proposal.facts.packing and packs(objective, situation, knowledge),
    )  # fmt: skip


def _share(facts: Mapping[str, Any]) -> float:
    return float(facts.get("preserved_share", MemorySettings().preserved_share))


def _int(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0
