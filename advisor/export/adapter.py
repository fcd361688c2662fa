"""Reads what a trained adapter changes: low-rank pairs, scales, replaced parameters, virtual tokens.

Goes in: an adapter folder as peft saves it. Comes out: `Adapter`. Never does: skip a tensor of the adapter;
approximate.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from advisor.errors import ExportError, ModelError
from advisor.export.changes import Delta, NewRows, Scale
from advisor.export.checkpoint import Floats, open_checkpoint, read_json
from advisor.prefix_state import Prefix

_PREFIX = "base_model.model."
_EVERYTHING = slice(None)
_MERGE_REMEDY = "Merge it with peft (merge_and_unload), save the model and export that folder."
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "init_lora_weights", "fan_in_fan_out", "ensure_weight_tying",
}  # fmt: skip
"""Also what is read elsewhere; weights are merged as (out, in), so that `fan_in_fan_out` changes nothing."""
_KINDS = {
    "LORA": {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "trainable_token_indices"},
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "LN_TUNING": set[str](),
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
    "PROMPT_TUNING": set[str](),
    "P_TUNING": set[str](),
    "PREFIX_TUNING": {"prefix_projection", "init_weights"},
}
"""peft's name -> fields of adapter_config.json that are understood."""
_PROMPT = {
    "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
}  # fmt: skip
"""How virtual tokens were trained; only what came of them is left."""
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_PREFIX_TUNING = "PREFIX_TUNING"
_REFUSED = {
    "BOTTLENECK": "its extra layers stay in the way of every answer, and llama.cpp has no place for them",
}
_CHANGED_BASE = {"pissa", "olora", "corda", "loftq", "lora_ga"}
"""Initialisations that subtract from the base weights: the adapter alone is not the difference."""
_PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "b_bias", "lora_embedding_A": "a",
    "lora_embedding_B": "b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """All that a trained adapter changes; names are those of the base."""

    deltas: dict[str, Delta]
    """Module -> its low-rank change."""
    scales: dict[str, Scale] = dataclasses.field(default_factory=dict)
    tokens: dict[str, NewRows] = dataclasses.field(default_factory=dict)
    saved: dict[str, Floats] = dataclasses.field(default_factory=dict)
    """Parameter -> its trained values, which replace the base's."""
    prompt: Floats | None = None
    """Embeddings of virtual tokens before every text, (tokens, width)."""
    prefix: Prefix | None = None
    """Keys and values of virtual tokens in every layer, in transformers' order of rows."""
    ties_weights: bool = False
    """Embedding and output layer stay shared, whatever was trained."""


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter that peft saved.

    Raises:
        ModelError: it is incomplete.
        ExportError: its kind cannot be merged exactly here; the reason is given.
    """
    config = read_json(folder / "adapter_config.json")
    _check_kind(config)
    stored = open_checkpoint(folder, stem="adapter_model")
    deltas, scales = dict[str, Delta](), dict[str, Scale]()
    tokens, saved = dict[str, NewRows](), dict[str, Floats]()
    prompt: Floats | None = None
    prefix: Prefix | None = None
    for key in stored.tensors:
        name = key.removeprefix(_PREFIX)
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        trained = next((p for p in _TOKENS if name.endswith(f".{p}")), None)
        values = stored.rows(key, _EVERYTHING)
        if part is not None:
            delta = deltas.setdefault(name[: -len(part) - 1], Delta(scale=0.0))
            setattr(delta, _PARTS[part], values)
            delta.embedding = delta.embedding or part.startswith("lora_embedding")
        elif trained is not None:
            module = name[: -len(trained) - 1]
            tokens[module] = NewRows(indices=_token_indices(config, module, values), values=values)
        elif name.endswith(".ia3_l"):
            scales[name.removesuffix(".ia3_l")] = Scale(
                values=values.reshape(-1), incoming=values.shape[0] == 1
            )
        elif key == "prompt_embeddings" and config["peft_type"] == _PREFIX_TUNING:
            prefix = _prefix(config, values)
        elif key == "prompt_embeddings":
            prompt = values
        elif "lora_" in name or not key.startswith(_PREFIX):
            raise ExportError(f"The adapter holds {key}, which cannot be merged exactly here.", _MERGE_REMEDY)
        else:
            for wrapper in (".base_layer.", ".modules_to_save.", ".ln_tuning_layers."):
                name = name.replace(wrapper, ".")
            saved[name] = values
    for module, delta in deltas.items():
        delta.scale = _scale(config, module, rank=0 if delta.a is None else delta.a.shape[0])
    found = Adapter(
        deltas=deltas, scales=scales, tokens=tokens, saved=saved, prompt=prompt, prefix=prefix,
        ties_weights=bool(config.get("ensure_weight_tying")),
    )  # fmt: skip
    _check_not_empty(found, config, folder)
    return found


def virtual_tokens(folder: Path | None) -> int:
    """Return how many virtual tokens an adapter puts before every text."""
    config = {} if folder is None else read_json(folder / "adapter_config.json")
    return int(config["num_virtual_tokens"]) if config.get("peft_type") in _PROMPTS else 0


def check_merges(folder: Path) -> None:
    """Check that peft itself can merge an adapter, for a base whose architecture is not known here.

    Raises:
        ExportError: it is of a kind that stays beside its base; the reason is given.
    """
    kind = read_json(folder / "adapter_config.json").get("peft_type", "(none)")
    virtual = "virtual tokens have a place only in architectures that are written here"
    reason = virtual if kind in (*_PROMPTS, _PREFIX_TUNING) else _REFUSED.get(kind)
    if reason is not None:
        raise ExportError(
            f"An adapter of type {kind} cannot be merged: {reason}.",
            "Train with lora instead where a GGUF is wanted: ftadvisor plan --method lora",
        )


def grown_config(config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return config.json of the model whose vocabulary holds so many virtual tokens more."""
    return {**config, "vocab_size": config["vocab_size"] + count} if count else config


