"""What was declared: reads a scenario file's values, a hardware name and a model name into records.

Goes in: plain values (already parsed YAML) and the knowledge base. Comes out: Scenario, Hardware, ModelSpec.
Never does: look at the machine, open a file, judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from advisor.errors import UnknownNameError, UsageError
from advisor.knowledge import Knowledge
from advisor.types import (
    Accelerator,
    AcceleratorFacts,
    DataKind,
    DatasetProfile,
    Goal,
    Hardware,
    ModelFacts,
    ModelShape,
    ModelSpec,
    Record,
    Scenario,
    Value,
)
from advisor.units import from_gib

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]
SEPARATORS = str.maketrans("", "", " -_./()")
"""Characters that do not count in an accelerator's name."""
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
REMEDY = "The keys and their values: ftadvisor explain scenario"


class HardwareEntry(Record, frozen=True, kw_only=True):
    """The `hardware` table of a scenario file."""

    accelerator: str | None = "none"
    vendor: Literal["nvidia", "amd", "apple", "intel"] | None = None
    count: Annotated[int, msgspec.Meta(ge=0)] = 1
    memory_gib: Positive | None = None
    compute_capability: str | float | None = None
    bf16: bool | None = None
    ram_gib: Positive | None = None
    cpu_cores: Annotated[int, msgspec.Meta(ge=1)] | None = None


class DatasetEntry(Record, frozen=True, kw_only=True):
    """One entry of the `datasets` list of a scenario file."""

    kind: DataKind
    name: str | None = None
    rows: Count = 0
    mean_tokens: Positive | None = None
    p95_tokens: Positive | None = None
    size_mb: Positive | None = None
    languages: tuple[str, ...] | str = ()
    classes: Count | None = None
    tasks: Count | None = None
    task_rows: tuple[Count, ...] = ()
    tenants: Count | None = None
    holdout_rows: Count | None = None
    duplicate_fraction: Share | None = None
    mixed_templates: bool = False
    has_tools_column: bool | None = None
    on_policy: bool | None = None
    positive_fraction: Share | None = None
    pair_similarity: Share | None = None
    baseline_pass_rate: Share | None = None
    role: Literal["train", "earlier_task"] = "train"


class GoalEntry(Record, frozen=True, kw_only=True):
    """The `goal` table of a scenario file."""

    text: str = ""
    deploy: str = ""
    priorities: tuple[str, ...] | str = ()
    context_tokens: Annotated[int, msgspec.Meta(gt=0)] | None = None
    commercial: bool | None = None
    must_not_forget: bool = False
    requested_method: str | None = None
    storage_per_task_kb: Positive | None = None
    max_hours: Positive | None = None
    force: bool = False


class ScenarioEntry(Record, frozen=True, kw_only=True):
    """A scenario file."""

    hardware: HardwareEntry
    model: str
    model_state: Literal["own_sft", "merged", "has_adapter"] | None = None
    datasets: tuple[DatasetEntry, ...] = ()
    goal: GoalEntry = GoalEntry()
    overrides: dict[str, Value] = {}


class NamedModel(Record, frozen=True, kw_only=True):
    """How a model name was understood."""

    asked: str
    how: Literal["auto", "known", "guessed", "quantised", "closed", "words", "unknown"]
    """`guessed`: only the size in its name is known, and the shape is that of a model of like size."""
    spec: ModelSpec | None = None


# --- the scenario file ---------------------------------------------------------------------------


def decode_scenario(data: object, knowledge: Knowledge) -> Scenario:
    """Read the parsed YAML of a scenario file.

    Args:
        data: what the YAML loader returned.
        knowledge: fills in what is left out of the hardware.

    Raises:
        UsageError: an unknown key, a wrong type or a value out of range, named with the valid ones.
        UnknownNameError: the accelerator has no known name and no size was given.
    """
    entry = _decode(data, ScenarioEntry, "scenario")
    goal = entry.goal
    return Scenario(
        hardware=_hardware(entry.hardware, knowledge),
        model=entry.model.strip(),
        datasets=_profiles(entry.datasets),
        goal=Goal(
            text=goal.text, deploy=goal.deploy, priorities=_words(goal.priorities),
            context_tokens=goal.context_tokens, commercial=goal.commercial,
            must_not_forget=goal.must_not_forget, requested_method=goal.requested_method,
            storage_per_task_kb=goal.storage_per_task_kb, max_hours=goal.max_hours,
            model_state=entry.model_state, force=goal.force,
        ),
        overrides=entry.overrides,
    )  # fmt: skip


