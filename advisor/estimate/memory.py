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
from advisor.estimate.tunable import LOW_RANK, VIRTUAL, trainable_parameters, tuner_name
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
    phases = phases_of(case)
    phase = max(phases, key=lambda name: held_bytes(phases[name]))
    return _estimate(case, phase.partition(":")[0], phases[phase], engine="closed_form")


def _estimate(
    case: Case, phase: str, parts: list[Part], *, engine: Literal["closed_form", "trace"]
) -> MemoryEstimate:
    """Add what the device takes, and the band."""
    allocated = held_bytes(parts)
    allocator, context, kernels = _device(case, allocated)
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
    found = _estimate(case, phase, parts, engine="trace")
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


def _device(case: Case, allocated: int) -> tuple[Part, Part, Part]:
    facts = case.rules["device"][case.settings.device]
    share = facts[f"fragmentation_{_class(case.settings)}"]
    return (
        Part(
            name="allocator",
            bytes=round(allocated * share),
            formula=f"{share:.1%} of what is allocated",
            source=facts["source"],
        ),
        Part(
            name="context",
            bytes=facts["context_bytes"] + (facts.get("bitsandbytes_bytes", 0) if _bitsandbytes(case) else 0),
            formula="what the process holds before the model",
            source=facts["source"],
        ),
        _kernels(case.settings, facts),
    )


def _kernels(settings: MemorySettings, facts: dict[str, Any]) -> Part:
    """Kernels that the CPU library keeps for each row length but the first, which counts as context."""
    lengths = 0
    if settings.precision == "bf16" and "kernel_bytes" in facts:
        lengths = min(-(-settings.seq_len // facts["kernel_step_tokens"]), facts["kernel_lengths"]) - 1
    return Part(
        name="kernels",
        bytes=lengths * facts.get("kernel_bytes", 0),
        formula=f"{lengths} more row lengths, each with kernels of its own",
        source=facts["source"],
    )


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
