"""How many bytes do weights, adapters, gradients, optimizer states and communication hold at any batch?

Goes in: the Layout of a model, MemorySettings and kb/rules/memory.toml. Comes out: parts with formula and
source. Never does: count activations; choose a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.estimate import stated
from advisor.estimate.activations import adapter_bytes, trains_everything
from advisor.estimate.layers import Layout, targeted
from advisor.estimate.tunable import frozen_subspace, tuner_name
from advisor.types import MemorySettings, Part

Rules = Mapping[str, Any]
WITH_REFERENCE = frozenset({"rloo", "grpo"})
"""Objectives that hold a frozen copy of fully tuned weights; DPO and KTO score their reference beforehand."""


def shards(settings: MemorySettings) -> int:
    """Devices that share weights, gradients and optimizer states."""
    return settings.gpus if settings.shard != "none" else 1


def stored_bytes(settings: MemorySettings) -> int:
    """Bytes of a weight that is not quantised."""
    return 4 if settings.weight_bits == 32 else 2


def trained_bytes(settings: MemorySettings) -> int:
    """Bytes of a trained weight, and so of its gradient."""
    return stored_bytes(settings) if trains_everything(settings) else adapter_bytes(settings)


def weight_total(plan: Layout, settings: MemorySettings, rules: Rules) -> int:
    """Bytes of the base weights over all devices; embeddings, output matrix, norms and experts are never
    quantised."""
    if settings.weight_bits in (16, 32):
        return plan.parameters * settings.weight_bits // 8
    quantised = plan.quantised_weights
    return round(quantised * _quantised_bytes(settings, rules)) + (plan.parameters - quantised) * 2


def _quantised_bytes(settings: MemorySettings, rules: Rules) -> float:
    """Bytes of one quantised weight, scales included."""
    facts = rules["quantised"]
    if settings.weight_bits == 8:
        return float(facts["int8_bytes"])
    block, outer = float(facts["block_weights"]), float(facts["double_quant_block"])
    scale = 1.0 / block + 4.0 / (block * outer) if settings.double_quant else 4.0 / block
    return 0.5 + scale


def steady(plan: Layout, settings: MemorySettings, rules: Rules, trainable: int) -> list[Part]:
    """Parts that are held in every phase of training."""
    full, count = trains_everything(settings), shards(settings)
    weights = weight_total(plan, settings, rules)
    on_host = settings.offload and settings.shard != "none"
    kind = f"{settings.weight_bits} bits" + (", scales included" if settings.weight_bits == 4 else "")
    parts = [
        Part(
            name="weights",
            bytes=0 if on_host else weights // count,
            formula=f"{plan.parameters:,} parameters at {kind} / {count}",
            source=rules["quantised"]["source"],
        )
    ]
    if not full:
        size = adapter_bytes(settings)
        parts.append(
            _part("adapters", trainable * size // count, f"{trainable:,} x {size} B / {count}", rules)
        )
    if settings.stated is not None:
        parts.append(_fixed(plan, settings, rules))
    if tuner_name(settings.tuner) == "osf":
        parts.append(_subspaces(plan, settings, rules))
    if full and settings.objective in WITH_REFERENCE and not on_host:
        parts.append(_part("reference", weights // count, "a frozen copy of the weights", rules))
    return [*parts, _optimizer(settings, rules, trainable), *_communication(plan, settings, rules)]


def _fixed(plan: Layout, settings: MemorySettings, rules: Rules) -> Part:
    """Tensors of a tuner that are not trained."""
    chosen = targeted(plan.linears, settings.target)
    size = (
        stated.frozen_bytes(settings.stated, chosen, plan.blocks, settings.lora_r) if settings.stated else 0
    )
    return Part(
        name="fixed", bytes=size, formula="tensors of the tuner that are not trained",
        source=rules["adapters"]["source"],
    )  # fmt: skip


def _subspaces(plan: Layout, settings: MemorySettings, rules: Rules) -> Part:
    """The directions of every matrix as they were, which changes are told from and gradients kept away
    from."""
    chosen = targeted(plan.linears, settings.target)
    entries = plan.blocks * sum(frozen_subspace(one, settings.preserved_share) for one in chosen)
    size = stored_bytes(settings)
    return _part("subspaces", entries * size, f"{entries:,} x {size} B", rules)


def _part(name: str, size: int, formula: str, rules: Rules) -> Part:
    return Part(name=name, bytes=size, formula=formula, source=rules[name]["source"])


def optimizer_facts(settings: MemorySettings, rules: Rules) -> tuple[Mapping[str, float], bool]:
    """Return the facts of the optimizer, and whether it is known (else those of AdamW)."""
    states = rules["optimizer"]["states"]
    return states.get(settings.optimizer, states["adamw_torch"]), settings.optimizer in states


def _optimizer(settings: MemorySettings, rules: Rules, trainable: int) -> Part:
    facts, _ = optimizer_facts(settings, rules)
    each = facts.get("bytes", facts.get("copies", 0.0) * trained_bytes(settings))
    size = 0 if settings.offload else round(trainable * each / shards(settings))
    formula = f"{settings.optimizer}: {trainable:,} x {each:g} B / {shards(settings)}"
    return _part("optimizer", size, formula, rules)


def gradients(settings: MemorySettings, rules: Rules, trainable: int) -> Part:
    """Gradients of all trained weights."""
    size, count = trained_bytes(settings), shards(settings)
    gone = settings.optimizer_in_backward or (settings.offload and settings.shard != "none")
    held = 0 if gone else trainable * size // count
    return _part("gradients", held, f"{trainable:,} x {size} B / {count}", rules)


def step_copies(settings: MemorySettings, rules: Rules, trainable: int) -> Part:
    """Temporary copies that an unfused optimizer makes of all trained weights at once."""
    facts, _ = optimizer_facts(settings, rules)
    copies = 0.0 if settings.offload else facts.get("step_copies", 0.0)
    size = round(copies * trainable * trained_bytes(settings) / shards(settings))
    formula = f"{copies:g} x {trainable:,} x {trained_bytes(settings)} B / {shards(settings)}"
    return Part(name="optimizer_copies", bytes=size, formula=formula, source=rules["optimizer"]["source"])


def _communication(plan: Layout, settings: MemorySettings, rules: Rules) -> list[Part]:
    """Weights gathered from all devices: blocks on their way, and what lies outside the blocks throughout."""
    if settings.gpus < 2 or settings.shard == "none":
        return []
    facts = rules["communication"]
    root = plan.embedding + plan.positions + plan.head + plan.final_norm
    entries = round(facts["gathered_blocks"] * plan.block_weights) + root
    return [
        Part(
            name="gathered",
            bytes=entries * stored_bytes(settings),
            formula=f"{facts['gathered_blocks']:g} blocks, embedding and output matrix: "
            f"{entries:,} x {stored_bytes(settings)} B",
            source=facts["source"],
        )
    ]


def communication_buffers(settings: MemorySettings, rules: Rules) -> Part:
    """What the communication library takes beside torch's allocator."""
    facts = rules["communication"]
    return Part(
        name="communication",
        bytes=facts["buffer_bytes"] if settings.gpus > 1 else 0,
        formula=f"buffers of {settings.gpus} devices, outside torch's allocator",
        source=facts["source"],
    )
