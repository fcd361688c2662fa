"""What does kb/ say about a method, a setting, a warning, a failure, a model, an accelerator or a term?

Goes in: a topic in any spelling and the knowledge base. Comes out: an Explanation with its sources resolved.
Never does: say anything that is not in kb/, read files, look at the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from advisor.errors import UnknownNameError, nearest
from advisor.knowledge import Knowledge
from advisor.types import (
    AcceleratorFacts,
    Explanation,
    Failure,
    ModelFacts,
    ObjectiveFacts,
    Program,
    Quantisation,
    Source,
    Topic,
    TunerFacts,
    WarningFacts,
)
from advisor.units import format_bytes, format_count

Facts = list[tuple[str, str]]

SECTIONS = {
    "topics": "topic", "objectives": "objective", "tuners": "tuner", "quantisations": "quantisation",
    "warnings": "warning", "failures": "failure", "models": "model", "accelerators": "hardware",
    "sources": "source",
}  # fmt: skip
"""Section of the knowledge base -> the word that tells entries of one name apart: `warning forgetting`."""

IN_GENERAL = {"rows": "N", "model": "the model", "needed_gib": "N", "available_gib": "M", "asked": "METHOD"}
"""What stands for the figures of a warning when no plan is at hand."""

EIGHT_BILLION = 8_000_000_000


def explain(topic: str, knowledge: Knowledge) -> Explanation:
    """Return what is known about a topic.

    Case, spaces, dashes and underscores do not count, nor does American spelling. A name that several
    sections share means the first of them; `warning forgetting` names another.

    Args:
        topic: a term, method, setting, warning code, model, accelerator, or a list: topics, methods, models,
            hardware, quantisations, warnings, failures, sources.
        knowledge: the knowledge base; a setting that only the training programs describe is explained from
            there.

    Raises:
        UnknownNameError: nothing of that name is known; the nearest is named.
    """
    wanted = _plain(topic)
    pages = _pages(knowledge)
    if wanted in pages:
        return pages[wanted]()
    found = _index(knowledge).get(wanted)
    if not found and (other := _stand_in(wanted, knowledge) or _program_key(wanted, knowledge.programs)):
        return other
    if not found:
        keys = {key for program in knowledge.programs.values() for key in program.keys}
        entries = {name for section in SECTIONS for name in getattr(knowledge, section)}
        names = sorted(entries | keys | set(pages))
        close = names if nearest(topic, names) else sorted(pages)
        raise UnknownNameError("topic", topic, close, "See: ftadvisor explain topics")
    section, key = found[0]
    explanation = _entry(section, key, knowledge)
    others = [f"{SECTIONS[other]} {name}" for other, name in found[1:] if other != "sources"]
    if not others:
        return explanation
    also = ("also", ", ".join(dict.fromkeys(others)))
    return msgspec.structs.replace(explanation, facts=(*explanation.facts, also))


def _plain(name: str) -> str:
    """The name without what spellings differ in."""
    text = name.lower().replace("³", "3")
    text = re.sub(r"i[sz]ation\b", "isation", re.sub(r"i[sz]e(d?)\b", r"ise\1", text))
    return re.sub(r"[^a-z0-9.]+", "", text)


def _index(knowledge: Knowledge) -> dict[str, list[tuple[str, str]]]:
    """Plain name -> every (section, key) that it means; identities before aliases, in order of SECTIONS."""
    index: dict[str, list[tuple[str, str]]] = {}
    later: list[tuple[str, tuple[str, str]]] = []
    spoken = _spoken_names(knowledge)
    for section, word in SECTIONS.items():
        for key, entry in getattr(knowledge, section).items():
            for name in (key, f"{word} {key}"):
                index.setdefault(_plain(name), []).append((section, key))
            names = (*_aliases(section, key, entry), *spoken.get(key, ()))
            later += [(_plain(name), (section, key)) for name in names]
    for name, target in later:
        targets = index.setdefault(name, [])
        if target not in targets:
            targets.append(target)
    return {name: targets for name, targets in index.items() if len(name) > 1}


def _aliases(section: str, key: str, entry: Any) -> Iterable[str]:
    if section == "models":
        return (key.rsplit("/", 1)[-1],)
    if section == "accelerators":
        return (entry.name, *entry.aliases)
    if section in ("topics", "objectives", "tuners"):
        bare = re.sub(r"\s*\(.*?\)", "", entry.title)
        return (entry.title, bare, bare.removesuffix("s"), *re.findall(r"\((.*?)\)", entry.title))
    return ()


def _spoken_names(knowledge: Knowledge) -> dict[str, list[str]]:
    """Names of methods as people say them in a goal; kb/rules/goals.toml calls retrieval `none_rag`."""
    methods = knowledge.rules.get("goals", {}).get("method", {})
    return {key.removeprefix("none_"): table["words"] for key, table in methods.items()}


def _stand_in(wanted: str, knowledge: Knowledge) -> Explanation | None:
    """A method that goes under another name here, as kb/rules/goals.toml tells it."""
    for table in knowledge.rules.get("goals", {}).get("variant", {}).values():
        word = next((word for word in table["words"] if _plain(word) == wanted), None)
        if word is not None:
            note, other = table["note"].format(asked=word.upper()), table["stands_in"]
            return Explanation(
                title=word.upper(), plain=f"{note[:1].upper()}{note[1:]}.", facts=(("stands in", other),),
                sources=(knowledge.sources[table["source"]],),
            )  # fmt: skip
    return None


def _program_key(wanted: str, programs: Mapping[str, Program]) -> Explanation | None:
    """A setting as the training programs document it."""
    found = {
        name: (key, facts)
        for name, program in programs.items()
        for key, facts in program.keys.items()
        if _plain(key) == wanted
    }
    if not found:
        return None
    key, facts = next(iter(found.values()))
    low = "" if facts.low is None else f"from {facts.low:g}"
    high = "" if facts.high is None else f"to {facts.high:g}"
    return Explanation(
        title=f"{key} (setting)", plain=facts.doc,
        facts=(
            ("type", facts.type),
            *((("range", f"{low} {high}".strip()),) if low or high else ()),
            *((("choices", ", ".join(facts.choices)),) if facts.choices else ()),
            ("read by", ", ".join(found)),
            ("given by", f"--set {key}=..., or in recipe.yaml"),
        ),
    )  # fmt: skip


# --- one entry -----------------------------------------------------------------------------------


def _entry(section: str, key: str, knowledge: Knowledge) -> Explanation:
    entry = getattr(knowledge, section)[key]
    writers: dict[str, Callable[[str, Any, Knowledge], Explanation]] = {
        "topics": _topic, "objectives": _objective, "tuners": _tuner, "quantisations": _quantisation,
        "warnings": _warning, "failures": _failure, "models": _model, "accelerators": _accelerator,
        "sources": _source,
    }  # fmt: skip
    return writers[section](key, entry, knowledge)


def _written(
    title: str, plain: str, exact: str, facts: Facts, sources: Iterable[str], entry: Any, knowledge: Knowledge
) -> Explanation:
    if not getattr(entry, "verified", True):
        facts = [*facts, ("standing", "not verified: from memory, second hand or judgement")]
    keys = dict.fromkeys([entry.source, *sources])
    return Explanation(
        title=title,
        plain=plain,
        exact=exact,
        facts=tuple((label, value) for label, value in facts if value),
        sources=tuple(knowledge.sources[key] for key in keys),
    )


def _topic(key: str, entry: Topic, knowledge: Knowledge) -> Explanation:
    facts, sources = _defaults(key, knowledge), []
    if key == "learning_rate":
        for name, objective in knowledge.objectives.items():
            more, named = _rates(objective)
            facts += [(f"{name}, {label}", value) for label, value in more]
            sources += named
    facts.append(("see also", ", ".join(entry.see)))
    return _written(entry.title, entry.plain, entry.exact, facts, sources, entry, knowledge)


def _defaults(setting: str, knowledge: Knowledge) -> Facts:
    """The default that each objective and tuner has for a setting."""
    owners: list[tuple[str, ObjectiveFacts | TunerFacts]] = [
        *knowledge.objectives.items(),
        *knowledge.tuners.items(),
    ]
    return [
        (f"default, {name}", _value(entry.settings[setting]))
        for name, entry in owners
        if setting in entry.settings
    ]


def _objective(key: str, entry: ObjectiveFacts, knowledge: Knowledge) -> Explanation:
    rates, sources = _rates(entry)
    facts: Facts = [
        ("data", ", ".join(entry.data_kinds)),
        ("starts from", "a model that follows instructions" if entry.needs_policy else "any model"),
        ("program", entry.program),
        *((f"learning rate, {label}", value) for label, value in rates),
        ("settings", _settings(entry.settings)),
    ]
    return _written(entry.title, entry.plain, entry.exact, facts, sources, entry, knowledge)


def _rates(entry: ObjectiveFacts) -> tuple[Facts, list[str]]:
    facts = [
        (group, f"{rate.value:g} ({rate.low:g} to {rate.high:g})" + (f"; {rate.note}" if rate.note else ""))
        for group, rate in entry.learning_rate.items()
    ]
    return facts, [rate.source for rate in entry.learning_rate.values()]


def _tuner(key: str, entry: TunerFacts, knowledge: Knowledge) -> Explanation:
    rates = {
        name: objective.learning_rate[entry.group]
        for name, objective in knowledge.objectives.items()
        if entry.group in objective.learning_rate
    }
    gguf = {
        "merged": "merged into the base", "merged_or_lora": "merged into the base, or as a file of its own",
        "virtual_tokens": "as added tokens", "sequence_state": "as a file beside the base",
        "none": "not possible",
    }  # fmt: skip
    facts: Facts = [
        ("base", "quantised to 4 bits" if entry.quantised_base else "unquantised"),
        ("merges into the base", _value(entry.mergeable)),
        ("slower when used", _value(entry.adds_latency)),
        ("GGUF", gguf[entry.gguf] + (f"; {entry.gguf_note}" if entry.gguf_note else "")),
        *((f"learning rate, {n}", f"{r.value:g} ({r.low:g} to {r.high:g})") for n, r in rates.items()),
        ("settings", _settings(entry.settings)),
        ("gain kept", f"{entry.quality:.0%} of the best method's"),
        ("forgetting", f"{entry.forgetting:g} (0 is none)"),
    ]
    sources = [rate.source for rate in rates.values()]
    return _written(entry.title, entry.plain, entry.exact, facts, sources, entry, knowledge)


def _quantisation(key: str, entry: Quantisation, knowledge: Knowledge) -> Explanation:
    def shown(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    size = format_bytes(entry.bits_per_weight * EIGHT_BILLION / 8)
    facts: Facts = [
        ("file of an 8B model", f"about {size}"),
        ("perplexity, 70B model", shown(entry.perplexity_increase_percent, "+{:g}%")),
        ("log perplexity ratio, 2B model", shown(entry.small_model_log_ratio, "{:g}")),
        ("mean KL divergence, 8B model", shown(entry.kl_mean, "{:g}")),
        ("chosen from", format_count(entry.minimum_parameters) if entry.minimum_parameters else "any size"),
    ]
    exact = f"{entry.bits_per_weight:g} bits a weight on an 8B model."
    return _written(f"{key} (quantisation)", entry.plain, exact, facts, (), entry, knowledge)


def _warning(key: str, entry: WarningFacts, knowledge: Knowledge) -> Explanation:
    facts: Facts = [("severity", entry.severity), ("remedy", _in_general(entry.remedy))]
    return _written(f"{key} (warning)", _in_general(entry.message), "", facts, (), entry, knowledge)


def _in_general(message: str) -> str:
    text = re.sub(r"\{(\w+)\}", lambda match: IN_GENERAL.get(match[1], match[1]), message)
    return text[:1].upper() + text[1:]


def _failure(key: str, entry: Failure, knowledge: Knowledge) -> Explanation:
    plain = f"Likely because {' or '.join(entry.causes)}."
    remedies = [(f"try {number}", remedy) for number, remedy in enumerate(entry.remedies, 1)]
    return _written(entry.signature, plain, "", remedies, (), entry, knowledge)


def _model(key: str, entry: ModelFacts, knowledge: Knowledge) -> Explanation:
    kind = "follows instructions" if entry.instruct else "is a base model that continues text"
    use = "allowed" if entry.commercial else "not allowed"
    plain = (
        f"{key} has {format_count(entry.parameters)} parameters and {kind}. "
        f"Commercial use is {use} ({entry.licence})."
    )
    shape = (
        f"{entry.architecture}: {entry.layers} layers of {entry.hidden}, feed-forward {entry.intermediate}, "
        f"{entry.heads} heads of {entry.head_dim} with {entry.kv_heads} for keys and values, "
        f"vocabulary {entry.vocab}, {'tied' if entry.tied else 'untied'} embeddings."
    )
    facts: Facts = [
        ("context", f"{entry.context_tokens} tokens"),
        ("licence", entry.licence + (f"; {entry.licence_note}" if entry.licence_note else "")),
        ("gated", "yes, its terms must be accepted" if entry.gated else "no"),
        ("languages", ", ".join(entry.languages)),
        ("good at", ", ".join(entry.strengths)),
        ("released", entry.released),
        ("fp16", "safe" if entry.fp16_safe else "overflows"),
        ("GGUF architecture", entry.gguf_architecture or "none"),
        ("chosen for auto", _value(entry.recommend)),
        ("instruct twin", entry.base_of or ""),
        ("note", entry.note),
    ]
    return _written(key, plain, shape, facts, (), entry, knowledge)


def _accelerator(key: str, entry: AcceleratorFacts, knowledge: Knowledge) -> Explanation:
    plain = f"{entry.name} has {entry.memory_gib:g} GiB of memory."
    speed = f"{entry.tflops:g} TFLOPS" if entry.tflops else "unknown"
    width = f"{entry.bandwidth_gb_per_s:g} GB/s" if entry.bandwidth_gb_per_s else "unknown"
    facts: Facts = [
        ("generation", entry.generation),
        ("compute capability", entry.compute_capability or ""),
        ("bfloat16", _value(entry.bf16)),
        ("FlashAttention", _value(entry.flash_attention)),
        ("4-bit loading", _value(entry.bitsandbytes)),
        ("also called", ", ".join(entry.aliases)),
        ("note", entry.note),
    ]
    exact = f"Dense 16-bit matrix products: {speed}; memory bandwidth: {width}."
    return _written(entry.name, plain, exact, facts, (), entry, knowledge)


def _source(key: str, entry: Source, knowledge: Knowledge) -> Explanation:
    standing = "read at the source" if entry.verified else "not verified: a lead, not a proof"
    facts = (("key", key), ("last read", entry.checked), ("standing", standing))
    return Explanation(title=entry.title, plain=entry.reference, facts=facts, sources=(entry,))


def _settings(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in settings.items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- lists ---------------------------------------------------------------------------------------


def _pages(knowledge: Knowledge) -> dict[str, Callable[[], Explanation]]:
    def page(title: str, plain: str, facts: Callable[[], Facts]) -> Callable[[], Explanation]:
        return lambda: Explanation(title=title, plain=plain, facts=tuple(facts()))

    def titles(*sections: str) -> Facts:
        return [(key, entry.title) for name in sections for key, entry in getattr(knowledge, name).items()]

    methods = page(
        "Methods", "What the loss asks for, then which weights move.", lambda: titles("objectives", "tuners")
    )
    return {
        "topics": page("What can be explained", "Any of these: ftadvisor explain NAME", _overview(knowledge)),
        "methods": methods,
        "objectives": page("Objectives", "What the loss asks for.", lambda: titles("objectives")),
        "tuners": page("Tuners", "Which weights move.", lambda: titles("tuners")),
        "models": page(
            "Models", "Known models; any other is read from its config.json.", lambda: _models(knowledge)
        ),
        "hardware": page(
            "Accelerators", "Known by name; any other by its size.", lambda: _hardware(knowledge)
        ),
        "quantisations": page(
            "Quantisations", "Types of a GGUF file, the largest first.",
            lambda: [(key, entry.plain) for key, entry in knowledge.quantisations.items()],
        ),
        "warnings": page(
            "Warnings", "What a plan may warn about.",
            lambda: [(k, _in_general(w.message)) for k, w in knowledge.warnings.items()],
        ),
        "failures": page(
            "Failures", "What a failing run looks like.",
            lambda: [(key, entry.signature) for key, entry in knowledge.failures.items()],
        ),
        "sources": page("Sources", "Where the facts come from.", lambda: titles("sources")),
    }  # fmt: skip


def _overview(knowledge: Knowledge) -> Callable[[], Facts]:
    lists = "methods, objectives, tuners, models, hardware, quantisations, warnings, failures, sources"
    return lambda: [
        ("lists", lists),
        ("objectives", ", ".join(knowledge.objectives)),
        ("tuners", ", ".join(knowledge.tuners)),
        ("terms and settings", ", ".join(knowledge.topics)),
    ]


def _models(knowledge: Knowledge) -> Facts:
    families: dict[str, list[str]] = {}
    for key, entry in knowledge.models.items():
        families.setdefault(entry.family, []).append(f"{key} ({format_count(entry.parameters)})")
    return [(family, ", ".join(names)) for family, names in families.items()]


def _hardware(knowledge: Knowledge) -> Facts:
    groups: dict[str, list[str]] = {}
    for entry in knowledge.accelerators.values():
        groups.setdefault(f"{entry.vendor}, {entry.generation}", []).append(entry.name)
    return [(group, ", ".join(names)) for group, names in groups.items()]
