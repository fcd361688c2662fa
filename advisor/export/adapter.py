"""Applies a LoRA adapter to the rows of its unquantised base, exactly: float32, W + scale * B @ A.

Goes in: an adapter folder as peft saves it. Comes out: the merged rows of any parameter. Never does: skip a
tensor of the adapter; approximate; use quantised base weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from advisor.errors import ExportError, ModelError
from advisor.export.architecture import EMBEDDING, HEAD
from advisor.export.checkpoint import Checkpoint, Floats, Rows, open_checkpoint, read_json

_PREFIX = "base_model.model."
_EVERYTHING = slice(None)
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "init_lora_weights",
}  # fmt: skip
_READ = {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"}
_CHANGED_BASE = {"pissa", "olora", "corda", "loftq", "lora_ga"}
"""Initialisations that subtract from the base weights: the adapter alone is not the difference."""
_PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "b_bias", "lora_embedding_A": "a",
    "lora_embedding_B": "b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Delta:
    """The low-rank change of one module; shapes as in peft."""

    scale: float
    embedding: bool = False
    a: Floats | None = None
    """(rank, columns), for an embedding (rank, rows)."""
    b: Floats | None = None
    """(rows, rank), for an embedding (columns, rank)."""
    b_bias: Floats | None = None
    magnitude: Floats | None = None
    """DoRA: the length of each row."""

    def rows(self, weight: Floats, rows: Rows) -> Floats:
        """Return the merged rows, given the base's."""
        if self.a is None or self.b is None:
            raise ModelError("The adapter lacks one half of a low-rank pair.", "Save the adapter again.")
        change = self.a.T[rows] @ self.b.T if self.embedding else self.b[rows] @ self.a
        merged = weight + np.float32(self.scale) * change
        if self.magnitude is None:
            return merged
        length = np.linalg.norm(merged, axis=1)
        return np.asarray((self.magnitude[rows] / length)[:, None] * merged, dtype=np.float32)


class Adapter:
    """All that a trained adapter changes."""

    def __init__(self, *, deltas: dict[str, Delta], saved: dict[str, Floats], ties_weights: bool) -> None:
        self.deltas = deltas
        """Module -> its low-rank change."""
        self.saved = saved
        """Parameter -> its trained values, which replace the base's."""
        self.ties_weights = ties_weights

    @property
    def unties(self) -> bool:
        """Whether embedding and output layer differ afterwards, where the base shares them."""
        touched = {EMBEDDING, HEAD}
        changed = {f"{module}.weight" for module in self.deltas} | set(self.saved)
        return bool(touched & changed)


