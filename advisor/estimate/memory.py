"""How much memory does one training process need at its peak, on its fullest device?

Goes in: a ModelSpec, MemorySettings and the rules of kb/rules/memory.toml. Comes out: a MemoryEstimate,
the largest of all phases, in parts that each carry their formula and source. Never does: load a model, look
at the machine, guess in silence: what is unknown is named in `notes` and widens the band.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from msgspec import structs

from advisor.estimate import activations as act
from advisor.estimate import adapted, states
from advisor.estimate.layers import Layout, layout, targeted
from advisor.estimate.tunable import LOW_RANK, VIRTUAL, count, outputs, trainable_parameters, tuner_name
from advisor.types import Band, MemoryEstimate, MemorySettings, ModelSpec, Part, Record, TracedPeaks

__all__ = ["estimate_memory", "traced_estimate", "trainable_parameters"]


class _Case(Record, frozen=True, kw_only=True):
    """One question, with what every phase needs."""

    spec: ModelSpec
    plan: Layout
    settings: MemorySettings
    rules: dict[str, Any]
    trainable: int

    def part(self, name: str, size: float, formula: str) -> Part:
        """A part that comes from the operators of the model library."""
        return Part(name=name, bytes=round(size), formula=formula, source=self.rules["activations"]["source"])


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
    case = _case(spec, settings, rules)
    phases = _phases(case)
    phase = max(phases, key=lambda name: _sum(phases[name]))
    return _estimate(case, phase.partition(":")[0], phases[phase], engine="closed_form")


def _case(spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any]) -> _Case:
    plan = layout(spec)
    if outputs(settings):  # a head of a few scores takes the place of the output matrix
        plan = structs.replace(plan, head=0)
    return _Case(
        spec=spec, plan=plan, settings=settings, rules=dict(rules), trainable=count(spec, plan, settings)
    )


def _estimate(
    case: _Case, phase: str, parts: list[Part], *, engine: Literal["closed_form", "trace"]
) -> MemoryEstimate:
    """Add what the device takes, and the band."""
    allocated = _sum(parts)
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
    case = _case(spec, settings, rules)
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


def _sum(parts: Iterable[Part]) -> int:
    return sum(part.bytes for part in parts)


def _band(value: int, low: float, high: float, fixed: int) -> Band:
    """Scale what depends on the model; what the device takes by itself keeps its size."""
    moving = value - fixed
    return Band(
        low=round(moving * low) + fixed,
        expected=value,
        high=round(moving * high) + fixed,
    )


def _phases(case: _Case) -> dict[str, list[Part]]:
    """Parts alive in each phase; `phase:moment` where a phase has several candidates for its peak."""
    steady = states.steady(case.plan, case.settings, case.rules, case.trainable)
    gradients = states.gradients(case.settings, case.rules, case.trainable)
    held = [*steady, *([gradients] if case.settings.accumulate else [])]
    kept = _kept(case)
    phases = {
        "load": _load(case),
        "forward": [*held, kept, _final(case), *_weight_copies(case), _loss(case, backward=False)],
        "backward:loss": [*held, kept, _final(case), _loss(case, backward=True), *_tiled_gradient(case)],
        "backward:head": [*held, kept, _final(case), *_head(case)],
        "backward:block": [*held, kept, *_block(case), *_pending(case, ends=False)],
        "backward:first": [*steady, _gradients_at_first(case, gradients), *_block(case), *_waiting(case)],
        "backward:end": [*steady, gradients, *_pending(case, ends=True)],
        "optimizer": [*steady, gradients, states.step_copies(case.settings, case.rules, case.trainable)],
        "evaluation": [*steady, _final(case), _loss(case, backward=False)],
        **_adapted(case, held, kept),
    }
    if case.settings.objective in ("rloo", "grpo"):
        phases["generation"] = [*steady, _generation(case)]
    return phases


def _kept(case: _Case) -> Part:
    """What all blocks keep until their backward."""
    tokens, blocks, settings = act.tokens(case.settings), case.plan.blocks, case.settings
    if not settings.gradient_checkpointing:
        each = act.saved_per_token(case.spec, case.plan, settings)
        casts = act.saved_casts(case.plan, settings, case.trainable)
        missing = act.missing_per_token(case.spec, case.plan, settings)
        formula = f"{blocks} blocks x ({tokens:,} tokens x {each:,} B + {casts:,} B of copied weights)"
        formula += f", less {missing:,} B a token in the first one" if missing else ""
        return case.part("activations", blocks * (tokens * each + casts) - tokens * missing, formula)
    each = act.stream_bytes(settings) * case.spec.shape.hidden
    inputs = -(-blocks // settings.checkpoint_every)
    if settings.offload_activations:  # one on its way out or in, and the one that is worked on
        inputs = min(inputs, 2)
    formula = f"{inputs} block inputs x {tokens:,} tokens x {each:,} B"
    return case.part("activations", inputs * tokens * each, formula)


def _final(case: _Case) -> Part:
    each, tokens = act.final_per_token(case.spec, case.settings), act.tokens(case.settings)
    return case.part("final_norm", each * tokens, f"{tokens:,} tokens x {each:,} B")


def _weight_copies(case: _Case) -> list[Part]:
    """Autocast remembers 16-bit copies of trained 32-bit weights until the forward pass ends."""
    settings, plan = case.settings, case.plan
    if not (act.mixed(settings) and settings.gradient_checkpointing):
        return []
    if act.trains_everything(settings):
        copied = plan.blocks * plan.block_weights if settings.weight_bits == 32 else 0
    elif tuner_name(settings.tuner) == "osf":
        copied = 0
    else:
        copied = case.trainable if act.adapter_bytes(settings) == 4 else 0
    return [case.part("weight_copies", 2 * copied, f"{copied:,} x 2 B under autocast")]


def _recomputed(case: _Case) -> Part:
    """One block (or as many as one checkpoint spans), computed again for its backward."""
    settings, plan, tokens = case.settings, case.plan, act.tokens(case.settings)
    blocks = min(settings.checkpoint_every, plan.blocks)
    each = act.saved_per_token(case.spec, plan, settings)
    if act.stream_bytes(settings) == 4:
        each -= 4 * case.spec.shape.hidden
    casts = act.saved_casts(plan, settings, case.trainable)
    formula = f"{blocks} blocks x ({tokens:,} tokens x {each:,} B + {casts:,} B of copied weights)"
    return case.part("recomputed", blocks * (tokens * each + casts), formula)


def _adapted(case: _Case, held: list[Part], kept: Part) -> dict[str, list[Part]]:
    """The moments at which a layer with a low-rank adapter runs, forward and (DoRA) backward."""
    settings, tokens, tuner = case.settings, act.tokens(case.settings), tuner_name(case.settings.tuner)
    if tuner not in LOW_RANK:
        return {}
    again = settings.gradient_checkpointing
    saved = _recomputed(case) if again else kept
    before = [*held, kept] if again else held
    stream = act.stream_bytes(settings) * case.spec.shape.hidden
    phases = {}
    for linear in targeted(case.plan.linears, settings.target):
        after = tokens * act.kept_after(case.spec, case.plan, settings, linear)
        part = case.part(saved.name, max(0, saved.bytes - after), f"{saved.formula}, up to {linear.name}")
        moments = adapted.forward(linear, act.widths(settings), dora=tuner == "dora")
        for number, moment in enumerate(moments):
            each = moment.per_token + (3 if again else 4) * stream
            formula = f"{linear.name}: {tokens:,} tokens x {each:,} B + {moment.fixed:,} B"
            running = case.part("adapted_product", tokens * each + moment.fixed, formula)
            phases[f"{'backward' if again else 'forward'}:{linear.name}:{number}"] = [*before, part, running]
        if tuner == "dora":
            each = adapted.backward(linear, act.widths(settings)).per_token + stream
            formula = f"{linear.name}: {tokens:,} tokens x {each:,} B"
            running = case.part("activation_gradients", tokens * each, formula)
            phases[f"backward:{linear.name}:gradient"] = [*before, part, running]
    return phases


def _block(case: _Case) -> list[Part]:
    """One block (or as many as one checkpoint spans) recomputed, and the gradients passing through it."""
    settings, plan, tokens = case.settings, case.plan, act.tokens(case.settings)
    parts = [_recomputed(case)] if settings.gradient_checkpointing else []
    extra = act.backward_extra_per_token(case.spec, plan, settings)
    parts.append(case.part("activation_gradients", extra * tokens, f"{tokens:,} tokens x {extra:,} B"))
    largest = max(one.weights for one in plan.linears)
    if settings.weight_bits in (4, 8):
        later = act.after_dequantising_per_token(case.spec, plan, settings) * tokens
        formula = f"the largest matrix: {largest:,} x 2 B, less {later:,} B that come after it"
        parts.append(case.part("dequantised", max(0, 2 * largest - later), formula))
    if act.trains_everything(settings):
        parts.append(_passing_gradient(case, largest))
    return parts


def _passing_gradient(case: _Case, largest: int) -> Part:
    """The newest gradient; a sharded block's are complete, and copied, before devices sum and share them."""
    settings, size = case.settings, states.stored_bytes(case.settings)
    if states.shards(settings) > 1:
        entries = 2 * case.plan.block_weights
        return case.part(
            "weight_gradient", size * entries, f"of one block, and a copy: {entries:,} x {size} B"
        )
    return case.part("weight_gradient", size * largest, f"of the largest matrix: {largest:,} x {size} B")


