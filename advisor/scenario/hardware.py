"""Which machine do a name or a table describe?

Goes in: `RTX 3060`, `8xH100`, `24GB`, `none`, `M2 Max`, or a `hardware` table. Comes out: Hardware, what was
left out filled in from kb/. Never does: look at this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from advisor.errors import UnknownNameError, UsageError
from advisor.knowledge import Knowledge
from advisor.probe.accelerators import match_accelerator
from advisor.scenario.entries import HardwareEntry, decode_entry
from advisor.types import Accelerator, AcceleratorFacts, Hardware
from advisor.units import from_gib

STATED = re.compile(r"(\d+(?:\.\d+)?)\s*gi?b\b", re.IGNORECASE)
"""A size in a name; Apple's memory is that of the whole machine (`M2 16GB`)."""


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
        return hardware_of(decode_entry(given, HardwareEntry, "hardware"), knowledge)
    text = given.strip()
    counted = re.fullmatch(r"(\d+)\s*[x×*]\s*(.+)", text, flags=re.IGNORECASE)
    count, name = (int(counted[1]), counted[2].strip()) if counted else (1, text)
    if count == 0:
        raise UsageError(f"{text!r} names no device.", "--hardware none plans for the processor alone.")
    if re.fullmatch(r"\d+(\.\d+)?\s*(gb|gib|g)", name, flags=re.IGNORECASE):
        number = float(re.sub(r"[^0-9.]", "", name))
        entry = HardwareEntry(accelerator=name, vendor="nvidia", count=count, memory_gib=number, bf16=True)
        return hardware_of(entry, knowledge)
    return hardware_of(HardwareEntry(accelerator=name, count=count), knowledge)


def hardware_of(entry: HardwareEntry, knowledge: Knowledge) -> Hardware:
    """The machine of one `hardware` table."""
    rules = knowledge.rules["platform"]
    name = (entry.accelerator or "none").strip()
    if name.lower() in rules["aliases"]["cpu"] or entry.count == 0:
        ram = from_gib(entry.ram_gib or rules["declared"]["cpu_only_ram_gib"])
        return Hardware(
            ram_bytes=ram, ram_free_bytes=ram, origin="declared",
            cpu_cores=entry.cpu_cores or rules["declared"]["cpu_cores"],
        )  # fmt: skip
    size = None if entry.memory_gib is None else from_gib(entry.memory_gib)
    key = match_accelerator(name, size, knowledge)
    facts = knowledge.accelerators[key] if key else None
    if facts is None and entry.memory_gib is None and not _looks_apple(name, entry, rules):
        names = [f.name for f in knowledge.accelerators.values()]
        raise UnknownNameError(
            "accelerator", name, names, "Give its size instead: 24GB (in a scenario file: memory_gib: 24)."
        )
    if (stated := STATED.search(name)) and _looks_apple(name, entry, rules) and not entry.ram_gib:
        entry = msgspec.structs.replace(entry, ram_gib=float(stated[1]))
    if facts is not None and entry.vendor not in (None, facts.vendor):
        raise UsageError(
            f"{facts.name} is made by {facts.vendor}, not by {entry.vendor}.",
            "Leave `vendor` away, or mend the name.",
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
        bf16 = facts.bf16 if facts else _bf16_guess(vendor, capability, name, rules)
    size = entry.memory_gib or (entry.ram_gib if vendor == "apple" else None)
    size = size or (facts.memory_gib if facts else rules["apple"]["ram_gib"])
    memory = from_gib(size)
    free = round(memory * rules["apple"]["memory_share"]) if vendor == "apple" else memory
    return Accelerator(
        name=facts.name if facts else name, vendor=vendor, memory_bytes=memory, free_bytes=free,
        compute_capability=capability, supports_bf16=bf16, count=entry.count, kb_id=key,
    )  # fmt: skip


def _bf16_guess(vendor: str, capability: str | None, name: str, rules: Mapping[str, Any]) -> bool:
    if vendor == "nvidia" and capability is not None:
        return float(capability) >= float(rules["nvidia"]["bf16_from"])
    words = set(re.findall(r"[a-z]+\d*|\d+", name.lower()))
    return vendor != "nvidia" or not words & set(rules["nvidia"]["names_without_bf16"])
