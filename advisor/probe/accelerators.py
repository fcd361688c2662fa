"""Which entry of kb/hardware does a name mean, and how do equal accelerators become one record?

Goes in: names as drivers report them or people write them, the knowledge base. Comes out: keys, grouped
records. Never does: look at the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from advisor.knowledge import Knowledge
from advisor.types import Accelerator
from advisor.units import from_gib, gib

_MAKERS = {"nvidia", "geforce", "amd", "intel", "gpu", "graphics", "generation", "edition", "r", "tm"}
_FORMS = re.compile(r"sxm\d*|pcie|oam|hbm\d*e?|nvl|gddr\d*x?")
_SERIES = {"rtx", "gtx", "rx", "quadro", "tesla", "titan", "apple", "radeon", "instinct", "arc"}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*gi?b\b", re.IGNORECASE)
_MOBILE = re.compile(r"\b(?:mobile|max[ -]?q)\b", re.IGNORECASE)
_MEMORY_SHARE = 0.2
"""How far a driver's total may be from the nominal memory of the same card: ECC and reserves take a part."""


def match_accelerator(name: str, memory_bytes: int | None, knowledge: Knowledge) -> str | None:
    """Return the key of the kb/hardware entry that a name means, or None when none does.

    Case, dashes, the maker and the words NVIDIA GeForce do not count; a laptop's card stays another card.
    Without a memory, a name as kb/ writes it means that entry (`GH200 480GB` counts the processor's memory).
    Otherwise three rounds, the strictest first: the whole name; without the form factor (SXM, PCIe);
    without the series (`3060` for `RTX 3060`). Entries whose memory agrees go before all others; without
    that, the bare number is not enough. Of several the nearest in memory wins, the smaller when the memory
    is not known.

    Args:
        name: as the driver reports it or a person writes it; a MIG instance counts as its card.
        memory_bytes: total memory, or None to take what the name says (`A100 80GB`).
        knowledge: the knowledge base.
    """
    names = [
        (key, known)
        for key, facts in knowledge.accelerators.items()
        for known in (key, facts.name, *facts.aliases)
    ]
    if memory_bytes is None:
        plain = name.strip().casefold()
        as_written = [key for key, known in names if known.casefold() == plain]
        if as_written:
            return min(as_written, key=lambda key: knowledge.accelerators[key].memory_gib)
    card = re.split(r"\bMIG\b", name)[0]
    if memory_bytes is None and (stated := _MEMORY.search(card)):
        memory_bytes = from_gib(float(stated[1]))
    words = _words(card)
    entries = [(key, _words(known)) for key, known in names]
    fitting = [
        (key, known)
        for key, known in entries
        if _memory_agrees(memory_bytes, knowledge.accelerators[key].memory_gib)
    ]
    rounds = (
        (fitting, _whole), (fitting, _without_form), (fitting, _without_series),
        (entries, _whole), (entries, _without_form),
    )  # fmt: skip
    for among, reduced in rounds:
        wanted = reduced(words)
        keys = [key for key, known in among if wanted and reduced(known) == wanted]
        if keys:
            return min(keys, key=lambda key: _distance(memory_bytes, knowledge.accelerators[key].memory_gib))
    return None


def nvidia_bf16(compute_capability: str, knowledge: Knowledge) -> bool:
    """Say whether bfloat16 is native at a compute capability, whatever the card is called."""
    return float(compute_capability) >= float(knowledge.rules["platform"]["nvidia"]["bf16_from"])


def grouped(single: Iterable[Accelerator]) -> tuple[Accelerator, ...]:
    """Join equal accelerators into one record with their count and the free memory of the fullest.

    The kind with the most memory comes first.
    """
    groups: dict[Accelerator, list[Accelerator]] = {}
    for item in single:
        groups.setdefault(msgspec.structs.replace(item, free_bytes=0), []).append(item)
    joined = [
        msgspec.structs.replace(
            kind, count=sum(item.count for item in items), free_bytes=min(item.free_bytes for item in items)
        )
        for kind, items in groups.items()
    ]
    return tuple(sorted(joined, key=lambda item: item.memory_bytes, reverse=True))


def _words(name: str) -> tuple[str, ...]:
    plain = _MOBILE.sub(" laptop ", _MEMORY.sub(" ", re.sub(r"[-_/()]", " ", name)))
    return tuple(word for word in re.findall(r"[a-z0-9.+]+", plain.lower()) if word not in _MAKERS)


def _whole(words: tuple[str, ...]) -> str:
    return "".join(words)


def _without_form(words: tuple[str, ...]) -> str:
    return "".join(word for word in words if not _FORMS.fullmatch(word))


def _without_series(words: tuple[str, ...]) -> str:
    # "rtx3060" and "rtx 3060" are the same card, so the series may be glued to the number.
    text = "".join(word for word in words if not _FORMS.fullmatch(word) and word not in _SERIES)
    return re.sub(rf"^(?:{'|'.join(sorted(_SERIES))})(?=\d)", "", text)


def _memory_agrees(memory_bytes: int | None, known_gib: float) -> bool:
    return memory_bytes is None or abs(gib(memory_bytes) - known_gib) <= _MEMORY_SHARE * known_gib


def _distance(memory_bytes: int | None, known_gib: float) -> float:
    return known_gib if memory_bytes is None else abs(gib(memory_bytes) - known_gib)