def _words(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _decode(data: object, kind: type[T], where: str) -> T:
    _check_keys(data, kind, where)
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as problem:
        raise UsageError(f"The {where} is not valid: {problem}", REMEDY) from problem


def _check_keys(data: object, kind: Any, where: str) -> None:
    """Name an unknown key and its nearest valid ones; the decoder would only say that it is unknown."""
    if not isinstance(data, Mapping):
        raise UsageError(
            f"The {where} must be a table of key: value, not {type(data).__name__}.",
            f"Keys: {', '.join(kind.__struct_fields__)}",
        )
    for key, value in data.items():
        if key not in kind.__struct_fields__:
            raise UnknownNameError(f"key in {where}", str(key), kind.__struct_fields__, REMEDY)
        if kind is ScenarioEntry and key == "hardware":
            _check_keys(value, HardwareEntry, "hardware")
        if kind is ScenarioEntry and key == "goal":
            _check_keys(value, GoalEntry, "goal")
        if kind is ScenarioEntry and key == "datasets" and isinstance(value, list):
            for number, item in enumerate(value, start=1):
                _check_keys(item, DatasetEntry, f"datasets, entry {number}")


def _profiles(entries: tuple[DatasetEntry, ...]) -> tuple[DatasetProfile, ...]:
    """Profiles in an order that depends on what they hold only, with a name each."""
    found: list[DatasetProfile] = []
    taken: set[str] = set()
    for entry in sorted(entries, key=lambda e: msgspec.json.encode(e)):
        base = entry.name or entry.kind
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        found.append(_profile(entry, name))
    return tuple(found)


def _profile(entry: DatasetEntry, name: str) -> DatasetProfile:
    return DatasetProfile(
        name=name, origin="declared", kind=entry.kind, rows=entry.rows,
        bytes=None if entry.size_mb is None else round(entry.size_mb * 1000**2),
        mean_tokens=entry.mean_tokens,
        p95_tokens=None if entry.p95_tokens is None else round(entry.p95_tokens),
        languages=_words(entry.languages), classes=entry.classes, tasks=entry.tasks,
        task_rows=entry.task_rows, tenants=entry.tenants, holdout_rows=entry.holdout_rows,
        duplicate_fraction=entry.duplicate_fraction, mixed_templates=entry.mixed_templates,
        has_tools_column=entry.has_tools_column, on_policy=entry.on_policy,
        positive_fraction=entry.positive_fraction, pair_similarity=entry.pair_similarity,
        baseline_pass_rate=entry.baseline_pass_rate, role=entry.role,
    )  # fmt: skip


# --- the machine ---------------------------------------------------------------------------------


def declared_hardware(given: object, knowledge: Knowledge) -> Hardware:
    """Return the machine that a name or a table describes.

    Args:
        given: `RTX 3060`, `8xH100`, `2x RTX 3090`, `24GB`, `none`, `M2 Max`, or the `hardware` table of a
            scenario file.
        knowledge: names and fills in the accelerator.

    Raises:
        UnknownNameError: no accelerator of that name is known; the nearest are named.
        UsageError: a key or a value of the table is wrong.
    """
    if not isinstance(given, str):
        return _hardware(_decode(given, HardwareEntry, "hardware"), knowledge)
    text = given.strip()
    counted = re.fullmatch(r"(\d+)\s*[x×*]\s*(.+)", text, flags=re.IGNORECASE)
    count, name = (int(counted[1]), counted[2].strip()) if counted else (1, text)
    if re.fullmatch(r"\d+(\.\d+)?\s*(gb|gib|g)", name, flags=re.IGNORECASE):
        number = float(re.sub(r"[^0-9.]", "", name))
        entry = HardwareEntry(accelerator=name, vendor="nvidia", count=count, memory_gib=number, bf16=True)
        return _hardware(entry, knowledge)
    return _hardware(HardwareEntry(accelerator=name, count=count), knowledge)


def _hardware(entry: HardwareEntry, knowledge: Knowledge) -> Hardware:
    rules = knowledge.rules["platform"]
    name = (entry.accelerator or "none").strip()
    if name.lower() in rules["aliases"]["cpu"] or entry.count == 0:
        ram = from_gib(entry.ram_gib or rules["declared"]["cpu_only_ram_gib"])
        return Hardware(
            ram_bytes=ram, ram_free_bytes=ram, origin="declared",
            cpu_cores=entry.cpu_cores or rules["declared"]["cpu_cores"],
        )  # fmt: skip
    key = _accelerator_key(name, entry.memory_gib, knowledge)
    facts = knowledge.accelerators[key] if key else None
    if facts is None and entry.memory_gib is None and not _looks_apple(name, entry, rules):
        names = [f.name for f in knowledge.accelerators.values()]
        raise UnknownNameError(
            "accelerator", name, names, "Give its size: {accelerator: NAME, vendor: nvidia, memory_gib: 24}"
        )
    accelerator = _accelerator(name, entry, key, facts, rules)
    if entry.ram_gib:
        ram = from_gib(entry.ram_gib)
    elif accelerator.vendor == "apple":
        ram = accelerator.memory_bytes
    else:
        floor = from_gib(rules["declared"]["ram_floor_gib"])
        total = accelerator.memory_bytes * accelerator.count
        ram = max(floor, round(rules["declared"]["ram_over_accelerator"] * total))
    return Hardware(
        accelerators=(accelerator,), ram_bytes=ram, ram_free_bytes=ram, origin="declared",
        cpu_cores=entry.cpu_cores or rules["declared"]["cpu_cores"],
    )  # fmt: skip


def _looks_apple(name: str, entry: HardwareEntry, rules: Mapping[str, Any]) -> bool:
    first = name.lower().replace("apple", "apple ").split()[0]
    return entry.vendor == "apple" or first in rules["aliases"]["apple_prefixes"]


def _accelerator(
    name: str, entry: HardwareEntry, key: str | None, facts: AcceleratorFacts | None, rules: Mapping[str, Any]
) -> Accelerator:
    vendor = entry.vendor or (facts.vendor if facts else None)
    if vendor is None:
        vendor = "apple" if _looks_apple(name, entry, rules) else "nvidia"
    capability = entry.compute_capability or (facts.compute_capability if facts else None)
    capability = None if capability is None else str(capability)
    bf16 = entry.bf16
    if bf16 is None:
        bf16 = facts.bf16 if facts else _bf16_guess(vendor, capability, rules)
    size = entry.memory_gib or (entry.ram_gib if vendor == "apple" else None)
    size = size or (facts.memory_gib if facts else rules["apple"]["ram_gib"])
    memory = from_gib(size)
    free = round(memory * rules["apple"]["memory_share"]) if vendor == "apple" else memory
    return Accelerator(
        name=facts.name if facts else name, vendor=vendor, memory_bytes=memory, free_bytes=free,
        compute_capability=capability, supports_bf16=bf16, count=entry.count, kb_id=key,
    )  # fmt: skip


def _bf16_guess(vendor: str, capability: str | None, rules: Mapping[str, Any]) -> bool:
    if vendor == "nvidia" and capability is not None:
        return float(capability) >= float(rules["nvidia"]["bf16_from"])
    return True


def _plain(name: str) -> str:
    text = re.sub(
        r"\b(nvidia|geforce|amd|radeon|instinct|intel|apple|tesla|quadro|gpu|graphics)\b", " ", name.lower()
    )
    text = re.sub(r"(\d+)\s*(gib|gb)\b", r"\1gb", text)
    return re.sub(r"[^a-z0-9]+", "", text)


def _accelerator_key(name: str, memory_gib: float | None, knowledge: Knowledge) -> str | None:
    """The kb key that a name means: exact or an alias, else the same name with a memory size after it."""
    wanted = _plain(name)
    if not wanted:
        return None
    exact, longer = [], []
    for key, facts in knowledge.accelerators.items():
        for alias in (key, facts.name, *facts.aliases):
            if wanted not in alias.lower().translate(SEPARATORS):
                continue
            plain = _plain(alias)
            if plain == wanted:
                exact.append(key)
            elif re.fullmatch(re.escape(wanted) + r"(\d+gb|sxm\d?|pcie|nvl|sxm\d?\d+gb|\d+gbsxm\d?)+", plain):
                longer.append(key)
    found = exact or longer
    if not found:
        return None
    size = memory_gib or 0.0
    return min(dict.fromkeys(found), key=lambda k: (abs(knowledge.accelerators[k].memory_gib - size), k))


# --- the model -----------------------------------------------------------------------------------


def spec_for(text: str, knowledge: Knowledge) -> ModelSpec | None:
    """Return the spec of a model that kb/ knows by its id, its name alone, its base twin or its words."""
    return name_model(text, knowledge).spec


def name_model(text: str, knowledge: Knowledge) -> NamedModel:
    """Say what a model name means; `spec` is None where it must be chosen or read elsewhere."""
    asked = text.strip()
    rules = knowledge.rules["closed_models"]
    if asked.lower() in ("", "auto"):
        return NamedModel(asked=asked, how="auto")
    if spec := _known(asked, knowledge):
        return NamedModel(asked=asked, how="known", spec=spec)
    original = _unquantised(asked, rules["quantised"]["words"])
    if original != asked:
        spec = _known(original, knowledge)
        return NamedModel(asked=asked, how="quantised" if spec else "unknown", spec=spec)
    words = asked.lower()
    is_open = any(word in words for word in rules["hosted"]["open_words"])
    if not is_open and "/" not in asked and _mentions(words, rules["hosted"]["words"]):
        return NamedModel(asked=asked, how="closed")
    if "/" in asked:
        guess = _guessed(asked, knowledge)
        return NamedModel(asked=asked, how="guessed" if guess else "unknown", spec=guess)
    spec = _by_words(asked, knowledge)
    return NamedModel(asked=asked, how="known" if spec else "words", spec=spec)


def _mentions(text: str, words: Iterable[str]) -> bool:
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}", text) for word in words)