class Merged:
    """The trained parameters: base and adapter, or a base alone."""

    def __init__(self, base: Checkpoint, adapter: Adapter | None, *, tied: bool) -> None:
        self._base = base
        self._adapter = adapter
        self._tied = tied
        self.own_head = not tied or (adapter is not None and adapter.unties)
        if adapter is not None:
            if tied and adapter.unties and adapter.ties_weights:
                raise ExportError(
                    "The adapter changes the shared embedding with ensure_weight_tying; not merged here.",
                    "Merge it with peft (merge_and_unload), save the model and export that folder.",
                )
            self._check(adapter)

    def names(self) -> set[str]:
        """Return every parameter that must find a place in the file."""
        added = set[str]() if self._adapter is None else set(self._adapter.saved)
        return set(self._base.tensors) | added

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, or an empty one where there is none."""
        if self._adapter is not None and name in self._adapter.saved:
            return self._adapter.saved[name].shape
        stored = self._base.tensors.get(self._source(name))
        return stored.shape if stored else ()

    def rows(self, name: str, rows: Rows = _EVERYTHING) -> Floats:
        """Return rows of a trained parameter in float32."""
        adapter = self._adapter
        if adapter is None:
            return self._base.rows(self._source(name), rows)
        if name in adapter.saved:
            weight = adapter.saved[name][rows]
        else:
            weight = self._base.rows(self._source(name), rows)
        module, _, kind = name.rpartition(".")
        delta = adapter.deltas.get(module)
        if delta is None:
            return weight
        if kind == "bias":
            bias = delta.b_bias
            return weight if bias is None else weight + np.float32(delta.scale) * bias[rows]
        return delta.rows(weight, rows)

    def _source(self, name: str) -> str:
        """The output layer of a tied model starts from the embedding."""
        return EMBEDDING if name == HEAD and self._tied else name

    def _check(self, adapter: Adapter) -> None:
        for module, delta in adapter.deltas.items():
            shape = self.shape(f"{module}.weight")
            if delta.a is None or delta.b is None or not shape:
                raise ModelError(
                    f"The adapter changes {module}, which the base lacks (or only half of it is saved).",
                    "Name the base model that the adapter was trained on.",
                )
            rows, columns = delta.b.shape[0], delta.a.shape[1]
            given = (columns, rows) if delta.embedding else (rows, columns)
            if given != shape:
                raise ModelError(
                    f"The adapter changes {module} as {given}, but the base has {shape}: "
                    "it belongs to another base.",
                    "Name the base model that the adapter was trained on.",
                )
            if delta.b_bias is not None and not self.shape(f"{module}.bias"):
                raise ExportError(
                    f"The adapter trains a bias of {module}, which the base lacks.",
                    "Train without lora_bias, or on a base with biases.",
                )
        for name, values in adapter.saved.items():
            source = self._base.tensors.get(self._source(name))
            if source is not None and source.shape != values.shape:
                raise ExportError(
                    f"The adapter replaces {name} of shape {source.shape} by {values.shape}.",
                    "Merge it with peft and save the model with its new config.json, then export that.",
                )


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter that peft saved.

    Raises:
        ModelError: it is incomplete.
        ExportError: its kind cannot be merged exactly here; the reason is given.
    """
    config = read_json(folder / "adapter_config.json")
    _check_kind(config)
    stored = open_checkpoint(folder, stem="adapter_model")
    deltas: dict[str, Delta] = {}
    saved: dict[str, Floats] = {}
    for key in stored.tensors:
        name = key.removeprefix(_PREFIX)
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        if part is not None:
            module = name[: -len(part) - 1]
            delta = deltas.setdefault(module, Delta(scale=0.0))
            setattr(delta, _PARTS[part], stored.rows(key, _EVERYTHING))
            delta.embedding = delta.embedding or part.startswith("lora_embedding")
        elif "lora_" in name or "token_adapter" in name or not key.startswith(_PREFIX):
            raise ExportError(
                f"The adapter holds {key}, which cannot be merged exactly here.",
                "Merge it with peft (merge_and_unload), save the model and export that folder.",
            )
        else:
            saved[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = stored.rows(
                key, _EVERYTHING
            )
    for module, delta in deltas.items():
        delta.scale = _scale(config, module, rank=0 if delta.a is None else delta.a.shape[0])
    return Adapter(deltas=deltas, saved=saved, ties_weights=bool(config.get("ensure_weight_tying")))


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("peft_type", "(none)")
    remedy = "Merge it with peft (merge_and_unload), save the model and export that folder."
    if kind != "LORA":
        raise ExportError(f"An adapter of type {kind} cannot be merged here; LORA can.", remedy)
    start = str(config.get("init_lora_weights", True)).lower()
    if any(start.startswith(name) for name in _CHANGED_BASE):
        raise ExportError(
            f"The adapter was started with init_lora_weights={start!r}, which also changed the base weights.",
            "Save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
        )
    neutral = {key for key, value in config.items() if value in (None, False, [], {})}
    unknown = sorted(set(config) - _WITHOUT_EFFECT - _READ - neutral)
    if unknown:
        raise ExportError(
            f"adapter_config.json uses {', '.join(unknown)}, whose effect is not known here.", remedy
        )
    if config.get("fan_in_fan_out"):
        raise ExportError(
            "The adapter is stored transposed (fan_in_fan_out), which is not merged here.", remedy
        )


def _scale(config: dict[str, Any], module: str, *, rank: int) -> float:
    """Return what the low-rank product is multiplied by: alpha / rank, for rsLoRA alpha / sqrt(rank)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank) if rank else 0.0
