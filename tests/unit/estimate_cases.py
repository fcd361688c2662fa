"""Specs for the tests of advisor.estimate: shapes of known models and small ones of each family."""

from __future__ import annotations

from typing import Any

from advisor.types import ModelShape, ModelSpec

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2",
    "smollm3", "gpt2",
)  # fmt: skip


def spec(model_type: str = "llama", *, parameters: int = 0, context: int = 64, **shape: Any) -> ModelSpec:
    """A spec of `model_type`; small unless its shape is given."""
    small = {"layers": 2, "hidden": 48, "intermediate": 136, "heads": 12, "kv_heads": 3, "head_dim": 8,
             "vocab": 100, "tied": True}  # fmt: skip
    if model_type == "gpt2":
        small |= {"kv_heads": 12, "head_dim": 4}
    return ModelSpec(
        id=f"test/{model_type}", architecture=f"{model_type}ForCausalLM", model_type=model_type,
        shape=ModelShape(**{**small, **shape}), parameters=parameters, context_tokens=context, source="test",
    )  # fmt: skip


LLAMA_8B = spec(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False,
    parameters=8_030_261_248,
)  # fmt: skip
LLAMA_3B = spec(
    layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8, head_dim=128, vocab=128256, tied=True,
    parameters=3_212_749_824,
)  # fmt: skip
LLAMA_1B = spec(
    layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256, tied=True,
    parameters=1_235_814_400,
)  # fmt: skip
