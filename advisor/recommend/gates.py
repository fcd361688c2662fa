"""Which combinations of model and tuner are ruled out, and by what?

Goes in: a Situation, a model, a tuner and a chain. Comes out: Objection or None, one small function a rule.
Never does: weigh what is allowed; look at memory (see fit.py).
"""

from __future__ import annotations

from advisor.estimate.memory import trainable_parameters
from advisor.knowledge import Knowledge
from advisor.recommend.deploy import choose_file
from advisor.recommend.lengths import lengths_of
from advisor.recommend.situation import Situation, rows_of, rule
from advisor.scenario import base_twin
from advisor.types import MemorySettings, ModelSpec, Objective, Record, TunerFacts
from advisor.units import format_bytes, format_count

MAIN_TUNERS = ("full", "lora", "qlora")


class Objection(Record, frozen=True, kw_only=True):
    """Why a candidate is ruled out."""

    code: str
    reason: str
    source: str
    hard: bool = True
    """False: done anyway when the person insists (--force)."""
    needed_bytes: float = 0.0
    """Memory that it would take, where that is the reason."""


class Proposal(Record, frozen=True, kw_only=True):
    """A model, a tuner and a chain that are being weighed."""

    spec: ModelSpec
    tuner: str
    facts: TunerFacts
    chain: tuple[Objective, ...]


