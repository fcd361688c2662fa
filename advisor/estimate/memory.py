"""How much memory does one training process need at its peak, on its fullest device?

Goes in: a ModelSpec, MemorySettings and the rules of kb/rules/memory.toml. Comes out: a MemoryEstimate, the largest of
all phases, in parts that each carry their formula and source. Never does: load a model, look at the machine, guess in
silence: what is unknown is named in `notes` and widens the band.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.estimate import activations as act
from advisor.estimate.layers import Layout, layout
from advisor.estimate.tunable import VIRTUAL, count, trainable_parameters, tuner_name
from advisor.types import Band, MemoryEstimate, MemorySettings, ModelSpec, Part

__all__ = ["estimate_memory", "trainable_parameters", "weight_bytes"]

Parts = list[Part]


def estimate_memory(spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any]) -> MemoryEstimate:
    """Estimate the peak memory of one training process.

    Args:
        spec: the model.
        settings: tuner, batch, lengths, precision and sharding; `seq_len` is the longest batch.
        rules: tables of kb/rules/memory.toml (`knowledge.rules["memory"]`).

    Returns:
        The phase with the peak; its parts sum to `peak_bytes.expected`. Decide on `peak_bytes.high`.

    Raises:
        UnknownNameError: the tuner is not known.
    """
    plan = layout(spec)
    trainable = count(spec, plan, settings)
    phases = _phases(spec, plan, settings, rules, trainable)
    phase = max(phases, key=lambda name: sum(part.bytes for part in phases[name]))
    allocated = sum(part.bytes for part in phases[phase])
    device = _device_parts(settings, rules, allocated)
    reserved = allocated + sum(part.bytes for part in device if part.name == "allocator")
    peak = allocated + sum(part.bytes for part in device)
    notes = _notes(plan, settings)
    low, high = _width(settings, rules, plan)
    return MemoryEstimate(
        phase=phase,
        parts=tuple(part for part in (*phases[phase], *device) if part.bytes),
        allocated_bytes=_band(allocated, low, high),
        reserved_bytes=_band(reserved, low, high),
        peak_bytes=_band(peak, low, high),
        trainable_parameters=trainable,
        notes=notes,
    )


def _band(value: int, low: float, high: float) -> Band:
    return Band(low=float(round(value * low)), expected=float(value), high=float(round(value * high)))


def weight_bytes(spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any]) -> int:
    """Bytes of the base weights on one device, before sharding."""
    return _weights(layout(spec), settings, rules)


def _weights(plan: Layout, settings: MemorySettings, rules: Mapping[str, Any]) -> int:
    if settings.weight_bits in (16, 32):
        return plan.parameters * settings.weight_bits // 8
    quantised = plan.blocks * plan.block_weights + plan.other
    kept = plan.parameters - quantised
    return round(quantised * _quantised_bytes(settings, rules)) + kept * 2


def _quantised_bytes(settings: MemorySettings, rules: Mapping[str, Any]) -> float:
    """Bytes of one quantised weight, scales included."""
    if settings.weight_bits == 8:
        return 1.0
    facts = rules["quantised"]
    scale = 4.0 / facts["block_weights"]
    if settings.double_quant:
        scale = 1.0 / facts["block_weights"] + 4.0 / (facts["block_weights"] * facts["double_quant_block"])
    return float(0.5 + scale)


def _phases(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, rules: Mapping[str, Any], trainable: int
) -> dict[str, Parts]:
    steady = _steady(spec, plan, settings, rules, trainable)
    forward = [
        *steady,
        *_gradients(plan, settings, trainable),
        *_kept(spec, plan, settings),
        _loss(spec, plan, settings),
    ]
    backward = [
        *steady, *_gradients(plan, settings, trainable), *_kept(spec, plan, settings),
        *_one_block(spec, plan, settings, rules),
    ]  # fmt: skip
    step = [*steady, *_gradients(plan, settings, trainable), *_step_copy(settings, trainable, rules)]
    phases = {
        "load": _load(plan, settings, rules),
        "forward": forward,
        "backward": backward,
        "optimizer": step,
        "evaluation": [*steady, _loss(spec, plan, settings)],
    }
    if settings.objective in ("rloo", "grpo"):
        phases["generation"] = [*steady, _generation(spec, settings)]
    return phases


def _shards(settings: MemorySettings) -> int:
    return settings.gpus if settings.shard != "none" else 1


def _steady(
    spec: ModelSpec, plan: Layout, settings: MemorySettings, rules: Mapping[str, Any], trainable: int
) -> Parts:
    shards, full = _shards(settings), tuner_name(settings.tuner) == "full"
    weights = _weights(plan, settings, rules)
    parts = [
        Part(
            name="weights", bytes=0 if settings.offload and full else weights // shards,
            formula=f"{plan.parameters:,} parameters at {settings.weight_bits} bits / {shards} devices",
            source=rules["quantised"]["source"],
        )
    ]  # fmt: skip
    if not full:
        size = act.adapter_bytes(settings)
        parts.append(Part(
            name="adapters", bytes=trainable * size // shards,
            formula=f"{trainable:,} x {size} B / {shards}", source=rules["adapters"]["source"],
        ))  # fmt: skip
    if settings.objective in ("dpo", "kto", "rloo") and full:
        parts.append(Part(
            name="reference", bytes=weights // shards,
            formula="a frozen copy of the weights", source=rules["reference"]["source"],
        ))  # fmt: skip
    parts.append(_optimizer(plan, settings, rules, trainable))
    return [*parts, *_communication(plan, settings, rules)]


def _optimizer(plan: Layout, settings: MemorySettings, rules: Mapping[str, Any], trainable: int) -> Part:
    per, fixed = _state_bytes(settings, rules)
    size = _trained_bytes(settings)
    state = 0 if settings.offload else round(trainable * (per if per is not None else fixed * size))
    return Part(
        name="optimizer", bytes=state // _shards(settings),
        formula=f"{settings.optimizer}: {trainable:,} x {state / max(trainable, 1):.3g} B / {_shards(settings)}",
        source=rules["optimizer"]["source"],
    )  # fmt: skip


def _state_bytes(settings: MemorySettings, rules: Mapping[str, Any]) -> tuple[float | None, float]:
    """Bytes a parameter, or None and the number of states in the parameter's own width."""
    table = rules["optimizer"]["states"]
    entry = table.get(settings.optimizer, table["adamw_torch"])
    return (entry.get("bytes"), entry.get("copies", 2.0))