def _vocabulary(case: _Case) -> int:
    """Entries of the output matrix; none when a reward or classifier head replaces it."""
    return 0 if outputs(case.settings) else case.plan.head or case.plan.embedding


def _tiled_gradient(case: _Case) -> list[Part]:
    """A loss in tiles sums the gradient of the output matrix in 32 bits on its way, then casts it."""
    settings, entries = case.settings, _vocabulary(case)
    if not (act.trains_everything(settings) and act.in_tiles(settings)):
        return []
    size = states.stored_bytes(settings)
    each = 4 + (size if size < 4 else 0)
    return [case.part("head_gradient", each * entries, f"{entries:,} x {each} B")]


def _head(case: _Case) -> list[Part]:
    """The product with the output matrix, backward, when all logits are held."""
    settings, entries = case.settings, _vocabulary(case)
    size = act.head_bytes(case.spec, settings)
    if not (act.trains_everything(settings) and size):
        return []
    each = act.compute_bytes(settings)
    return [
        case.part("logits_and_loss", size, "logits that are held, and their gradient"),
        case.part("head_gradient", each * entries, f"{entries:,} x {each} B"),
    ]


def _gradients_at_first(case: _Case, gradients: Part) -> Part:
    """Gradients that exist when the backward pass reaches the first block, without earlier micro batches."""
    if case.settings.accumulate or not act.trains_everything(case.settings):
        return gradients
    missing = case.plan.block_weights + case.plan.embedding + case.plan.positions
    held = max(0, gradients.bytes - missing * states.stored_bytes(case.settings))
    return Part(name="gradients", bytes=held, formula="of the later blocks", source=gradients.source)


