"""How much memory does one training process need at its peak, on its fullest device?

Goes in: a ModelSpec, MemorySettings and the rules of kb/rules/memory.toml. Comes out: a MemoryEstimate,
the largest of all phases, in parts that each carry their formula and source. Never does: load a model, look
at the machine, guess in silence: what is unknown is named in `notes` and widens the band.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import structs

from advisor.estimate import activations as act
from advisor.estimate import states
from advisor.estimate.layers import targeted
from advisor.estimate.phases import Case, case_of, held_bytes, phases_of
from advisor.estimate.tunable import LOW_RANK, VIRTUAL, outputs, trainable_parameters, tuner_name
from advisor.types import Band, MemoryEstimate, MemorySettings, ModelSpec, Part, TracedPeaks

__all__ = ["estimate_memory", "traced_estimate", "trainable_parameters"]


def estimate_memory(spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any]) -> MemoryEstimate:
    """Estimate the peak memory of one training process.

    Args:
        spec: the model.
        settings: tuner, batch, lengths, precision and sharding; `seq_len` is that of the longest batch.
        rules: tables of kb/rules/memory.toml (`knowledge.rules["memory"]`).

    Returns:
        The phase with the peak; its parts sum to `peak_bytes.expected`. Decide on `peak_bytes.high`.

    Raises:
        UnknownNameError: the tuner is not known.
    """
    case = case_of(spec, settings, rules)
    phase, parts = _fullest(case)
    return _estimate(case, phase.partition(":")[0], parts, passing=parts, engine="closed_form")


def _fullest(case: Case) -> tuple[str, list[Part]]:
    """The phase with the peak, and its parts."""
    return max(phases_of(case).items(), key=lambda one: held_bytes(one[1]))


def _estimate(
    case: Case, phase: str, parts: list[Part], *, passing: list[Part], engine: Literal["closed_form", "trace"]
) -> MemoryEstimate:
    """Add what the device takes, and the band; `passing` are the parts among which the heap gets holes."""
    allocated = held_bytes(parts)
    allocator, context, kernels = _device(case, allocated, passing)
    buffers = states.communication_buffers(case.settings, case.rules)
    low, high = _width(case)
    total = allocated + allocator.bytes + context.bytes + kernels.bytes + buffers.bytes
    return MemoryEstimate(
        phase=phase,
        parts=tuple(part for part in (*parts, allocator, context, kernels, buffers) if part.bytes),
        allocated_bytes=_band(allocated, low, high, 0),
        reserved_bytes=_band(allocated + allocator.bytes, low, high, 0),
        peak_bytes=_band(total, low, high, 0 if case.settings.device == "cpu" else context.bytes),
        trainable_parameters=case.trainable,
        engine=engine,
        notes=_notes(case),
    )


def traced_estimate(
    spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any], peaks: TracedPeaks
) -> MemoryEstimate:
    """Make an estimate of peaks that the tracer found: the same device layer and band as the closed form has.

    Args:
        spec: the model.
        settings: what was traced.
        rules: tables of kb/rules/memory.toml.
        peaks: from `python -m advisor.train.trace`.
    """
    case = case_of(spec, settings, rules)
    phase, most = peaks.fullest
    parts = [
        case.part("steady", peaks.steady, "live tensors before the step, traced"),
        case.part("step", most - peaks.steady, f"live tensors of {phase}, traced"),
    ]
    found = _estimate(case, phase, parts, passing=_fullest(case)[1], engine="trace")
    if not peaks.traced_blocks:
        return found
    depths = ", ".join(map(str, peaks.traced_blocks))
    note = (
        f"extrapolated: traced with {depths} blocks, and the growth from one depth to the next continued "
        f"to {spec.shape.layers}"
    )
    return structs.replace(found, notes=(*found.notes, note))


def _band(value: int, low: float, high: float, fixed: int) -> Band:
    """Scale what depends on the model; what the device takes by itself keeps its size."""
    moving = value - fixed
    return Band(
        low=round(moving * low) + fixed,
        expected=value,
        high=round(moving * high) + fixed,
    )


def _device(case: Case, allocated: int, passing: list[Part]) -> tuple[Part, Part, Part]:
    facts = case.rules["device"][case.settings.device]
    return (
        _allocator(case, allocated, passing, facts),
        Part(
            name="context",
            bytes=facts["context_bytes"] + (facts.get("bitsandbytes_bytes", 0) if _bitsandbytes(case) else 0),
            formula="what the process holds before the model",
            source=facts["source"],
        ),
        _kernels(case.settings, facts),
    )


def _allocator(case: Case, allocated: int, passing: list[Part], facts: dict[str, Any]) -> Part:
    """What the allocator holds beyond what is used: a share of everything, or of what comes and goes."""
    share = facts[f"fragmentation_{_class(case.settings)}"]
    size, formula = allocated, f"{share:.1%} of what is allocated"
    if "holes" in facts and case.settings.precision == "bf16":
        small = [part for part in passing if part.name in act.PASSING and _in_heap(case, part.name, facts)]
        share, size = facts["holes"], held_bytes(small)
        formula = f"{share:.0%} of {size:,} B that come and go in the heap"
    return Part(name="allocator", bytes=round(size * share), formula=formula, source=facts["source"])


def _in_heap(case: Case, name: str, facts: dict[str, Any]) -> bool:
    """True where the tensors of a part are small enough for the heap; larger ones are given back at once."""
    settings, shape = case.settings, case.spec.shape
    width = shape.hidden * act.compute_bytes(settings)
    if name == "logits_and_loss":
        width = 4 * (min(shape.vocab, act.TILE_VOCABULARY) if act.in_tiles(settings) else shape.vocab)
    return bool(act.tokens(settings) * width < facts["heap_bytes"])


def _kernels(settings: MemorySettings, facts: dict[str, Any]) -> Part:
    """Kernels that the CPU library keeps in 16 bits: for each row length but the first, which counts as
    context, and for those of an evaluation, which runs in the weights' own type and pads to no multiple."""
    if settings.precision != "bf16" or "kernel_bytes" not in facts:
        return Part(name="kernels", bytes=0, formula="none are kept", source=facts["source"])
    lengths = min(-(-settings.seq_len // facts["kernel_step_tokens"]), facts["kernel_lengths"]) - 1
    size, formula = (
        lengths * facts["kernel_bytes"],
        f"{lengths} more row lengths, each with kernels of its own",
    )
    if settings.weight_bits < 32 and not outputs(settings):
        size, formula = size + facts["evaluation_kernel_bytes"], f"{formula}, and those of evaluations"
    return Part(name="kernels", bytes=size, formula=formula, source=facts["source"])


def _bitsandbytes(case: Case) -> bool:
    return case.settings.weight_bits < 16 or "8bit" in case.settings.optimizer


def _class(settings: MemorySettings) -> str:
    """The class by which errors and fragmentation are kept."""
    if act.trains_everything(settings):
        return "full"
    return "quantised" if settings.weight_bits < 16 else "adapters"


def _width(case: Case) -> tuple[float, float]:
    """Factors of the band: measured error of the class, wider for each unknown."""
    bands, settings = case.rules["error"], case.settings
    names = [_class(settings)]
    if settings.stated is not None:
        names.append("stated_tuner")
    if not case.plan.exact:
        names.append("unknown_layout")
    if settings.unknown or not states.optimizer_facts(settings, case.rules)[1]:
        names.append("unknown_setting")
    if settings.gpus > 1:
        names.append("several_devices")
    if settings.device != "cuda":
        names.append(f"device_{settings.device}")
    low = high = 1.0
    for name in names:
        low, high = low * bands[name]["low"], high * bands[name]["high"]
    return low, high


def _notes(case: Case) -> tuple[str, ...]:
    settings, tuner = case.settings, tuner_name(case.settings.tuner)
    notes = [*settings.unknown, *([case.plan.note] if case.plan.note else [])]
    if case.plan.experts and settings.weight_bits < 16:
        notes.append("the experts stay in 16 bits: only single layers are quantised, and they are one tensor")
    if settings.stated is not None and act.mixed(settings):
        notes.append(
            f"what {tuner} keeps was read off a loop without autocast; under it the casts are not known"
        )
    if tuner in VIRTUAL and not settings.virtual_tokens:
        notes.append("the number of virtual tokens was not given and counts as none")
    if tuner == "adapter" and not settings.bottleneck:
        notes.append("the width of the adapters was not given and counts as none")
    if tuner in LOW_RANK and not targeted(case.plan.linears, settings.target):
        notes.append(f"no layer of this model is called {settings.target!r}; the adapters count as none")
    if not states.optimizer_facts(settings, case.rules)[1]:
        notes.append(f"the optimizer {settings.optimizer!r} is not known and counts as AdamW")
    if settings.objective == "reward" and case.spec.shape.vocab and tuner == "full":
        notes.append("the output matrix is replaced by a score of one value a sequence")
    return tuple(notes)
