"""What does a tuner hold whose memory is stated as data?

Goes in: a TunerMemory of kb/, the layers that it tunes, a rank. Comes out: counts and bytes. Never does: know
a tuner by its name; count what the base model keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from advisor.estimate.layers import Linear
from advisor.types import TunerMemory


def stated_tuner(tuner: str, tables: Mapping[str, Mapping[str, Any]]) -> TunerMemory | None:
    """Return what kb/rules/tuners.toml states of a tuner; None where it states nothing."""
    table = tables.get(tuner.lower().replace("_", "-"))
    if table is None:
        return None
    facts = {name: value for name, value in table.items() if name in TunerMemory.__struct_fields__}
    return msgspec.convert(facts, type=TunerMemory)


def trained(memory: TunerMemory, layers: Sequence[Linear], blocks: int, rank: int) -> int:
    """Return the trained parameters of all blocks."""
    return _all(memory.trained, memory.trained_once, layers, blocks, rank)


def frozen_bytes(memory: TunerMemory, layers: Sequence[Linear], blocks: int, rank: int) -> int:
    """Return the bytes of fixed tensors that lie beside the model."""
    return _all(memory.frozen_bytes, memory.frozen_once_bytes, layers, blocks, rank)


def token_bytes(memory: TunerMemory, layers: Sequence[Linear], rank: int) -> int:
    """Return the bytes that one block keeps for each token."""
    return round(sum(_sum(memory.token_bytes, one.inputs, one.outputs, rank) for one in layers))


def kept_bytes(memory: TunerMemory, layers: Sequence[Linear], rank: int) -> int:
    """Return the bytes that one block keeps whatever the batch."""
    return round(sum(_sum(memory.kept_bytes, one.inputs, one.outputs, rank) for one in layers))


def _all(
    each: Mapping[str, float], once: Mapping[str, float], layers: Sequence[Linear], blocks: int, rank: int
) -> int:
    widest = (max((one.inputs for one in layers), default=0), max((one.outputs for one in layers), default=0))
    layered = sum(_sum(each, one.inputs, one.outputs, rank) for one in layers)
    return round(blocks * layered + _sum(once, *widest, rank))


def _sum(terms: Mapping[str, float], inputs: int, outputs: int, rank: int) -> float:
    sizes = {
        "in": inputs, "out": outputs, "min": min(inputs, outputs), "max": max(inputs, outputs), "r": rank,
        "1/r": 1 / rank, "1": 1,
    }  # fmt: skip
    return sum(factor * math.prod(sizes[name] for name in term.split("*")) for term, factor in terms.items())
