"""Warnings about the machine: memory, precision, platform, time.

Goes in: a Case. Comes out: for each code the figures of its text, or None when it does not apply.
Never does: hold the texts (kb/warnings.toml).
"""

from __future__ import annotations

from typing import Any

import msgspec

from advisor.estimate.memory import estimate_memory
from advisor.knowledge import Knowledge
from advisor.plan.case import Case, allowed_hours, limit, takes_too_long
from advisor.units import format_bytes, format_seconds

Values = dict[str, Any] | None


def no_bf16(case: Case, knowledge: Knowledge) -> Values:
    """A graphics card without bf16."""
    machine = case.situation.machine
    return {} if machine.device == "cuda" and not machine.bf16 else None


def fp16_overflow_model(case: Case, knowledge: Knowledge) -> Values:
    """A model family that overflows in fp16, on a card that has nothing else."""
    machine = case.situation.machine
    if machine.device != "cuda" or machine.bf16:
        return None
    refused = case.advice.model_refused
    named = case.situation.spec
    if refused is not None and refused.code == "fp16_overflow_model":
        return {"detail": refused.reason}
    spec = named or case.spec
    return {"model": spec.id, "family": spec.family} if spec is not None and not spec.fp16_safe else None


def no_flash_attn(case: Case, knowledge: Knowledge) -> Values:
    """No FlashAttention 2 on this device."""
    machine = case.situation.machine
    return {} if machine.device == "cuda" and not machine.flash else None


def tight_memory(case: Case, knowledge: Knowledge) -> Values:
    """It fits with little to spare."""
    fitted = case.option.fit if case.option else None
    if fitted is None or case.option is None or not case.trained() or case.over_memory:
        return None
    free = case.situation.machine.free_bytes
    if fitted.tight:
        return {"severity": "must"}
    if fitted.peak_high > limit(knowledge, "choice", "fit", "snug_share") * free:
        return {"severity": "should"}
    for stage in fitted.stages:
        if not stage.settings.gradient_checkpointing:
            continue
        plain = msgspec.structs.replace(stage.settings, gradient_checkpointing=False, micro_batch=1)
        without = estimate_memory(case.option.proposal.spec, plain, knowledge.rules["memory"])
        if without.peak_bytes.high > free:
            return {"severity": "should", "detail": "without recomputed activations it would not fit"}
    return None


def offload_cpu_ram(case: Case, knowledge: Knowledge) -> Values:
    """The host's memory carries part of the load."""
    fitted = case.option.fit if case.option else None
    if fitted is None or case.spec is None or fitted.layout.parallel not in ("fsdp", "zero3"):
        return None
    weights, ram = case.spec.parameters * 2, case.situation.machine.ram_bytes
    heavy = weights > limit(knowledge, "choice", "fit", "host_weights_share") * ram
    if not (fitted.layout.offload or heavy):
        return None
    return {"detail": f"loading alone passes {format_bytes(weights)} through {format_bytes(ram)}"}


def multi_gpu_sharding(case: Case, knowledge: Knowledge) -> Values:
    """The model is spread over several devices."""
    fitted = case.option.fit if case.option else None
    return {} if fitted is not None and fitted.layout.parallel in ("fsdp", "zero3") else None


def slow(case: Case, knowledge: Knowledge) -> Values:
    """It will take long."""
    if not case.trained():
        return None
    seconds, fitted = case.seconds(), case.option.fit if case.option else None
    if takes_too_long(case, knowledge):
        hours = format_seconds(3600 * allowed_hours(case, knowledge))
        told = case.situation.scenario.goal.max_hours is not None
        beyond = f"{hours} are allowed" if told else f"more than {hours} is not advised"
        return {"severity": "must", "detail": f"about {format_seconds(seconds)}, and {beyond}"}
    patience = 60 * limit(knowledge, "choice", "fit", "slow_minutes_without_gpu")
    if case.situation.machine.device in ("cpu", "mps") and seconds > patience:
        return {"detail": f"about {format_seconds(seconds)} on {case.situation.machine.name}"}
    if fitted and (fitted.layout.offload or (fitted.layout.shard != "none" and case.tuner == "qlora")):
        return {
            "detail": f"every layer is fetched and unpacked in each step; about {format_seconds(seconds)}"
        }
    if seconds > limit(knowledge, "choice", "fit", "slow_hours") * 3600:
        return {"detail": f"about {format_seconds(seconds)}"}
    return None


def no_bitsandbytes(case: Case, knowledge: Knowledge) -> Values:
    """No 4-bit training on this platform."""
    return None if case.situation.machine.bitsandbytes else {}


def use_mlx(case: Case, knowledge: Knowledge) -> Values:
    """Apple silicon has a framework of its own."""
    return {} if case.situation.machine.vendor == "apple" else None


def long_context_memory(case: Case, knowledge: Knowledge) -> Values:
    """Long sequences, in training or where the model runs."""
    longest = max(case.longest(), case.situation.scenario.goal.context_tokens or 0)
    known = [d.p95_tokens or d.mean_tokens or 0 for d in case.situation.train]
    longest = max([longest, *(round(n) for n in known)])
    if longest < limit(knowledge, "data", "lengths", "long_from"):
        return None
    return {"tokens": f"{longest:,}"}


CHECKS = tuple(
    (check.__name__, check)
    for check in (
        no_bf16, fp16_overflow_model, no_flash_attn, no_bitsandbytes, use_mlx, tight_memory,
        multi_gpu_sharding, offload_cpu_ram, long_context_memory, slow,
    )
)  # fmt: skip