def _check_not_empty(found: Adapter, config: dict[str, Any], folder: Path) -> None:
    if found.prompt is None and config["peft_type"] in _PROMPTS:
        raise ModelError(f"{folder} holds no embeddings of virtual tokens.", "Save the adapter again.")
    virtual = found.prompt is not None or found.prefix is not None
    if not (found.deltas or found.scales or found.tokens or found.saved or virtual):
        raise ModelError(f"The adapter in {folder} holds no weights.", "Save the adapter again.")


def _prefix(config: dict[str, Any], values: Floats) -> Prefix:
    """Return what peft keeps as (tokens, layers x key and value x width).

    Raises:
        ModelError: the numbers are not as many as the configuration says.
    """
    layers, width, tokens = config["num_layers"], config["token_dim"], config["num_virtual_tokens"]
    if values.shape != (tokens, 2 * layers * width):
        raise ModelError(
            f"The adapter holds a prefix of shape {values.shape}, its configuration one of "
            f"{(tokens, 2 * layers * width)}.",
            "Save the adapter again.",
        )
    pairs = values.reshape(tokens, layers, 2, width).transpose(2, 1, 0, 3)
    return Prefix(keys=pairs[0], values=pairs[1])


def _token_indices(config: dict[str, Any], module: str, values: Floats) -> Any:
    """Return which rows of an embedding were trained."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or []
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if module.endswith(name)), [])
    if len(given) != len(values):
        raise ModelError(
            f"The adapter has {len(values)} trained tokens of {module}, its configuration {len(given)}.",
            "Save the adapter again.",
        )
    return np.array(given, dtype=np.intp)


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("peft_type", "(none)")
    if kind in _REFUSED:
        raise ExportError(
            f"An adapter of type {kind} cannot be merged: {_REFUSED[kind]}.",
            "Train with lora instead where a GGUF is wanted: ftadvisor plan --method lora",
        )
    if kind not in _KINDS:
        raise ExportError(
            f"An adapter of type {kind} cannot be merged here; {', '.join(_KINDS)} can.", _MERGE_REMEDY
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if any(start.startswith(name) for name in _CHANGED_BASE):
        raise ExportError(
            f"The adapter was started with init_lora_weights={start!r}, which also changed the base weights.",
            "Save it with peft's path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
        )
    known = _WITHOUT_EFFECT | _KINDS[kind] | (_PROMPT if kind in (*_PROMPTS, _PREFIX_TUNING) else set())
    neutral = {key for key, value in config.items() if value in (None, False, [], {})}
    unknown = sorted(set(config) - known - neutral)
    if unknown:
        raise ExportError(
            f"adapter_config.json uses {', '.join(unknown)}, whose effect is not known here.", _MERGE_REMEDY
        )


def _scale(config: dict[str, Any], module: str, *, rank: int) -> float:
    """Return what the low-rank product is multiplied by: alpha / rank, for rsLoRA alpha / sqrt(rank)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank) if rank else 0.0