def _two_gradients(case: _Case) -> bool:
    """True when the embedding is the output matrix too, so that its gradient comes in two parts."""
    return case.plan.head == 0 and case.settings.objective != "reward"


def _pending(case: _Case, *, ends: bool) -> list[Part]:
    """Gradients of embedding and output matrix on their way: a tied matrix waits for its second one."""
    if not act.trains_everything(case.settings):
        return []
    size, settings = states.stored_bytes(case.settings), case.settings
    tied, entries = _two_gradients(case), case.plan.embedding
    if ends:
        matrices = (1 if settings.accumulate else 0) + (1 if tied else 0)
    else:
        matrices = 1 if tied or not settings.accumulate else 0
    formula = f"{matrices} x {entries:,} x {size} B"
    return [case.part("vocabulary_gradient", size * matrices * entries, formula)]


def _waiting(case: _Case) -> list[Part]:
    """At the first block, the gradient of a tied matrix still waits for its second half."""
    if not act.trains_everything(case.settings) or not _two_gradients(case):
        return []
    entries, size = case.plan.embedding, states.stored_bytes(case.settings)
    return [case.part("vocabulary_gradient", size * entries, f"{entries:,} x {size} B")]


def _loss(case: _Case, *, backward: bool) -> Part:
    vocabulary, tokens = case.spec.shape.vocab, act.tokens(case.settings)
    size = act.loss_bytes(case.spec, case.settings, backward=backward)
    return case.part(
        "logits_and_loss", size, f"{case.settings.loss}: {tokens:,} tokens, vocabulary of {vocabulary:,}"
    )


def _load(case: _Case) -> list[Part]:
    plan, settings = case.plan, case.settings
    on_host = settings.offload and settings.shard != "none"
    weights = 0 if on_host else states.weight_total(plan, settings, case.rules) // states.shards(settings)
    largest = max(one.weights for one in plan.linears) if settings.weight_bits < 16 else 0
    return [
        Part(name="weights", bytes=weights, formula="base weights", source=case.rules["quantised"]["source"]),
        case.part("unquantised", 2 * largest, f"the largest matrix before its conversion: {largest:,} x 2 B"),
    ]


def _generation(case: _Case) -> Part:
    shape, settings = case.spec.shape, case.settings
    sequences = max(settings.micro_batch, settings.generations)
    length = settings.seq_len + settings.completion_tokens
    each = 2 * shape.layers * shape.kv_heads * shape.head_dim * act.compute_bytes(settings)
    formula = f"{sequences} sequences x ({length:,} tokens x {each:,} B + logits of {shape.vocab:,})"
    return case.part("kv_cache", sequences * (length * each + 8 * shape.vocab), formula)


def _device(case: _Case, allocated: int) -> tuple[Part, Part, Part]:
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


def _bitsandbytes(case: _Case) -> bool:
    return case.settings.weight_bits < 16 or "8bit" in case.settings.optimizer


def _class(settings: MemorySettings) -> str:
    """The class by which errors and fragmentation are kept."""
    if act.trains_everything(settings):
        return "full"
    return "quantised" if settings.weight_bits < 16 else "adapters"


def _width(case: _Case) -> tuple[float, float]:
    """Factors of the band: measured error of the class, wider for each unknown."""
    bands, settings = case.rules["error"], case.settings
    names = [_class(settings)]
    if settings.stated is not None:
        names.append("stated_tuner")
    if not case.plan.exact:
        names.append("unknown_layout")
    if settings.gpus > 1:
        names.append("several_devices")
    if settings.device != "cuda":
        names.append(f"device_{settings.device}")
    low = high = 1.0
    for name in names:
        low, high = low * bands[name]["low"], high * bands[name]["high"]
    return low, high


def _notes(case: _Case) -> tuple[str, ...]:
    settings, tuner = case.settings, tuner_name(case.settings.tuner)
    notes = [case.plan.note] if case.plan.note else []
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
