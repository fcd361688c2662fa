"""Which parts of memory are alive in each phase of a training step?

Goes in: a Case. Comes out: the parts of every phase; `phase:moment` where a phase has several candidates for
its peak. Never does: choose one; count what the device takes beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import structs

from advisor.estimate import activations as act
from advisor.estimate import adapted, states
from advisor.estimate.layers import Layout, layout, targeted
from advisor.estimate.tunable import LOW_RANK, count, outputs, tuner_name
from advisor.types import MemorySettings, ModelSpec, Part, Record


class Case(Record, frozen=True, kw_only=True):
    """One question, with what every phase needs."""

    spec: ModelSpec
    plan: Layout
    settings: MemorySettings
    rules: dict[str, Any]
    trainable: int

    def part(self, name: str, size: float, formula: str) -> Part:
        """A part that comes from the operators of the model library."""
        return Part(name=name, bytes=round(size), formula=formula, source=self.rules["activations"]["source"])


def case_of(spec: ModelSpec, settings: MemorySettings, rules: Mapping[str, Any]) -> Case:
    """Lay out the model and count what is trained."""
    plan = layout(spec)
    if outputs(settings):  # a head of a few scores takes the place of the output matrix
        plan = structs.replace(plan, head=0)
    return Case(
        spec=spec, plan=plan, settings=settings, rules=dict(rules), trainable=count(spec, plan, settings)
    )


def held_bytes(parts: Iterable[Part]) -> int:
    """Bytes of all parts together."""
    return sum(part.bytes for part in parts)


def phases_of(case: Case) -> dict[str, list[Part]]:
    """Return the parts alive in each phase, and in each moment of it that can be the fullest."""
    steady = states.steady(case.plan, case.settings, case.rules, case.trainable)
    gradients = states.gradients(case.settings, case.rules, case.trainable)
    held = [*steady, *([gradients] if case.settings.accumulate else [])]
    kept = _kept(case)
    phases = {
        "load": _load(case),
        "forward": [
            *held, kept, _final(case), *_weight_copies(case), *_head_copy(case), _loss(case, backward=False),
        ],
        "backward:loss": [
            *held, kept, _final(case), *_head_copy(case), _loss(case, backward=True), *_tiled_gradient(case),
        ],
        "backward:norm": [*held, kept, _norm_gradients(case)],
        "backward:head": [*held, kept, _final(case), *_head(case)],
        "backward:block": [*held, kept, *_block(case), *_pending(case, ends=False)],
        "backward:first": [*steady, _gradients_at_first(case, gradients), *_block(case), *_waiting(case)],
        "backward:end": [*steady, gradients, *_pending(case, ends=True)],
        "optimizer": [*steady, gradients, states.step_copies(case.settings, case.rules, case.trainable)],
        "evaluation": [*steady, _final(case), _loss(case, backward=False)],
        **_adapted(case, held, kept),
        **_dequantised(case, held, kept),
    }  # fmt: skip
    if case.settings.objective in ("rloo", "grpo"):
        phases["generation"] = [*steady, _generation(case)]
    return phases


def _kept(case: Case) -> Part:
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
    beside = act.embedded_beside(case.spec, settings)
    if settings.offload_activations:  # one on its way out or in, and the one that is worked on
        inputs = min(inputs, 2)
    formula = f"{inputs} block inputs x {tokens:,} tokens x {each:,} B"
    formula += f" + {beside:,} B of embeddings beside virtual tokens" if beside else ""
    return case.part("activations", inputs * tokens * each + beside, formula)


def _final(case: Case) -> Part:
    each, tokens = act.final_per_token(case.spec, case.settings), act.tokens(case.settings)
    return case.part("final_norm", each * tokens, f"{tokens:,} tokens x {each:,} B")


def _norm_gradients(case: Case) -> Part:
    """The final norm's backward: its widened input, and five tensors as wide on the way to the gradient."""
    tensors = 2 if case.spec.model_type == "gpt2" else 6  # GPT-2's norm is one kernel
    each, tokens = 4 * tensors * case.spec.shape.hidden, act.tokens(case.settings)
    return case.part("final_norm", each * tokens, f"{tokens:,} tokens x {each:,} B")


def _weight_copies(case: Case) -> list[Part]:
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


