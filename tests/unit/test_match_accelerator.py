"""Which entry of kb/hardware a driver's name or a person's words mean."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.knowledge import load
from advisor.probe.accelerators import match_accelerator
from advisor.units import from_gib
from tests.unit.probe_knowledge import small_knowledge

KNOWLEDGE = small_knowledge()


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA GeForce RTX 3060", 12, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060 Ti", 8, "rtx-3060-ti"),
        ("rtx-3060", None, "rtx-3060"),
        ("RTX3060", None, "rtx-3060"),
        ("rtx 3060 12gb", None, "rtx-3060"),
        ("3060", None, "rtx-3060"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "rtx-4090-laptop"),
        ("rtx 4090 mobile", None, "rtx-4090-laptop"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6, None),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8, "rtx-4060-ti-8gb"),
        ("RTX 4060 Ti", None, "rtx-4060-ti-8gb"),
        ("RTX 4060 Ti 16 GB", None, "rtx-4060-ti-16gb"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("A100", 80, "a100-80gb"),
        ("A100", None, "a100-40gb"),
        ("A100 80GiB", None, "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("Tesla T4", 15, "t4"),
        ("T4", None, "t4"),
        ("NVIDIA RTX 6000 Ada Generation", 48, "rtx-6000-ada"),
        ("Quadro RTX 6000", 24, None),
        ("AMD Radeon RX 7900 XTX", 24, "rx-7900-xtx"),
        ("7900 xtx", None, "rx-7900-xtx"),
        ("M2 Pro", None, "apple-m2-pro"),
        ("Apple M2", None, None),
        ("GeForce GTX 480", 1.5, None),
        ("", None, None),
        ("NVIDIA GeForce", None, None),
        ("12GB", None, None),
    ],
)
def test_names_find_their_entry(name: str, memory_gib: float | None, key: str | None) -> None:
    """Drivers' names, keys and people's shorthand find the entry; an unknown card finds none."""
    memory = None if memory_gib is None else from_gib(memory_gib)
    assert match_accelerator(name, memory, KNOWLEDGE) == key


@given(st.sampled_from(sorted(KNOWLEDGE.accelerators)), st.data())
def test_every_entry_finds_itself_however_it_is_written(key: str, data: st.DataObject) -> None:
    """A name or alias with any case, dashes for spaces and the maker in front finds its entry."""
    facts = KNOWLEDGE.accelerators[key]
    name = data.draw(st.sampled_from([facts.name, key, *facts.aliases]))
    name = data.draw(st.sampled_from([str.upper, str.lower, str.title]))(name)
    name = data.draw(st.sampled_from(["", "NVIDIA ", "NVIDIA GeForce "])) + name
    name = name.replace(" ", data.draw(st.sampled_from([" ", "-", "_", "  "])))
    assert match_accelerator(name, from_gib(facts.memory_gib), KNOWLEDGE) == key


@given(st.text(max_size=40), st.one_of(st.none(), st.integers(0, 2**40)))
def test_any_text_has_an_answer(name: str, memory: int | None) -> None:
    """No text makes the matching fail."""
    assert match_accelerator(name, memory, KNOWLEDGE) in {None, *KNOWLEDGE.accelerators}


def test_an_empty_knowledge_base_knows_nothing() -> None:
    """Without entries there is no match."""
    assert match_accelerator("RTX 3060", None, msgspec.structs.replace(KNOWLEDGE, accelerators={})) is None


def test_every_shipped_entry_finds_itself() -> None:
    """In the shipped kb/hardware each name and alias, with the entry's memory, leads to that entry."""
    shipped = load()
    lost = {
        (key, name): found
        for key, facts in shipped.accelerators.items()
        for name in (key, facts.name, *facts.aliases)
        if (found := match_accelerator(name, from_gib(facts.memory_gib), shipped)) != key
    }
    assert lost == {}
