"""Makes small run folders for tests: a tiny model, a few rows, a recipe; and runs them in this process.

Goes in: a folder and what differs. Comes out: a folder that `run_plan` accepts. Never does: import torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advisor.resources import recipes_dir
from advisor.run.devices import ACCELERATE, DEEPSPEED, accelerate_config, deepspeed_config
from advisor.run.events import read_events
from advisor.run.stages import REPORT, read_jobs
from advisor.run.supervisor import report_of, run_plan
from advisor.storage import encode_yaml, read_record, write_atomic, write_json
from advisor.types import (
    Objective,
    Recipe,
    RecipeDataset,
    RecipeModel,
    RecipeParallel,
    RunReport,
    Value,
)

COLOURS = ("red", "blue", "green", "white", "black", "brown")
THINGS = ("door", "boat", "cup", "hill", "lamp", "coat", "bread")
WEIGHT_BITS = {"lora": 16, "qlora": 4}
SETTINGS: dict[str, Value] = {
    "learning_rate": 5e-3, "epochs": 1.0, "max_steps": 10, "micro_batch": 4, "effective_batch": 8,
    "max_seq_len": 128,
    "warmup_ratio": 0.1, "scheduler": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0,
    "optimizer": "adamw_torch", "precision": "fp32", "double_quant": True, "gradient_checkpointing": False,
    "packing": False, "attention": "sdpa", "loss": "full_logits", "loss_on": "assistant",
    "heldout_fraction": 0.1, "evaluate": False, "save_every_steps": 4, "keep_checkpoints": 2,
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
    folder: Path, *, tuner: str, model: Path, data: Path, kind: str = "instruction",
    objective: Objective = "sft", after: str | None = None, parallel: RecipeParallel | None = None,
    **settings: Value,
) -> Path:  # fmt: skip
    """Write a run folder with a recipe for the tiny model, and what several processes need."""
    folder.mkdir(parents=True, exist_ok=True)
    low_rank = LORA if tuner in WEIGHT_BITS else {}
    chosen = {**SETTINGS, **low_rank, "weight_bits": WEIGHT_BITS.get(tuner, 32), **settings}
    if objective != "sft":
        del chosen["loss_on"]
    recipe = Recipe(
        program=objective,
        objective=objective,
        tuner=tuner,
        model=RecipeModel(id="tiny", path=str(model), after=after),
        datasets=(RecipeDataset(name="data", path=str(data), kind=kind),),  # type: ignore[arg-type]
        settings=chosen,
        seed=7,
        parallel=parallel,
    )
    write_atomic(folder / "recipe.yaml", encode_yaml(recipe))
    if parallel is not None:
        write_atomic(folder / ACCELERATE, encode_yaml(accelerate_config(recipe, parallel)))
    if parallel is not None and parallel.kind == "zero3":
        write_json(folder / DEEPSPEED, deepspeed_config(recipe))
    return folder


def run(
    folder: Path, *, resume: bool = False, on_event: Callable[[dict[str, Any]], None] = lambda _: None
) -> RunReport:
    """Train a run folder through the supervisor, without network."""
    return run_plan(folder, resume=resume, on_event=on_event, offline=True)


def run_here(folder: Path) -> int:
    """Train a run folder in this process, which has the libraries loaded already; return the exit status.

    The program is the shipped one; what the supervisor adds (locks, other processes) is left out.
    """
    from advisor.train.session import run_program

    recipe = read_record(folder / "recipe.yaml", Recipe)
    script = recipes_dir() / recipe.program / "train.py"
    spec = importlib.util.spec_from_file_location(f"program_{recipe.program}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    try:
        with contextlib.chdir(folder):
            return run_program(module.train, Path("recipe.yaml"))
    finally:
        sys.excepthook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def report_here(folder: Path) -> RunReport:
    """Write the report of a run of `run_here`, as the supervisor does."""
    made = report_of(read_jobs(folder)[-1], status="done", error=None)
    write_json(folder / REPORT, made)
    return made


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the events of one name of a run."""
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == name]
