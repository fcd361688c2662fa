"""Makes small run folders for tests: a tiny model, a few rows, a recipe; and runs them in this process.

Goes in: a folder and what differs. Comes out: a folder that `run_plan` accepts. Never does: import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advisor.run.supervisor import run_plan
from advisor.storage import encode_yaml, write_atomic
from advisor.types import Recipe, RecipeDataset, RecipeModel, RunReport, Value

COLOURS = ("red", "blue", "green", "white", "black", "brown")
THINGS = ("door", "boat", "cup", "hill", "lamp", "coat", "bread")
WEIGHT_BITS = {"full": 32, "lora": 16, "qlora": 4}
SETTINGS: dict[str, Value] = {
    "learning_rate": 5e-3, "epochs": 1.0, "max_steps": 10, "micro_batch": 4, "effective_batch": 8,
    "max_seq_len": 128,
    "warmup_ratio": 0.1, "scheduler": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0,
    "optimizer": "adamw_torch", "precision": "fp32", "double_quant": True, "gradient_checkpointing": False,
    "packing": False, "attention": "sdpa", "loss": "full_logits", "loss_on": "assistant",
    "heldout_fraction": 0.1, "save_every_steps": 4, "keep_checkpoints": 2,
}  # fmt: skip
LORA: dict[str, Value] = {
    "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "use_rslora": False, "use_dora": False,
    "target": "all-linear",
}  # fmt: skip


def rows(count: int = 42) -> list[dict[str, str]]:
    """Return questions with short answers, all different."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS][:count]
    return [
        {"instruction": f"What is the {thing} like?", "output": f"The {thing} is {colour}, and it is mine."}
        for colour, thing in pairs
    ]


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def make_run(
    folder: Path, *, tuner: str, model: Path, data: Path, kind: str = "instruction", **settings: Value
) -> Path:
    """Write a run folder with a recipe for the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {**SETTINGS, **({} if tuner == "full" else LORA), "weight_bits": WEIGHT_BITS[tuner], **settings}
    recipe = Recipe(
        program="sft",
        objective="sft",
        tuner=tuner,
        model=RecipeModel(id="tiny", path=str(model)),
        datasets=(RecipeDataset(name="data", path=str(data), kind=kind),),  # type: ignore[arg-type]
        settings=chosen,
        seed=7,
    )
    write_atomic(folder / "recipe.yaml", encode_yaml(recipe))
    return folder


def run(
    folder: Path, *, resume: bool = False, on_event: Callable[[dict[str, Any]], None] = lambda _: None
) -> RunReport:
    """Train a run folder through the supervisor, without network."""
    return run_plan(folder, resume=resume, on_event=on_event, offline=True)
