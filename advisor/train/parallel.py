"""Several processes on one training: who speaks, how they agree, and what really runs.

Goes in: the `parallel` of a recipe, the environment that the supervisor sets (RANK, WORLD_SIZE),
accelerate.yaml beside the recipe. Comes out: arguments of the trainer, agreement between the processes, what
each of them holds. Never does: start a process; go on where something else runs than was planned (the
libraries fall back to one process, or from FSDP to DDP, without a word)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from advisor.errors import RefusedError, TrainingError
from advisor.storage import read_yaml
from advisor.types import Recipe, Record

ACCELERATE, DEEPSPEED = Path("accelerate.yaml"), Path("deepspeed.json")


class Running(Record, frozen=True, kw_only=True):
    """How a training is really spread."""

    kind: str
    """none, ddp, fsdp or zero3."""
    processes: int
    wrapped: str
    """Class of what the trainer calls."""
    parameters: int
    held_here: int
    """Parameters that lie in this process."""


def rank() -> int:
    """Return the number of this process; 0 speaks for all."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Tell whether this process writes what there is to be written once."""
    return rank() == 0


def processes(recipe: Recipe) -> int:
    """Return how many processes the recipe wants."""
    return recipe.parallel.processes if recipe.parallel else 1


def is_sharded(recipe: Recipe) -> bool:
    """Tell whether every process holds only a part of the weights."""
    return recipe.parallel is not None and recipe.parallel.kind in ("fsdp", "zero3")


def require_processes(recipe: Recipe) -> None:
    """Refuse to begin with other processes or fewer devices than the recipe wants.

    Raises:
        RefusedError: says how many there are.
    """
    wanted, there = processes(recipe), int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != there:
        raise RefusedError(
            f"The recipe wants {wanted} processes, and {there} were started.",
            "Start it through: ftadvisor run FOLDER",
            code="parallel_fell_back",
        )
    parallel = recipe.parallel
    if parallel is not None and parallel.device == "cuda" and torch.cuda.device_count() < wanted:
        raise RefusedError(
            f"The plan spreads the training over {wanted} accelerators ({parallel.kind}); "
            f"{torch.cuda.device_count()} can be used here.",
            "Run it where it was planned for, or plan for this machine: ftadvisor plan without --hardware",
            code="too_few_devices",
        )
    if parallel is not None and parallel.kind == "fsdp":
        # Read when weights are loaded: only the first process reads them, the others get their parts from it.
        fsdp = read_yaml(ACCELERATE)["fsdp_config"]
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(fsdp["fsdp_cpu_ram_efficient_loading"]).lower()
        PartialState(cpu=parallel.device == "cpu")


def parallel_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return what the trainer must be told; the file that accelerate reads is the one place it stands in."""
    if recipe.parallel is None:
        return {}
    if recipe.parallel.kind == "fsdp":
        # A recipe that was derived while it ran may save activations where the planned one did not.
        saves = {"fsdp_activation_checkpointing": bool(recipe.settings.get("gradient_checkpointing", False))}
        # Else each process would hold the whole gradient between micro batches.
        each = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        sharded = {"fsdp": True, "fsdp_config": {**read_yaml(ACCELERATE)["fsdp_config"], **saves}}
        return {**sharded, "accelerator_config": each}
    if recipe.parallel.kind == "zero3":
        return {"deepspeed": str(DEEPSPEED)}
    return {"ddp_find_unused_parameters": False}


def local_device() -> dict[str, int]:
    """Return the device map of a model that lies whole on this process's accelerator."""
    return {"": int(os.environ.get("LOCAL_RANK", "0"))}


def wait_for_all() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def anywhere(flag: bool) -> bool:  # noqa: FBT001 - the one thing it is about
    """Return on every process whether the flag is set on any of them."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return flag
    device = "cuda" if distributed.get_backend() != "gloo" and torch.cuda.is_available() else "cpu"
    found = torch.tensor(int(flag), device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def running(trainer: Any) -> Running:
    """Return how a trainer is spread, as its wrapped model and its parameters show; valid once it trains."""
    wrapped = trainer.model_wrapped
    held = [_held(parameter) for parameter in wrapped.parameters()]
    return Running(
        kind=_kind(wrapped, sharded=any(here < whole for whole, here in held)),
        processes=distributed.get_world_size() if distributed.is_initialized() else 1,
        wrapped=type(wrapped).__name__,
        parameters=sum(whole for whole, _ in held),
        held_here=sum(here for _, here in held),
    )


def require_planned(found: Running, recipe: Recipe) -> None:
    """Refuse to train otherwise than planned.

    Raises:
        TrainingError: fewer processes, or another kind of spreading.
    """
    wanted = recipe.parallel.kind if recipe.parallel else "none"
    if (found.kind, found.processes) == (wanted, processes(recipe)):
        return
    raise TrainingError(
        f"Planned is {wanted} on {processes(recipe)} processes; what really runs is {found.kind} on "
        f"{found.processes} ({found.wrapped}, {found.held_here:,} of {found.parameters:,} weights in each).",
        "FSDP needs accelerators; ftadvisor doctor shows which are seen. Or plan for one device.",
        code="parallel_fell_back",
    )


def gathered(trainer: Any) -> dict[str, Any] | None:
    """Return the whole weights of a sharded model (on the first process; all must ask), None of another."""
    wrapped = trainer.model_wrapped
    if _kind(wrapped, sharded=any(here < whole for whole, here in map(_held, wrapped.parameters()))) in (
        "none", "ddp",
    ):  # fmt: skip
        return None
    state: dict[str, Any] = trainer.accelerator.get_state_dict(wrapped)
    return state


def _kind(wrapped: Any, *, sharded: bool) -> str:
    if type(wrapped).__name__ == "DeepSpeedEngine":
        return f"zero{wrapped.zero_optimization_stage()}"
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    return "fsdp" if sharded else "none"


def _held(parameter: Any) -> tuple[int, int]:
    """Return how many weights a parameter has, and how many of them lie in this process."""
    if isinstance(parameter, DTensor):
        return parameter.numel(), parameter.to_local().numel()
    if "ds_tensor" in vars(parameter):  # DeepSpeed hangs its part onto a parameter that is empty itself
        return int(parameter.ds_numel), int(parameter.ds_tensor.numel())
    return parameter.numel(), parameter.numel()
