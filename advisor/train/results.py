"""Writes what was trained: the adapter, or all weights in the recipe's precision, with tokenizer and
template.

Goes in: a trained model. Comes out: RUN/adapter or RUN/model, complete or not there at all. Never does:
merge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from advisor.train import bottleneck
from advisor.train.model import DTYPES, model_place
from advisor.train.parallel import gathered, is_first
from advisor.train.settings import SUBSPACE, Settings
from advisor.train.tuners import INITIAL
from advisor.types import Recipe, Record

PARTIAL = Path(".partial")
WHOLE = ("full", "bitfit", SUBSPACE)
"""Tuners whose result is a whole model: all weights moved, biases that belong to it, or a change as large as
the model."""


class Saved(Record, frozen=True, kw_only=True):
    """Where the result lies."""

    name: str
    bytes: int
    measured: dict[str, Any]
    """On rows that were not trained on, with the weights as saved."""


def save_result(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    settings: Settings,
    *,
    measure: Callable[[], dict[str, Any]],
    beside: Mapping[str, bytes],
) -> Saved:
    """Save the result into the working folder.

    Fully tuned weights are converted to the recipe's precision first, so that `measure` sees what is saved;
    those of a sharded model are converted as they are gathered. All processes must call this.

    Args:
        trainer: the trainer that trained.
        tokenizer: saved beside the weights.
        recipe: names the base in the adapter's configuration.
        settings: of the recipe.
        measure: returns the held-out figures.
        beside: files to save with the weights, by name.
    """
    whole = recipe.tuner in WHOLE
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True
    if recipe.tuner == SUBSPACE:
        model = model.merge_and_unload()
    state = gathered(trainer)
    if whole and state is None:
        model.to(DTYPES[settings.precision])
    measured = measure()
    kind = "model" if whole else "adapter"
    if not is_first():
        return Saved(name=kind, bytes=0, measured=measured)
    shutil.rmtree(PARTIAL, ignore_errors=True)
    if whole:
        model.save_pretrained(PARTIAL, state_dict=_converted(model, state, DTYPES[settings.precision]))
    elif recipe.tuner == "adapter":
        _save_bottleneck(model, recipe)
    else:
        _save_adapter(model, recipe, state)
    tokenizer.save_pretrained(PARTIAL)
    for name, content in beside.items():
        (PARTIAL / name).write_bytes(content)
    size = sum(path.stat().st_size for path in PARTIAL.rglob("*") if path.is_file())
    return Saved(name=_publish(kind), bytes=size, measured=measured)


def _converted(model: Any, state: dict[str, Any] | None, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return the weights of a sharded model as they are saved: what is shared is gathered twice, and goes
    once."""
    shared = model.all_tied_weights_keys
    return state and {name: value.to(dtype) for name, value in state.items() if name not in shared}


def _save_adapter(model: Any, recipe: Recipe, state: dict[str, Any] | None) -> None:
    """Save the trained adapter in PEFT's format; one that changed the base weights becomes a plain LoRA on
    the unchanged base."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = model_place(recipe.model)
    config.revision = recipe.model.revision
    changed_base = INITIAL.is_dir()
    model.save_pretrained(
        PARTIAL,
        state_dict=state,
        save_embedding_layers=False,
        selected_adapters=["default"],
        path_initial_model_for_weight_conversion=str(INITIAL) if changed_base else None,
    )
    if changed_base:
        shutil.rmtree(INITIAL)


def _save_bottleneck(model: Any, recipe: Recipe) -> None:
    config = msgspec.structs.replace(
        bottleneck.shape_of(model),
        base_model_name_or_path=model_place(recipe.model),
        revision=recipe.model.revision,
    )
    bottleneck.save(model, PARTIAL, config)


def _publish(name: str) -> str:
    """Sync the finished folder and give it its name."""
    for path in PARTIAL.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    shutil.rmtree(name, ignore_errors=True)
    PARTIAL.rename(name)
    return name
