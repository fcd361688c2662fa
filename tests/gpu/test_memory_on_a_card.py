"""On a real card: what the allocator hands out is what the closed form and the tracer say."""

from __future__ import annotations

from typing import Any

import pytest

from advisor import knowledge
from advisor.estimate.memory import estimate_memory
from advisor.types import MemorySettings
from tests.unit.estimate_cases import spec

torch = pytest.importorskip("torch")

from real_step import measure  # noqa: E402 - after the check that torch is installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here"),
]
SHAPE = {"layers": 12, "hidden": 1024, "intermediate": 3072, "head_dim": 64, "vocab": 64000}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    "tuner", [{"tuner": "full"}, {"tuner": "lora"}, {"tuner": "qlora", "weight_bits": 4}],
    ids=["full", "lora", "qlora"],
)  # fmt: skip
def test_the_estimate_holds_on_a_card(tuner: dict[str, Any], checkpointing: bool) -> None:
    """Allocated within 5% of expected, reserved and lost memory never above `high`."""
    settings = MemorySettings(seq_len=2048, micro_batch=2, gradient_checkpointing=checkpointing, **tuner)
    model = spec(heads=16, kv_heads=4, **SHAPE)
    said = estimate_memory(model, settings, knowledge.load().rules["memory"])
    found = measure(model, settings, "cuda")
    assert found.peak == pytest.approx(said.allocated_bytes.expected, rel=0.05)
    assert found.reserved <= said.reserved_bytes.high
    assert found.lost <= said.peak_bytes.high
