"""Writes a LoRA adapter as a GGUF file, to be put on a base at run time.

Goes in: an adapter and the plan of its base. Comes out: a file. Never does: write what llama.cpp would
ignore or scale differently: that is refused.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from advisor.errors import ExportError
from advisor.export.adapter import Adapter
from advisor.export.architecture import ModelPlan, row_order
from advisor.export.encode import Type, encode_rows
from advisor.export.merged import Layout


def write_lora(path: Path, adapter: Adapter, plan: ModelPlan) -> None:
    """Write the low-rank pairs with each module's scale folded into B.

    An alpha of zero tells llama.cpp to multiply by one, so that rank and alpha patterns and rsLoRA stay
    exact.

    Args:
        path: The file to write.
        adapter: Low-rank changes only, as `check_lora` finds.
        plan: Of the base, with its output layer.

    Raises:
        ExportError: a weight is not finite, or one half of a pair is missing.
    """
    planned = {tensor.origin: tensor for tensor in plan.tensors}
    writer = gguf.GGUFWriter(path, plan.architecture.gguf)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for module, delta in adapter.deltas.items():
            tensor = planned[f"{module}.weight"]
            if delta.a is None or delta.b is None:
                raise ExportError(f"The adapter lacks one half of {module}.", "Save the adapter again.")
            scaled = (delta.b * np.float32(delta.scale)).astype(np.float32)
            if tensor.heads:
                scaled = scaled[row_order(scaled.shape[0], tensor.heads)]
            for half, values in (("lora_a", delta.a), ("lora_b", scaled)):
                rows = encode_rows(f"{module}.{half}", values, Type.F32)
                writer.add_tensor(f"{tensor.name}.{half}", rows, raw_dtype=Type.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_lora(adapter: Adapter, layout: Layout, *, tied: bool) -> None:
    """Refuse what llama.cpp would ignore, scale differently or abort on.

    Args:
        adapter: As peft saved it.
        layout: Of its base.
        tied: The base shares embedding and output layer.

    Raises:
        ExportError: the adapter holds more than low-rank changes of linear layers.
    """
    reasons = []
    if adapter.scales or adapter.tokens or adapter.prompt is not None or adapter.prefix is not None:
        reasons.append("it holds more than low-rank changes")
    if adapter.saved:
        reasons.append(
            f"it replaces {', '.join(sorted(adapter.saved)[:3])}, which llama.cpp ignores in an adapter"
        )
    if any(delta.magnitude is not None for delta in adapter.deltas.values()):
        reasons.append("DoRA is no sum of low-rank products")
    if any(delta.b_bias is not None for delta in adapter.deltas.values()):
        reasons.append("it trains biases")
    ends = {f"{module}.weight" for module in adapter.deltas} & {layout.embedding, layout.head}
    if layout.embedding in ends or (tied and ends):
        reasons.append("it changes the embedding or a shared output layer, on which llama.cpp aborts")
    if reasons:
        raise ExportError(
            f"This adapter cannot be a LoRA-GGUF: {'; '.join(reasons)}.", "Merge it instead: --to gguf"
        )
