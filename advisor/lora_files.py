"""Puts LoRA-GGUF adapters on a loaded model, scales and swaps them, without loading the model again.

Goes in: llama-cpp-python's model, files with their strengths. Comes out: a model that answers with them.
Never does: hand llama.cpp a file on which it would crash.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from advisor.errors import ExportError, InputError, UsageError
from advisor.probe.gguf_file import check_gguf
from advisor.running import Said


class Adapters:
    """The adapters that were read for one model."""

    def __init__(self, model: Any, said: Said) -> None:
        self._model = model
        self._said = said
        self._read: dict[Path, Any] = {}

    def use(self, scales: dict[Path, float]) -> None:
        """Put these adapters on the model, and only these.

        Args:
            scales: LoRA-GGUF -> strength; 1 is as trained. Empty: the base alone.

        Raises:
            InputError: one is no LoRA-GGUF, or belongs to another model; those before stay on.
            ExportError: llama.cpp does not take them together.
        """
        import llama_cpp

        for path in scales:
            if path not in self._read:
                self._read[path] = self._load(path)
        count = len(scales)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(self._read[p] for p in scales))
        strengths = (ctypes.c_float * count)(*scales.values())
        if llama_cpp.llama_set_adapters_lora(self._model._ctx.ctx, adapters, count, strengths):
            names = ", ".join(path.name for path in scales)
            raise ExportError(f"llama.cpp does not put {names} on the model.", "Export it merged: --to gguf")
        # What was computed with other adapters must not be taken for the same text's beginning.
        self._model.reset()

    def _load(self, lora: Path) -> Any:
        import llama_cpp

        _check_adapter(lora, self._model.metadata.get("general.architecture", ""))
        adapter = llama_cpp.llama_adapter_lora_init(self._model._model.model, str(lora).encode())
        if not adapter:
            raise InputError(
                f"llama.cpp does not take the adapter {lora}: {self._said.reason() or 'it does not fit'}",
                "Put it on the base model that it was trained on.",
            )
        return adapter


def parse_adapter(text: str) -> tuple[Path, float]:
    """Return file and strength of `FILE` or `FILE=STRENGTH`.

    Raises:
        UsageError: the strength is no number.
    """
    name, found, strength = text.rpartition("=")
    if not found or Path(text).exists():
        return Path(text), 1.0
    return Path(name), parse_strength(strength)


def parse_strength(text: str) -> float:
    """Return a strength; 1 is as trained, 0 is the base alone.

    Raises:
        UsageError: it is no number.
    """
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(f"{text!r} is no strength of an adapter.", "For example 0.5; 1 is as trained.")
    return strength


def short_names(files: Iterable[Path]) -> dict[str, Path]:
    """Return files by their names without the ending; those that share one are told apart by their folders,
    and any that are still alike by number."""
    found: dict[str, Path] = {}
    paths = list(files)
    for path in paths:
        alike = [other for other in paths if other.stem == path.stem]
        name = path.stem if len(alike) == 1 else f"{path.resolve().parent.name}/{path.stem}"
        found[name if name not in found else f"{name}-{len(found) + 1}"] = path
    return found


def _check_adapter(lora: Path, architecture: str) -> None:
    """Refuse what makes llama.cpp crash."""
    import gguf

    check_gguf(lora)
    remedy = "Make one with: ftadvisor export RUN_DIR --to lora-gguf"
    try:
        reader = gguf.GGUFReader(lora)
    except (ValueError, IndexError, KeyError) as problem:
        raise InputError(f"{lora} is cut short or damaged.", remedy) from problem
    fields = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("general", "adapter"))
    }
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise InputError(f"{lora} is a GGUF file, but no LoRA adapter.", remedy)
    if fields.get("general.architecture") != architecture:
        raise InputError(
            f"The adapter {lora} is for {fields.get('general.architecture')}, the model is {architecture}.",
            "Put it on the base model that it was trained on.",
        )
    if any(tensor.name.startswith("token_embd.") for tensor in reader.tensors):
        raise InputError(
            f"The adapter {lora} changes the embedding, on which llama.cpp aborts.", "Export it merged."
        )
