"""Builds a knowledge base with the few accelerators that the probe's tests name, and the shipped rules."""

from __future__ import annotations

import tomllib
from pathlib import Path

from advisor.knowledge import Knowledge
from advisor.types import AcceleratorFacts

RULES = Path(__file__).resolve().parents[2] / "kb" / "rules"

_CARDS: dict[str, tuple[str, str, float, tuple[str, ...]]] = {
    "rtx-3060": ("nvidia", "RTX 3060", 12, ()),
    "rtx-3060-ti": ("nvidia", "RTX 3060 Ti", 8, ()),
    "rtx-4090": ("nvidia", "RTX 4090", 24, ()),
    "rtx-4090-laptop": ("nvidia", "RTX 4090 Laptop", 16, ()),
    "rtx-4060-ti-8gb": ("nvidia", "RTX 4060 Ti 8GB", 8, ()),
    "rtx-4060-ti-16gb": ("nvidia", "RTX 4060 Ti 16GB", 16, ()),
    "a100-40gb": ("nvidia", "A100 40GB", 40, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a100-80gb": ("nvidia", "A100 80GB", 80, ("A100-SXM4-80GB",)),
    "h100-sxm": ("nvidia", "H100 SXM", 80, ("H100 80GB HBM3",)),
    "h100-pcie": ("nvidia", "H100 PCIe", 80, ()),
    "rtx-6000-ada": ("nvidia", "RTX 6000 Ada", 48, ("RTX 6000",)),
    "t4": ("nvidia", "Tesla T4", 16, ()),
    "rx-7900-xtx": ("amd", "Radeon RX 7900 XTX", 24, ()),
    "apple-m2-pro": ("apple", "Apple M2 Pro", 16, ()),
}


def small_knowledge() -> Knowledge:
    """Return a knowledge base that knows the cards above and nothing else."""
    return Knowledge(
        sources={},
        accelerators={
            key: AcceleratorFacts(
                name=name, vendor=vendor, aliases=aliases, memory_gib=memory, bf16=True,
                flash_attention=True, bitsandbytes=True, source="test", checked="2026-11-25",
            )
            for key, (vendor, name, memory, aliases) in _CARDS.items()
        },
        models={}, objectives={}, tuners={}, quantisations={}, warnings={}, failures={}, topics={},
        programs={},
        rules={
            name: tomllib.loads((RULES / f"{name}.toml").read_text(encoding="utf-8"))
            for name in ("probe", "platform")
        },
    )  # fmt: skip
