"""Plans for several devices: what lies in the run folder for them, and how their processes live and end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from advisor.errors import InputError, RefusedError
from advisor.recipe import recipes_of
from advisor.run import launch
from advisor.run.devices import ACCELERATE, DEEPSPEED, SKY, SLURM, device_files
from advisor.run.folder import create_run_folder
from advisor.run.launch import Workers
from advisor.run.stages import read_jobs
from advisor.types import Plan, RecipeParallel
from cases import LLAMA_8B, plan, rows

H100_8 = {"accelerator": "H100", "memory_gib": 80, "compute_capability": "9.0", "bf16": True, "count": 8}
RTX_3090_2 = {"accelerator": "RTX 3090", "count": 2, "memory_gib": 24, "bf16": True, "ram_gib": 256}
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
SLEEP, FAIL = "import time; time.sleep(60)", "raise SystemExit(3)"


def folder_of(made: Plan, place: Path) -> Path:
    """Write a run folder as `ftadvisor plan` does."""
    return create_run_folder(place / "run", made, recipes_of(made, packages={}, seed=7))


def test_one_device_needs_no_files() -> None:
    """Nothing is written that nothing reads."""
    made = plan(rows())
    assert made.processes == 1
    assert not device_files(made, recipes_of(made, packages={}, seed=7))


def test_a_plan_for_eight_devices_says_so_in_recipe_accelerate_and_queue(tmp_path: Path) -> None:
    """Eight processes everywhere, one of which is never left out; the lines ask for one machine."""
    made = plan(rows(), hardware=H100_8, model=LLAMA_8B)
    folder = folder_of(made, tmp_path)
    (job,) = read_jobs(folder)
    assert job.recipe.parallel == RecipeParallel(kind="ddp", processes=8)
    settings = job.recipe.settings
    assert int(str(settings["effective_batch"])) % (8 * int(str(settings["micro_batch"]))) == 0
    config = yaml.safe_load((folder / ACCELERATE).read_text())
    assert (config["distributed_type"], config["num_processes"]) == ("MULTI_GPU", 8)
    slurm, sky = (folder / SLURM).read_text(), yaml.safe_load((folder / SKY).read_text())
    assert "#SBATCH --nodes=1" in slurm
    assert "#SBATCH --gpus-per-node=8" in slurm
    assert "ftadvisor run . --resume" in slurm
    assert subprocess.run(["bash", "-n", folder / SLURM], check=False).returncode == 0
    assert sky["resources"]["accelerators"] == "H100:8"
    assert sky["run"] == "ftadvisor run . --resume"


def test_a_70b_model_on_two_small_cards_is_sharded_in_4_bits(tmp_path: Path) -> None:
    """FSDP2 with whole saved weights, each process reading only its part, its own checkpointing."""
    made = plan(rows(mean_tokens=350), hardware=RTX_3090_2, model=LLAMA_70B, requested_method="qlora")
    assert (made.method, made.parallel, made.processes) == ("qlora", "fsdp", 2)
    fsdp = yaml.safe_load((folder_of(made, tmp_path) / ACCELERATE).read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert fsdp["fsdp_cpu_ram_efficient_loading"] is True
    stage = made.stages[0].settings
    assert fsdp["fsdp_activation_checkpointing"] is stage["gradient_checkpointing"]
    assert fsdp["fsdp_offload_params"] is bool(stage.get("cpu_offload", False))


def test_deepspeed_gets_its_own_file() -> None:
    """Stage 3, whole weights saved, the optimizer in the host's memory where the plan says so."""
    made = plan(rows(), hardware=H100_8, model=LLAMA_8B)
    made = msgspec.structs.replace(made, parallel="zero3")
    first, *_ = recipes_of(made, packages={}, seed=7)
    recipe = msgspec.structs.replace(first, settings={**first.settings, "cpu_offload": True})
    files = device_files(made, (recipe,))
    assert yaml.safe_load(files[ACCELERATE])["deepspeed_config"]["deepspeed_config_file"] == DEEPSPEED
    zero = msgspec.json.decode(files[DEEPSPEED])["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_a_stage_that_is_not_trained_sharded_is_refused_before_the_first_begins(tmp_path: Path) -> None:
    """Preference training with spread weights was never shown to be right, so it is not done."""
    made = plan(rows(), rows("preference"), hardware=H100_8, model=LLAMA_8B, requested_method="lora+dpo")
    folder = folder_of(msgspec.structs.replace(made, parallel="fsdp", processes=8), tmp_path)
    with pytest.raises(RefusedError, match=r"dpo with lora .* \(fsdp\)"):
        read_jobs(folder)


def test_a_folder_without_its_accelerate_file_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    folder = folder_of(plan(rows(), hardware=H100_8, model=LLAMA_8B), tmp_path)
    (folder / ACCELERATE).unlink()
    with pytest.raises(InputError, match=ACCELERATE):
        read_jobs(folder)


def test_fsdp_is_changed_to_deepspeed_by_one_word(tmp_path: Path) -> None:
    """The file that DeepSpeed reads lies beside the recipe; a 4-bit base stays with FSDP."""
    made = plan(rows(), hardware=H100_8, model=LLAMA_8B, requested_method="full")
    folder = folder_of(msgspec.structs.replace(made, parallel="fsdp", processes=8), tmp_path / "full")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kind: fsdp", "kind: zero3"))
    (job,) = read_jobs(folder)
    assert job.recipe.parallel is not None
    assert job.recipe.parallel.kind == "zero3"
    (folder / DEEPSPEED).unlink()
    with pytest.raises(InputError, match=DEEPSPEED):
        read_jobs(folder)
    made = plan(rows(mean_tokens=350), hardware=RTX_3090_2, model=LLAMA_70B, requested_method="qlora")
    recipe = folder_of(made, tmp_path / "qlora") / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kind: fsdp", "kind: zero3"))
    with pytest.raises(RefusedError, match="4 bits"):
        read_jobs(recipe.parent)


def start(*programs: str) -> Workers:
    """Start one process for each program."""
    return Workers([subprocess.Popen([sys.executable, "-c", one], process_group=0) for one in programs])


def test_the_first_failure_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for ever for the one that is gone; its status is the run's."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    workers = start(SLEEP, FAIL)
    deadline = time.monotonic() + 20
    while (status := workers.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert status == 3


def test_a_request_reaches_all_and_a_kill_leaves_none() -> None:
    """SIGTERM goes to every process; killing waits until they are gone."""
    workers = start(SLEEP, SLEEP)
    assert workers.poll() is None
    workers.kill()
    assert workers.poll() == -signal.SIGKILL
    asked = start(SLEEP, SLEEP)
    asked.ask_to_stop()
    deadline = time.monotonic() + 20
    while asked.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert asked.poll() == -signal.SIGTERM


def test_each_process_knows_its_place_and_a_single_one_knows_of_none(monkeypatch: Any) -> None:
    """A queue's own variables must not make one process wait for others."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (alone,) = launch._environments(None)
    assert "WORLD_SIZE" not in alone
    assert alone["CUDA_VISIBLE_DEVICES"] == "0"
    both = launch._environments(2)
    assert [(one["RANK"], one["WORLD_SIZE"]) for one in both] == [("0", "2"), ("1", "2")]
    assert len({one["MASTER_PORT"] for one in both}) == 1
    assert all("CUDA_VISIBLE_DEVICES" not in one for one in both)
