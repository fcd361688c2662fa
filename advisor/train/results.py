"""Writes what was trained: the adapter, or all weights in the recipe's precision, with tokenizer and
template.

Goes in: a trained model. Comes out: RUN/adapter or RUN/model, complete or not there at all. Never does:
merge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from advisor.train.model import DTYPES, model_place
from advisor.train.settings import SftSettings
from advisor.types import Recipe, Record

PARTIAL = Path(".partial")


class Saved(Record, frozen=True, kw_only=True):
    """Where the result lies."""

    name: str
    bytes: int
    heldout_loss: float | None


def save_result(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    settings: SftSettings,
    *,
    measure: Callable[[], float | None],
) -> Saved:
    """Save the result into the working folder.

    Fully tuned weights are converted to the recipe's precision first, so that `measure` sees what is saved.

    Args:
        trainer: the trainer that trained.
        tokenizer: saved beside the weights.
        recipe: names the base in the adapter's configuration.
        settings: of the recipe.
        measure: returns the held-out loss.
    """
    full = recipe.tuner == "full"
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True
    if full:
        model.to(DTYPES[settings.precision])
    loss = measure()
    shutil.rmtree(PARTIAL, ignore_errors=True)
    if full:
        model.save_pretrained(PARTIAL)
    else:
        for config in model.peft_config.values():
            config.base_model_name_or_path = model_place(recipe.model)
            config.revision = recipe.model.revision
        model.save_pretrained(PARTIAL, save_embedding_layers=False)
    tokenizer.save_pretrained(PARTIAL)
    size = sum(path.stat().st_size for path in PARTIAL.rglob("*") if path.is_file())
    return Saved(name=_publish("model" if full else "adapter"), bytes=size, heldout_loss=loss)


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