def _trained_bytes(settings: MemorySettings) -> int:
    if tuner_name(settings.tuner) == "full":
        return 4 if settings.weight_bits == 32 else 2
    return act.adapter_bytes(settings)


def _gradients(plan: Layout, settings: MemorySettings, trainable: int) -> Parts:
    size = _trained_bytes(settings)
    return [Part(
        name="gradients", bytes=trainable * size // _shards(settings),
        formula=f"{trainable:,} x {size} B / {_shards(settings)}", source="ftadvisor-measured",
    )]  # fmt: skip


def _kept(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> Parts:
    count_ = act.tokens(settings)
    if not settings.gradient_checkpointing:
        each = act.saved_per_token(spec, plan, settings)
        return [Part(
            name="activations", bytes=plan.blocks * each * count_,
            formula=f"{plan.blocks} blocks x {count_} tokens x {each} B", source="ftadvisor-measured",
        )]  # fmt: skip
    each = act.stream_bytes(settings) * spec.shape.hidden
    kept = -(-plan.blocks // settings.checkpoint_every)
    return [Part(
        name="activations", bytes=0 if settings.offload else kept * each * count_,
        formula=f"{kept} block inputs x {count_} tokens x {each} B", source="ftadvisor-measured",
    )]  # fmt: skip


def _one_block(spec: ModelSpec, plan: Layout, settings: MemorySettings, rules: Mapping[str, Any]) -> Parts:
    count_, each = act.tokens(settings), act.saved_per_token(spec, plan, settings)
    blocks = settings.checkpoint_every if settings.gradient_checkpointing else 0
    gradient = act.compute_bytes(settings) * (2 * spec.shape.intermediate + 2 * spec.shape.hidden)
    largest = max(one.weights for one in plan.linears)
    return [
        Part(
            name="recomputed", bytes=blocks * each * count_,
            formula=f"{blocks} blocks x {count_} tokens x {each} B", source="ftadvisor-measured",
        ),
        Part(
            name="activation_gradients", bytes=gradient * count_,
            formula=f"{count_} tokens x {gradient} B", source="ftadvisor-measured",
        ),
        Part(
            name="dequantised", bytes=2 * largest if settings.weight_bits == 4 else 0,
            formula=f"the largest matrix in 16 bits: {largest:,} x 2 B", source=rules["quantised"]["source"],
        ),
    ]  # fmt: skip


def _loss(spec: ModelSpec, plan: Layout, settings: MemorySettings) -> Part:
    head = (plan.head or plan.embedding) if tuner_name(settings.tuner) == "full" else 0
    return Part(
        name="logits_and_loss", bytes=act.loss_bytes(spec, settings, head),
        formula=f"{settings.loss}: {act.tokens(settings)} tokens x vocabulary of {spec.shape.vocab}",
        source="ftadvisor-measured",
    )  # fmt: skip


def _step_copy(settings: MemorySettings, trainable: int, rules: Mapping[str, Any]) -> Parts:
    copies = rules["optimizer"]["states"].get(settings.optimizer, {}).get("step_copies", 0.0)
    size = _trained_bytes(settings)
    return [Part(
        name="optimizer_copies", bytes=round(copies * trainable * size) // _shards(settings),
        formula=f"{copies} x {trainable:,} x {size} B", source=rules["optimizer"]["source"],
    )]  # fmt: skip


def _load(plan: Layout, settings: MemorySettings, rules: Mapping[str, Any]) -> Parts:
    largest = max((plan.embedding, plan.head, *(one.weights for one in plan.linears)))
    return [
        Part(
            name="weights", bytes=_weights(plan, settings, rules) // _shards(settings),
            formula="base weights", source=rules["quantised"]["source"],
        ),
        Part(name="shard", bytes=largest * 2, formula="the largest tensor in 16 bits", source="ftadvisor-measured"),
    ]  # fmt: skip


def _generation(spec: ModelSpec, settings: MemorySettings) -> Part:
    sequences = max(settings.micro_batch, settings.generations)
    length = settings.seq_len + settings.completion_tokens
    per_token = (
        2 * spec.shape.layers * spec.shape.kv_heads * spec.shape.head_dim * act.compute_bytes(settings)
    )
    logits = 8 * sequences * spec.shape.vocab
    return Part(
        name="kv_cache", bytes=sequences * length * per_token + logits,
        formula=f"{sequences} sequences x {length} tokens x {per_token} B + logits", source="ftadvisor-measured",
    )  # fmt: skip


def _communication(plan: Layout, settings: MemorySettings, rules: Mapping[str, Any]) -> Parts:
    if settings.gpus < 2:
        return []
    facts = rules["communication"]
    gathered = 0
    if settings.shard != "none":
        largest = max(plan.block_weights, plan.embedding, plan.head)
        width = 4 if settings.weight_bits == 32 else 2
        gathered = round(facts["gathered_blocks"] * largest * width)
    return [Part(
        name="communication", bytes=gathered + facts["buffer_bytes"],
        formula="gathered block and the library's buffers", source=facts["source"],
    )]  # fmt: skip


def _device_parts(settings: MemorySettings, rules: Mapping[str, Any], allocated: int) -> Parts:
    facts = rules["device"][settings.device]
    group = "full" if tuner_name(settings.tuner) == "full" else "adapters"
    return [
        Part(
            name="allocator", bytes=round(allocated * facts[f"fragmentation_{group}"]),
            formula=f"{facts[f'fragmentation_{group}']:.0%} of what is allocated", source=facts["source"],
        ),
        Part(
            name="context", bytes=facts["context_bytes"],
            formula="what the process holds before the model", source=facts["source"],
        ),
    ]  # fmt: skip


def _width(settings: MemorySettings, rules: Mapping[str, Any], plan: Layout) -> tuple[float, float]:
    bands = rules["error"]
    name = (
        "full"
        if tuner_name(settings.tuner) == "full"
        else "quantised"
        if settings.weight_bits == 4
        else "adapters"
    )
    band = bands[name]
    low, high = band["low"], band["high"]
    if not plan.exact:
        extra = bands["unknown_layout"]
        low, high = low * extra["low"], high * extra["high"]
    return low, high


def _notes(plan: Layout, settings: MemorySettings) -> tuple[str, ...]:
    notes = [plan.note] if plan.note else []
    if tuner_name(settings.tuner) in VIRTUAL and not settings.virtual_tokens:
        notes.append("the number of virtual tokens was not given and counts as none")
    return tuple(notes)
