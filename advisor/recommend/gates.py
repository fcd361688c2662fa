"""Which combinations of model and tuner are ruled out, and by what?

Goes in: a Situation, a model, a tuner and a chain. Comes out: Objection or None, one small function a rule.
Never does: weigh what is allowed; look at memory (see fit.py).
"""

from __future__ import annotations

from advisor.estimate.memory import trainable_parameters
from advisor.estimate.tunable import ALIASES, TUNERS
from advisor.knowledge import Knowledge
from advisor.recommend.deploy import choose_file
from advisor.recommend.lengths import lengths_of
from advisor.recommend.reasons import because
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
    hard: bool = False
    """True: not even done when the person insists (--force)."""
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
        _platform, _chain_fits, _bias, _layers, _nothing_to_keep, _head, _export, _separate, _scale, _latency,
        _storage, _few_rows, _forgets,
    ):  # fmt: skip
        if objection := gate(proposal, situation, knowledge):
            return objection
    return None


def object_to(
    knowledge: Knowledge, key: str, /, *, code: str = "", hard: bool = False, **figures: object
) -> Objection:
    """Build an objection from its sentence in kb/rules/reasons.toml; `code` defaults to the key."""
    why = because(knowledge, "objection", key, **figures)
    return Objection(code=code or key, reason=why.reason, source=why.source, hard=hard)


# --- the model -----------------------------------------------------------------------------------