def _short(model_id: str) -> str:
    return model_id.rsplit("/", 1)[-1].lower()


def _known(asked: str, knowledge: Knowledge) -> ModelSpec | None:
    lower, short = asked.lower(), _short(asked)
    for key, facts in knowledge.models.items():
        if key.lower() == lower:
            return spec_of(key, facts)
    for key, facts in knowledge.models.items():
        if _short(key) == short:
            return spec_of(key, facts)
    for key, facts in knowledge.models.items():
        if facts.instruct and short in _base_names(key):
            org = key.rsplit("/", 1)[0] if "/" in key else ""
            plain = asked if "/" in asked or not org else f"{org}/{asked}"
            return msgspec.structs.replace(spec_of(key, facts), id=plain, instruct=False)
    return None


def base_twin(instruct_id: str, base_id: str) -> bool:
    """True when the second model is the base that the first was made of, by its name."""
    return _short(base_id) in _base_names(instruct_id)


def _base_names(instruct_id: str) -> set[str]:
    """Names that the base twin of an instruct model goes by."""
    short = _short(instruct_id)
    for ending in ("-instruct", "-it", "-chat"):
        short = short.removesuffix(ending)
    twins = {f"{short}-base", f"{short}-pt"}
    if short != _short(instruct_id):
        twins.add(short)
    return twins