def _head_copy(case: Case) -> list[Part]:
    """The 16-bit copy of a frozen 32-bit output matrix, which its backward product reads."""
    settings, entries = case.settings, _vocabulary(case)
    if not act.mixed(settings) or settings.weight_bits != 32 or act.trains_everything(settings):
        return []
    return [case.part("head_copy", 2 * entries, f"{entries:,} x 2 B under autocast")]


def _recomputed(case: Case) -> Part:
    """One block (or as many as one checkpoint spans), computed again for its backward."""
    settings, plan, tokens = case.settings, case.plan, act.tokens(case.settings)
    blocks = min(settings.checkpoint_every, plan.blocks)
    each = act.saved_per_token(case.spec, plan, settings)
    if act.stream_bytes(settings) == 4:
        each -= 4 * case.spec.shape.hidden
    casts = act.saved_casts(plan, settings, case.trainable)
    formula = f"{blocks} blocks x ({tokens:,} tokens x {each:,} B + {casts:,} B of copied weights)"
    return case.part("recomputed", blocks * (tokens * each + casts), formula)


def _adapted(case: Case, held: list[Part], kept: Part) -> dict[str, list[Part]]:
    """The moments at which a layer with a low-rank adapter runs, forward and (DoRA) backward."""
    settings, tokens, tuner = case.settings, act.tokens(case.settings), tuner_name(case.settings.tuner)
    if tuner not in LOW_RANK:
        return {}
    again = settings.gradient_checkpointing
    saved = _recomputed(case) if again else kept
    before = [*held, kept] if again else held
    stream = act.stream_bytes(settings) * case.spec.shape.hidden
    around = act.arriving_per_token(case.spec, case.plan, settings) + 2 * stream if again else 4 * stream
    phases = {}
    for linear in targeted(case.plan.linears, settings.target):
        after = tokens * act.kept_after(case.spec, case.plan, settings, linear)
        part = case.part(saved.name, max(0, saved.bytes - after), f"{saved.formula}, up to {linear.name}")
        last = again and act.ends_block(case.spec, linear)
        moments = adapted.forward(linear, act.widths(settings), dora=tuner == "dora", last=last)
        for number, moment in enumerate(moments):
            each = moment.per_token + around
            formula = f"{linear.name}: {tokens:,} tokens x {each:,} B + {moment.fixed:,} B"
            running = case.part("adapted_product", tokens * each + moment.fixed, formula)
            phases[f"{'backward' if again else 'forward'}:{linear.name}:{number}"] = [*before, part, running]
        if tuner == "dora":
            each = adapted.backward(linear, act.widths(settings)).per_token + stream
            formula = f"{linear.name}: {tokens:,} tokens x {each:,} B"
            running = case.part("activation_gradients", tokens * each, formula)
            phases[f"backward:{linear.name}:gradient"] = [*before, part, running]
    return phases


def _block(case: Case) -> list[Part]:
    """One block (or as many as one checkpoint spans) recomputed, and the gradients passing through it."""
    settings, plan, tokens = case.settings, case.plan, act.tokens(case.settings)
    parts = [_recomputed(case)] if settings.gradient_checkpointing else []
    extra = act.backward_extra_per_token(case.spec, plan, settings)
    parts.append(case.part("activation_gradients", extra * tokens, f"{tokens:,} tokens x {extra:,} B"))
    if settings.weight_bits in (4, 8):
        weights = next(one.weights for one in plan.linears if one.name in act.OUT_OF_MLP)
        later = act.after_dequantising_per_token(case.spec, plan, settings) * tokens
        formula = f"the matrix out of the MLP: {weights:,} x 2 B, less {later:,} B that come after it"
        parts.append(case.part("dequantised", max(0, 2 * weights - later), formula))
    if act.trains_everything(settings):
        parts.append(_passing_gradient(case, max(one.weights for one in plan.linears)))
    return parts


def _dequantised(case: Case, held: list[Part], kept: Part) -> dict[str, list[Part]]:
    """The backward product with the largest quantised matrix, between the gradients of its two sides."""
    settings, plan, tokens = case.settings, case.plan, act.tokens(case.settings)
    if settings.weight_bits not in (4, 8):
        return {}
    largest = max(plan.linears, key=lambda one: one.weights)
    again = settings.gradient_checkpointing
    saved = _recomputed(case) if again else kept
    after = tokens * act.kept_after(case.spec, plan, settings, largest)
    each = act.stream_bytes(settings) * case.spec.shape.hidden
    each += act.compute_bytes(settings) * (largest.inputs + largest.outputs)
    return {
        "backward:dequantised": [
            *held, *([kept] if again else []),
            case.part(saved.name, max(0, saved.bytes - after), f"{saved.formula}, up to {largest.name}"),
            case.part("activation_gradients", each * tokens, f"{tokens:,} tokens x {each:,} B"),
            case.part("dequantised", 2 * largest.weights, f"{largest.name}: {largest.weights:,} x 2 B"),
        ]
    }  # fmt: skip


