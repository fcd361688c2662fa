"""What does it cost that an adapter was trained on four-bit weights and is merged into unquantised ones?

Goes in: the trained model with its recipe, token ids of rows. Comes out: the loss as training saw it. Never
does: export those weights; judge: a difference of this kind is no fault of a file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from peft import PeftModel

from advisor.errors import ModelError
from advisor.export.source import Trained
from advisor.storage import read_record
from advisor.types import Check, Recipe

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def four_bit_recipe(trained: Trained) -> Recipe | None:
    """Return the recipe of a model whose adapter was trained on a base in four bits."""
    if trained.recipe is None or trained.adapter is None:
        return None
    recipe = read_record(Path(trained.recipe), Recipe)
    return recipe if recipe.tuner == "qlora" else None


def losses_as_trained(trained: Trained, recipe: Recipe, sequences: Sequence[list[int]]) -> list[float]:
    """Load the base in four bits as the recipe says, its adapter on it, and return each text's loss in nats.

    Args:
        trained: Base and adapter.
        recipe: Of its training.
        sequences: Token ids.

    Raises:
        ModelError: bitsandbytes cannot load it here.
    """
    precision = str(recipe.settings["precision"])
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=recipe.settings["double_quant"],
        bnb_4bit_compute_dtype=_DTYPES[precision],
    )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            trained.base,
            dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
            quantization_config=quantisation,
            device_map=0 if torch.cuda.is_available() else None,
            local_files_only=True,
        )
        with warnings.catch_warnings():
            # peft asks transformers for names that it renames: nothing that a person can act on.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, trained.adapter).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as problem:
        raise ModelError(
            f"The base cannot be loaded in four bits to compare with: {problem}",
            "Install bitsandbytes, or leave the comparison out: export --no-verify",
        ) from problem
    found = []
    with torch.inference_mode():
        for ids in sequences:
            given = torch.tensor([ids], device=model.device)
            logits = model(given).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits, given[0, 1:])))
    return found


def loss(logits: npt.NDArray[np.float32], ids: list[int]) -> float:
    """Return the mean loss of a text in nats, given its logits (tokens, vocabulary)."""
    given = torch.from_numpy(logits[:-1])
    return float(torch.nn.functional.cross_entropy(given, torch.tensor(ids[1:])))


def check(
    as_trained: Sequence[float], merged: Sequence[float], sequences: Sequence[list[int]], *, rows: bool
) -> Check:
    """Say what the difference is; it has no bound.

    Args:
        as_trained: Loss of each text with the base in four bits.
        merged: With the unquantised base, whose weights are exported.
        sequences: Token ids of the same.
        rows: Whether they are the person's own rows.
    """
    counts = np.array([len(ids) - 1 for ids in sequences])
    before, after = (float(np.average(values, weights=counts)) for values in (as_trained, merged))
    what = f"{len(sequences)} {'rows' if rows else 'sample texts'}, {counts.sum()} tokens"
    told = (
        f"loss {before:.4f} with the base in four bits as trained, {after:.4f} merged into the unquantised "
        f"weights that are exported ({after - before:+.4f}; {what})"
    )
    return Check(
        name="four_bit_base", passed=math.isfinite(before) and math.isfinite(after), evidence=told,
        measured={"loss_as_trained": before, "loss_merged": after, "tokens": int(counts.sum())}, bound={},
    )  # fmt: skip