def _licence(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.wish("commercial") or spec.commercial is not False:
        return None
    note = f" ({spec.licence_note})" if spec.licence_note else ""
    return object_to(knowledge, "licence", licence=spec.licence or "", note=note)


def _fp16_model(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if spec.fp16_safe or situation.machine.precision != "fp16" or spec is situation.spec:
        return None
    name, device = spec.family or spec.id, situation.machine.name
    return object_to(knowledge, "fp16_overflow_model", hard=True, family=name, device=device)


def _device_room(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    memory = situation.goal.device_bytes
    if memory is None:
        return None
    choice = choose_file(spec, situation, knowledge)
    if choice.fits or choice.room_bytes is None:
        return None
    return object_to(
        knowledge, "device_room", code="does_not_fit", quant=choice.quant,
        running=format_bytes(choice.running_bytes), room=format_bytes(choice.room_bytes),
        memory=format_bytes(memory),
    )  # fmt: skip


def _context(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    wanted = situation.scenario.goal.context_tokens or 0
    rows = lengths_of(situation.train, rule(knowledge, "data", "lengths")).least if situation.train else 0
    needed = max(wanted, rows if situation.spec is None else 0)
    if needed <= spec.context_tokens:
        return None
    return object_to(knowledge, "context", context=f"{spec.context_tokens:,}", needed=f"{needed:,}")


def _few_rows_for_base(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> Objection | None:
    rows = rows_of(situation.demos)
    if spec.instruct or situation.texts or situation.scenario.goal.model_state is not None:
        return None
    if not 0 < rows < rule(knowledge, "data", "rows")["small_below"]:
        return None
    if not any(facts.instruct and base_twin(key, spec.id) for key, facts in knowledge.models.items()):
        return None
    return object_to(knowledge, "instruct_base_choice", rows=rows)


# --- the tuner -----------------------------------------------------------------------------------


def _platform(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not proposal.facts.quantised_base or situation.machine.bitsandbytes:
        return None
    return object_to(knowledge, "no_bitsandbytes", hard=True, device=situation.machine.name)


def _bias(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    shape = proposal.spec.shape
    if not proposal.facts.needs_native_bias or shape.attention_bias or shape.mlp_bias:
        return None
    hard = proposal.spec.model_type not in proposal.facts.adds_bias_to
    return object_to(knowledge, "no_bias_terms", hard=hard, model=proposal.spec.id)


def _layers(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.spec.model_type not in proposal.facts.not_on:
        return None
    title, model = proposal.facts.title, proposal.spec.id
    return object_to(knowledge, "layers_unknown", hard=True, title=title, model=model)


def _nothing_to_keep(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    keeps = situation.wish("must_not_forget") or situation.earlier
    return None if proposal.tuner != "osf" or keeps else object_to(knowledge, "nothing_to_keep")


def _head(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    kinds = {d.kind for d in situation.demos}
    fits = kinds == {"classification"} and proposal.chain == ("sft",)
    if proposal.tuner != "classifier_head" or fits:
        return None
    return object_to(knowledge, "needs_classes", hard=True)


def _chain_fits(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    programs = {o: knowledge.programs.get(program_of(o, proposal.facts, knowledge)) for o in proposal.chain}
    other = [o for o, program in programs.items() if program and proposal.tuner not in program.tuners]
    if not other or not proposal.facts.elsewhere:
        return None
    why, objectives = proposal.facts.elsewhere, ", ".join(other)
    return object_to(knowledge, "untested_chain", hard=True, objectives=objectives, why=why)


def program_of(objective: Objective, facts: TunerFacts, knowledge: Knowledge) -> str:
    """The folder under recipes/ that trains a stage: the tuner's own program, else the objective's."""
    return facts.program or knowledge.objectives[objective].program


def _export(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.goal.wants_gguf or proposal.facts.gguf not in ("none", "sequence_state"):
        return None
    return object_to(knowledge, "export", note=proposal.facts.gguf_note)


def _separate(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if situation.tenants < 2 or proposal.tuner not in ("full", "classifier_head"):
        return None
    return object_to(knowledge, "separate_adapters", tenants=situation.tenants)


def _scale(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    limit = rule(knowledge, "choice", "prompt_tuning")["competitive_from"]
    if proposal.facts.gguf != "virtual_tokens" or proposal.spec.parameters >= limit:
        return None
    size = format_count(proposal.spec.parameters)
    return object_to(knowledge, "scale_effect", limit=format_count(limit), size=size)


def _latency(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if not situation.wish("low_latency") or not proposal.facts.adds_latency:
        return None
    return object_to(knowledge, "latency")


def estimated_as(tuner: str, facts: TunerFacts) -> str:
    """The tuner that the estimator counts: itself, or for one of which it is told nothing its group."""
    return tuner if facts.memory or tuner in TUNERS or tuner in ALIASES else facts.group


def unknown_of(tuner: str, facts: TunerFacts) -> tuple[str, ...]:
    """In words, that a tuner counts as its group, where it does."""
    counted = estimated_as(tuner, facts)
    if counted == tuner:
        return ()
    return (
        f"the memory of {tuner} is not known: counted as {counted}; a [memory] table in its file says it",
    )


def task_bytes(spec: ModelSpec, tuner: str, facts: TunerFacts, rank: int) -> int:
    """Bytes that each task or tenant adds on disk, in 16 bits."""
    settings = MemorySettings(
        tuner=estimated_as(tuner, facts), stated=facts.memory, lora_r=rank,
        virtual_tokens=int(_number(facts, "virtual_tokens")), bottleneck=int(_number(facts, "bottleneck")),
    )  # fmt: skip
    return 2 * trainable_parameters(spec, settings)


def _number(facts: TunerFacts, name: str) -> float:
    value = facts.settings.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _storage(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    limit = situation.scenario.goal.storage_per_task_kb
    if limit is None:
        return None
    smallest = rule(knowledge, "settings", "rank")["smallest"]
    size = task_bytes(proposal.spec, proposal.tuner, proposal.facts, smallest)
    if size <= limit * 1000:
        return None
    return object_to(knowledge, "storage", size=f"{size / 1000:,.0f}", limit=f"{limit:,.0f}")


def _tiny(spec: ModelSpec, knowledge: Knowledge) -> bool:
    return spec.parameters < float(rule(knowledge, "choice", "tuner")["small_model_below"])


def _few_rows(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    rows = rows_of(situation.demos)
    if proposal.tuner != "full" or proposal.chain != ("sft",) or _tiny(proposal.spec, knowledge):
        return None
    if not 0 < rows < rule(knowledge, "data", "rows")["small_below"]:
        return None
    size = format_count(proposal.spec.parameters)
    return object_to(knowledge, "small_data_overfit", rows=rows, size=size)


def _forgets(proposal: Proposal, situation: Situation, knowledge: Knowledge) -> Objection | None:
    if proposal.tuner != "full" or _tiny(proposal.spec, knowledge):
        return None
    if not (situation.wish("must_not_forget") or situation.earlier):
        return None
    return object_to(knowledge, "forgetting")
