"""Writes a trained prefix as the sequence state that llama.cpp begins with.

Goes in: an adapter's prefix and the plan of its base. Comes out: a file. Never does: rotate keys, which peft
puts into the cache as they are.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError, ModelError
from advisor.export.architecture import ModelPlan, row_order
from advisor.prefix_state import Prefix, write_state


def _sliding_layers(plan: ModelPlan) -> npt.NDArray[np.bool_]:
    """Return for each layer whether llama.cpp keeps it apart, because its attention slides."""
    period = plan.architecture.window_period
    key = gguf.Keys.Attention.SLIDING_WINDOW.format(arch=plan.architecture.gguf)
    slides = bool(period) and key in plan.metadata
    return np.array([slides and (number + 1) % period != 0 for number in range(plan.layers)])


def file_caches(prefix: Prefix, plan: ModelPlan) -> tuple[Prefix, ...]:
    """Return the prefix as llama.cpp's caches hold it: keys in its order of rows, sliding layers apart.

    Raises:
        ModelError: it belongs to another base.
        ExportError: it is longer than the context.
    """
    layers, tokens, width = prefix.keys.shape
    keys = gguf.Keys.Attention
    heads, head_dim = (
        int(plan.metadata[key.format(arch=plan.architecture.gguf)])
        for key in (keys.HEAD_COUNT_KV, keys.KEY_LENGTH)
    )
    if (layers, width) != (plan.layers, heads * head_dim):
        raise ModelError(
            f"The prefix is for {layers} layers of {width}, the base has {plan.layers} of "
            f"{heads * head_dim}: it belongs to another base.",
            "Name the base model that the adapter was trained on.",
        )
    if tokens >= plan.context:
        raise ExportError(
            f"The prefix of {tokens} virtual tokens fills the context of {plan.context}.",
            "Train with fewer: --set virtual_tokens=50",
        )
    turned = prefix.keys[:, :, row_order(width, heads)] if plan.architecture.permute else prefix.keys
    slides = _sliding_layers(plan)
    parts = (~slides, slides) if slides.any() else (~slides,)
    return tuple(Prefix(keys=turned[part], values=prefix.values[part]) for part in parts)


def write_prefix(path: Path, prefix: Prefix, plan: ModelPlan) -> None:
    """Write the state; errors as `file_caches`, and OSError where the disk is full."""
    write_state(path, file_caches(prefix, plan))
