"""Which model does a name mean: a known one, a base twin, a quantised copy, a hosted one, or only words?

Goes in: any text. Comes out: NamedModel, with a ModelSpec where kb/ knows the model.
Never does: choose a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from advisor.knowledge import Knowledge, spec_of
from advisor.types import ModelSpec, Record


class NamedModel(Record, frozen=True, kw_only=True):
    """How a model name was understood."""

    asked: str
    how: Literal["auto", "known", "guessed", "quantised", "closed", "words", "unknown"]
    """`guessed`: only the size in its name is known, and the shape is that of a model of like size."""
    spec: ModelSpec | None = None


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
        spec = _known(original, knowledge) or _guessed(original.rsplit("/", 1)[-1], knowledge)
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


def _respelt(short: str, knowledge: Knowledge) -> str:
    """A publisher's own spelling of a name, where another is common."""
    spellings = knowledge.rules["closed_models"]["respelt"]
    starts = [start for start in spellings if start.endswith("-") and short.startswith(start)]
    return spellings[starts[0]] + short.removeprefix(starts[0]) if starts else short


def _known(asked: str, knowledge: Knowledge) -> ModelSpec | None:
    lower, short = asked.lower(), _respelt(_short(asked), knowledge)
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
            return msgspec.structs.replace(
                spec_of(key, facts), id=plain, instruct=False, has_chat_template=False
            )
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


def _size(asked: str, knowledge: Knowledge) -> float:
    """Parameters by the name: of a known mixture, else the figure in it (`7B`, `8x7B`, `270m`); 0 unknown."""
    sizes, name = knowledge.rules["closed_models"]["sizes"], asked.lower()
    if (found := re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", name)) is not None:
        return float(found[1]) * (1e9 if found[2] == "b" else 1e6)
    listed = zip(sizes["names"], sizes["parameters"], strict=True)
    if known := [figure for word, figure in listed if word in name]:
        return float(known[0])
    experts = re.search(r"(?<![a-z0-9.])(\d+)x(\d+(?:\.\d+)?)b(?![a-z0-9])", name)
    return float(experts[1]) * float(experts[2]) * 1e9 if experts else 0.0


def _guessed(asked: str, knowledge: Knowledge) -> ModelSpec | None:
    """A hub id that kb/ does not know, by the size in its name: the nearest dense model with more layers."""
    size = _size(asked, knowledge)
    dense = [(key, facts) for key, facts in knowledge.models.items() if not facts.experts]
    if not dense or size <= 0:
        return None
    key, facts = min(dense, key=lambda item: (abs(math.log(item[1].parameters / size)), item[0]))
    like = spec_of(key, facts)
    layers = max(1, round(like.shape.layers * size / like.parameters))
    words = re.split(r"[^a-z]+", asked.lower())
    forbidden = knowledge.rules["licences"]["noncommercial"]
    closed = any(word in asked.lower() for word in forbidden["words"])
    return msgspec.structs.replace(
        like, id=asked, shape=msgspec.structs.replace(like.shape, layers=layers), parameters=round(size),
        instruct=bool({"instruct", "it", "chat"} & set(words)),
        licence=forbidden["licence"] if closed else None, commercial=False if closed else None,
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