def _unquantised(asked: str, marks: Iterable[str]) -> str:
    """The name without file ending and marks of quantisation."""
    name = re.sub(r"\.(gguf|bin|ggml)$", "", asked, flags=re.IGNORECASE)
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    return re.sub(rf"[-_.](?:{pattern}|i1|unsloth)(?=$|[-_.])", "", name, flags=re.IGNORECASE)


def _guessed(asked: str, knowledge: Knowledge) -> ModelSpec | None:
    """A hub id that kb/ does not know, by the size in its name: the nearest dense model with more layers."""
    found = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", asked.lower())
    if not found:
        return None
    size = float(found[1]) * (1e9 if found[2] == "b" else 1e6)
    dense = [(key, facts) for key, facts in knowledge.models.items() if not facts.experts]
    if not dense or size <= 0:
        return None
    key, facts = min(dense, key=lambda item: (abs(math.log(item[1].parameters / size)), item[0]))
    like = spec_of(key, facts)
    layers = max(1, round(like.shape.layers * size / like.parameters))
    words = re.split(r"[^a-z]+", asked.lower())
    return msgspec.structs.replace(
        like, id=asked, shape=msgspec.structs.replace(like.shape, layers=layers), parameters=round(size),
        instruct=bool({"instruct", "it", "chat"} & set(words)), licence=None, commercial=None,
        licence_note="", gated=False, languages=(), source="judgement", verified=False,
    )  # fmt: skip


def _by_words(asked: str, knowledge: Knowledge) -> ModelSpec | None:
    """The newest model whose name holds every word: `Llama 3.1 8B`, `qwen3 4b`."""
    tokens = [t for t in re.split(r"[\s_\-/]+", asked.lower()) if t]
    if not any(re.search(r"\d", t) or len(t) > 3 for t in tokens):
        return None
    found = []
    for key, facts in knowledge.models.items():
        parts = re.split(r"[\s_\-/]+", key.lower())
        if all(t in parts or any(p.startswith(t) for p in parts if len(t) > 3) for t in tokens):
            found.append((facts.released, facts.instruct, key))
    if not found:
        return None
    key = max(found)[2]
    return spec_of(key, knowledge.models[key])


def spec_of(key: str, facts: ModelFacts) -> ModelSpec:
    """Return the ModelSpec of one table of kb/models."""
    return ModelSpec(
        id=key, family=facts.family, architecture=facts.architecture, model_type=facts.model_type,
        shape=ModelShape(
            layers=facts.layers, hidden=facts.hidden, intermediate=facts.intermediate, heads=facts.heads,
            kv_heads=facts.kv_heads, head_dim=facts.head_dim, vocab=facts.vocab, tied=facts.tied,
            attention_bias=facts.attention_bias, mlp_bias=facts.mlp_bias,
            sliding_window=facts.sliding_window, full_attention_layers=facts.full_attention_layers,
            experts=facts.experts, experts_per_token=facts.experts_per_token,
        ),
        parameters=facts.parameters, active_parameters=facts.active_parameters,
        context_tokens=facts.context_tokens, instruct=facts.instruct, licence=facts.licence,
        commercial=facts.commercial, licence_note=facts.licence_note, gated=facts.gated,
        languages=facts.languages, fp16_safe=facts.fp16_safe, gguf_architecture=facts.gguf_architecture,
        source=facts.source, verified=facts.verified,
    )  # fmt: skip