def _passing_gradient(case: Case, largest: int) -> Part:
    """The newest gradient; a sharded block's are complete, and copied, before devices sum and share them."""
    settings, size = case.settings, states.stored_bytes(case.settings)
    if states.shards(settings) > 1:
        entries = 2 * case.plan.block_weights
        return case.part(
            "weight_gradient", size * entries, f"of one block, and a copy: {entries:,} x {size} B"
        )
    return case.part("weight_gradient", size * largest, f"of the largest matrix: {largest:,} x {size} B")


def _vocabulary(case: Case) -> int:
    """Entries of the output matrix; none when a reward or classifier head replaces it."""
    return 0 if outputs(case.settings) else case.plan.head or case.plan.embedding


def _tiled_gradient(case: Case) -> list[Part]:
    """A loss in tiles sums the gradient of the output matrix in 32 bits on its way, then casts it."""
    settings, entries = case.settings, _vocabulary(case)
    if not (act.trains_everything(settings) and act.in_tiles(settings)):
        return []
    size = states.stored_bytes(settings)
    each = 4 + (size if size < 4 else 0)
    return [case.part("head_gradient", each * entries, f"{entries:,} x {each} B")]


def _head(case: Case) -> list[Part]:
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


def _gradients_at_first(case: Case, gradients: Part) -> Part:
    """Gradients that exist when the backward pass reaches the first block, without earlier micro batches."""
    if case.settings.accumulate or not act.trains_everything(case.settings):
        return gradients
    missing = case.plan.block_weights + case.plan.embedding + case.plan.positions
    held = max(0, gradients.bytes - missing * states.stored_bytes(case.settings))
    return Part(name="gradients", bytes=held, formula="of the later blocks", source=gradients.source)


def _two_gradients(case: Case) -> bool:
    """True when the embedding is the output matrix too, so that its gradient comes in two parts."""
    return case.plan.head == 0 and case.settings.objective != "reward"


def _pending(case: Case, *, ends: bool) -> list[Part]:
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


def _waiting(case: Case) -> list[Part]:
    """At the first block, the gradient of a tied matrix still waits for its second half."""
    if not act.trains_everything(case.settings) or not _two_gradients(case):
        return []
    entries, size = case.plan.embedding, states.stored_bytes(case.settings)
    return [case.part("vocabulary_gradient", size * entries, f"{entries:,} x {size} B")]


def _loss(case: Case, *, backward: bool) -> Part:
    vocabulary, tokens = case.spec.shape.vocab, act.tokens(case.settings)
    size = act.loss_bytes(case.spec, case.settings, backward=backward)
    return case.part(
        "logits_and_loss", size, f"{case.settings.loss}: {tokens:,} tokens, vocabulary of {vocabulary:,}"
    )


def _load(case: Case) -> list[Part]:
    plan, settings = case.plan, case.settings
    on_host = settings.offload and settings.shard != "none"
    weights = 0 if on_host else states.weight_total(plan, settings, case.rules) // states.shards(settings)
    largest = max(one.weights for one in plan.linears) if settings.weight_bits < 16 else 0
    return [
        Part(name="weights", bytes=weights, formula="base weights", source=case.rules["quantised"]["source"]),
        case.part("unquantised", 2 * largest, f"the largest matrix before its conversion: {largest:,} x 2 B"),
    ]


def _generation(case: Case) -> Part:
    shape, settings = case.spec.shape, case.settings
    sequences = max(settings.micro_batch, settings.generations)
    length = settings.seq_len + settings.completion_tokens
    each = 2 * shape.layers * shape.kv_heads * shape.head_dim * act.compute_bytes(settings)
    formula = f"{sequences} sequences x ({length:,} tokens x {each:,} B + logits of {shape.vocab:,})"
    return case.part("kv_cache", sequences * (length * each + 8 * shape.vocab), formula)
