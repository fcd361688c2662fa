"""What spreads one training over several devices: files for accelerate and DeepSpeed, for a queue or a cloud.

Goes in: a plan with its recipes. Comes out: file name -> content, for the run folder. Never does: start
anything; ask for more than one machine.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import yaml

from advisor.types import Plan, Recipe, RecipeParallel

ACCELERATE, DEEPSPEED = "accelerate.yaml", "deepspeed.json"
SLURM, SKY = "launch/slurm.sh", "launch/sky.yaml"
SPARE_TIME = 1.5
"""A queue ends what takes longer than was asked for, so more than the highest estimate is asked for."""
SAVE_SECONDS = 300
"""So long before its end a queue tells a training to save."""
DISTRIBUTED = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero3": "DEEPSPEED"}
MIXED = {"bf16": "bf16", "fp16": "fp16"}


def device_files(plan: Plan, recipes: tuple[Recipe, ...]) -> dict[str, bytes]:
    """Return the files of a plan for several devices; none for one device."""
    found = [recipe for recipe in recipes if recipe.parallel is not None]
    if not found:
        return {}
    first = found[0]
    assert first.parallel is not None
    files: dict[str, Any] = {ACCELERATE: accelerate_config(first, first.parallel)}
    if first.parallel.kind != "ddp":
        # Beside FSDP too: with it, `kind: zero3` in the recipe is all that has to be changed.
        files[DEEPSPEED] = deepspeed_config(first)
    written = {name: _text(name, value) for name, value in files.items()}
    return {**written, SLURM: _slurm(plan, first.parallel), SKY: _sky(plan, first.parallel)}


def accelerate_config(recipe: Recipe, parallel: RecipeParallel) -> dict[str, Any]:
    """Return what `accelerate launch --config_file` reads; the programs read the same file."""
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU" if parallel.device == "cpu" else DISTRIBUTED[parallel.kind],
        "mixed_precision": MIXED.get(str(recipe.settings.get("precision")), "no"),
        "num_machines": 1,
        "num_processes": parallel.processes,
        "machine_rank": 0,
        "use_cpu": parallel.device == "cpu",
    }
    if parallel.kind == "fsdp":
        config["fsdp_config"] = _fsdp(recipe)
    if parallel.kind == "zero3":
        config["deepspeed_config"] = {"deepspeed_config_file": DEEPSPEED, "zero3_init_flag": True}
    return config


def _fsdp(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.settings
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": bool(settings.get("cpu_offload", False)),
        "fsdp_cpu_offload": bool(settings.get("cpu_offload", False)),
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_activation_checkpointing": bool(settings.get("gradient_checkpointing", False)),
        # Whole weights: a checkpoint then goes on with another number of devices.
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration; what the trainer knows is left to it as `auto`."""
    place = {"device": "cpu", "pin_memory": True}
    offload = (
        {"offload_optimizer": place, "offload_param": place} if recipe.settings.get("cpu_offload") else {}
    )
    return {
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True, **offload,
        },
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip


def _text(name: str, value: Any) -> bytes:
    if name.endswith(".json"):
        return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    return yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False).encode()


def _seconds(plan: Plan) -> int:
    return math.ceil(sum(stage.estimate.seconds.high for stage in plan.stages) * SPARE_TIME) + SAVE_SECONDS


def _name(plan: Plan) -> str:
    model = plan.model.id.rsplit("/", 1)[-1] if plan.model else "model"
    return re.sub(r"[^A-Za-z0-9-]+", "-", f"ft-{model}-{plan.method}").lower()


def _slurm(plan: Plan, parallel: RecipeParallel) -> bytes:
    """Return a batch script for one node; --resume also begins, so that a requeued job goes on."""
    minutes = math.ceil(_seconds(plan) / 60)
    hardware = plan.hardware
    cores = max(1, (hardware.cpu_cores if hardware else parallel.processes) // parallel.processes)
    lines = [
        "#!/bin/bash",
        "# Written for this plan, never started by ftadvisor: sbatch launch/slurm.sh, in the run folder.",
        "# The queue's own names (partition, account) are yours to add.",
        f"#SBATCH --job-name={_name(plan)}",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        f"#SBATCH --gpus-per-node={parallel.processes}",
        f"#SBATCH --cpus-per-task={cores * parallel.processes}",
        f"#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00",
        f"#SBATCH --signal=TERM@{SAVE_SECONDS}",
        "#SBATCH --requeue",
        "#SBATCH --output=slurm-%j.log",
        "set -eu",
        'cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"',
        "srun ftadvisor run . --resume",
    ]
    return ("\n".join(lines) + "\n").encode()


def _sky(plan: Plan, parallel: RecipeParallel) -> bytes:
    """Return a SkyPilot task for one machine that brings the run folder along."""
    cards = plan.hardware.accelerators if plan.hardware else ()
    model = re.match(r"(?:RTX )?[A-Za-z0-9-]+", cards[0].name) if cards else None
    name = model.group().replace(" ", "") if model else "GPU"
    task = {
        "name": _name(plan),
        "resources": {
            "accelerators": f"{name}:{parallel.processes}",
            "disk_size": max(100, math.ceil(2 * sum(s.estimate.disk_bytes for s in plan.stages) / 2**30)),
        },
        "workdir": ".",
        "setup": "pip install 'ftadvisor[all]'",
        "run": "ftadvisor run . --resume",
    }
    head = (
        "# Written for this plan, never started by ftadvisor: sky launch launch/sky.yaml\n"
        f"# Planned for {cards[0].name if cards else 'accelerators'}; `sky show-gpus` lists the exact name.\n"
    )
    return head.encode() + yaml.dump(task, Dumper=yaml.CSafeDumper, sort_keys=False).encode()