def objection_to_model(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    """The first rule that a model breaks, whatever the tuner."""
    for gate in (_licence, _fp16_model, _device_room, _context, _few_rows_for_base):
        if objection := gate(spec, situation, knowledge):
            return objection
    return None


def objection_to_tuner(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    """The first rule that a tuner breaks on this model."""
    for gate in (
        _platform, _bias, _head, _chain_fits, _export, _separate, _scale, _latency, _storage, _few_rows, _forgets,
    ):  # fmt: skip
        if objection := gate(proposal, situation, knowledge):
            return objection
    return None


# --- the model -----------------------------------------------------------------------------------


def _licence(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.wish("commercial") or spec.commercial is not False:
        return None
    note = f" ({spec.licence_note})" if spec.licence_note else ""
    reason = f"its licence {spec.licence or 'unknown'} does not allow commercial use{note}"
    return Objection(code="licence", reason=reason, source=spec_source(spec, knowledge), hard=False)


def spec_source(spec: ModelSpec, knowledge: Knowledge) -> str:
    """The source key of a model's facts; models read from their own files have none in kb."""
    return spec.source if spec.source in knowledge.sources else "judgement"


def _fp16_model(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if spec.fp16_safe or situation.machine.precision != "fp16" or spec is situation.spec:
        return None
    reason = f"{spec.family or spec.id} overflows in fp16, and {situation.machine.name} has no bf16"
    return Objection(code="fp16_overflow_model", reason=reason, source=spec_source(spec, knowledge))


def _device_room(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if situation.goal.device_bytes is None:
        return None
    choice = choose_file(spec, situation, knowledge)
    if choice.fits or choice.room_bytes is None:
        return None
    reason = (
        f"even as {choice.quant} it takes {format_bytes(choice.running_bytes)} while running, and the device leaves "
        f"{format_bytes(choice.room_bytes)} of {format_bytes(situation.goal.device_bytes)} to it"
    )
    return Objection(code="does_not_fit", reason=reason, source="llama-cpp-quantize", hard=False)


def _context(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    wanted = situation.scenario.goal.context_tokens or 0
    rows = lengths_of(situation.train, rule(knowledge, "data", "lengths")).least if situation.train else 0
    needed = max(wanted, rows if situation.spec is None else 0)
    if needed <= spec.context_tokens:
        return None
    reason = f"its context of {spec.context_tokens:,} tokens is shorter than the {needed:,} needed"
    return Objection(code="context", reason=reason, source=spec_source(spec, knowledge), hard=False)


def _few_rows_for_base(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    limits = rule(knowledge, "data", "rows")
    rows = rows_of(situation.demos)
    twin = any(facts.instruct and base_twin(key, spec.id) for key, facts in knowledge.models.items())
    if spec.instruct or not twin or situation.texts or situation.scenario.goal.model_state is not None:
        return None
    if not 0 < rows < limits["small_below"]:
        return None
    reason = f"{rows} rows cannot teach a base model to follow instructions; its instruct twin already does"
    return Objection(code="instruct_base_choice", reason=reason, source="unsloth-advice", hard=False)


# --- the tuner -----------------------------------------------------------------------------------


def _platform(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not proposal.facts.quantised_base or situation.machine.bitsandbytes:
        return None
    reason = f"4-bit training needs bitsandbytes, which does not run on {situation.machine.name}"
    return Objection(code="no_bitsandbytes", reason=reason, source="axolotl-guides")


def _bias(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    shape = proposal.spec.shape
    if not proposal.facts.needs_native_bias or shape.attention_bias or shape.mlp_bias:
        return None
    reason = f"{proposal.spec.id} has no bias terms in its linear layers, so there is nothing to train"
    return Objection(code="no_bias_terms", reason=reason, source=proposal.facts.source)


def _head(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.tuner != "classifier_head":
        return None
    kinds = {d.kind for d in situation.demos}
    if kinds != {"classification"} or proposal.chain != ("sft",):
        return Objection(
            code="needs_classes", reason="a classifier head needs rows with a class each",
            source=proposal.facts.source,
        )  # fmt: skip
    return None


def _chain_fits(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.tuner in MAIN_TUNERS or proposal.tuner == "classifier_head":
        return None
    other = [o for o in proposal.chain if o != "sft"]
    if not other:
        return None
    reason = f"no evidence that it holds up in {', '.join(other)}; LoRA and full fine-tuning do"
    return Objection(code="untested_chain", reason=reason, source="lora-without-regret", hard=False)


def _export(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.goal.wants_gguf or proposal.facts.gguf != "none":
        return None
    reason = f"the result must run as a GGUF file, and this cannot become one: {proposal.facts.gguf_note}"
    return Objection(code="export", reason=reason, source="export-lab", hard=False)


def _separate(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if situation.tenants < 2 or proposal.tuner not in ("full", "classifier_head"):
        return None
    reason = f"{situation.tenants} tenants would need as many whole models; adapters share one base"
    return Objection(code="separate_adapters", reason=reason, source="vllm-docs", hard=False)


def _scale(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.facts.gguf != "virtual_tokens":
        return None
    rules = rule(knowledge, "choice", "prompt_tuning")
    if proposal.spec.parameters >= rules["competitive_from"] or situation.force:
        return None
    reason = (
        f"virtual tokens rival other methods only from about {format_count(rules['competitive_from'])} parameters on; "
        f"this model has {format_count(proposal.spec.parameters)}"
    )
    return Objection(code="scale_effect", reason=reason, source=rules["source"], hard=False)


def _latency(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.wish("low_latency") or not proposal.facts.adds_latency:
        return None
    reason = "it lengthens every request and cannot be merged away, and low latency was asked for"
    return Objection(code="latency", reason=reason, source=proposal.facts.source, hard=False)


def task_bytes(spec: ModelSpec, tuner: str, facts: TunerFacts, rank: int) -> int:
    """Bytes that each task or tenant adds on disk, in 16 bits."""
    settings = MemorySettings(
        tuner=tuner, lora_r=rank, virtual_tokens=int(_number(facts, "virtual_tokens")),
        bottleneck=int(_number(facts, "bottleneck")),
    )  # fmt: skip
    return 2 * trainable_parameters(spec, settings)


def _number(facts: TunerFacts, name: str) -> float:
    value = facts.settings.get(name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _storage(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    limit = situation.scenario.goal.storage_per_task_kb
    if limit is None:
        return None
    smallest = rule(knowledge, "settings", "rank")["smallest"]
    size = task_bytes(proposal.spec, proposal.tuner, proposal.facts, smallest)
    if size <= limit * 1000:
        return None
    reason = f"each task would take {size / 1000:,.0f} kB, and {limit:,.0f} kB are allowed"
    return Objection(code="storage", reason=reason, source=proposal.facts.source, hard=False)


def _few_rows(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    rows = rows_of(situation.demos)
    limits = rule(knowledge, "data", "rows")
    if proposal.tuner != "full" or not rows or rows >= limits["small_below"] or proposal.chain != ("sft",):
        return None
    if proposal.spec.parameters < rule(knowledge, "choice", "tuner")["small_model_below"]:
        return None
    reason = f"{rows} rows cannot guide {format_count(proposal.spec.parameters)} free parameters: it would learn them by heart"
    return Objection(code="small_data_overfit", reason=reason, source=limits["source"], hard=False)


def _forgets(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.tuner != "full" or not (situation.wish("must_not_forget") or situation.earlier):
        return None
    if proposal.spec.parameters < rule(knowledge, "choice", "tuner")["small_model_below"]:
        return None
    reason = "it changes every weight and forgets more than an adapter does, and nothing may be forgotten"
    return Objection(code="forgetting", reason=reason, source="lora-learns-less", hard=False)
