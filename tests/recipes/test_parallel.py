"""Two processes on one training: DDP, FSDP2 and quantised FSDP2 on CPU with gloo, against one process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from advisor.run.events import read_events
from advisor.types import RecipeParallel
from spread import run_spread, shard_on_cpu
from training import events_of, make_run, rows, run, run_here, write_rows

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
SAME_LOSS = 1e-5
"""How far the logged losses of full training may lie apart: the order of a sum over two processes."""
SAME_LOSS_4_BITS = 5e-3
"""The same in bf16, where Adam makes a whole step of what is only rounding."""
SMALL: dict[str, Any] = {
    "micro_batch": 2, "max_steps": 4, "save_every_steps": 2, "keep_checkpoints": 3, "heldout_fraction": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as fill whole batches: two processes fill up the last one, one process does not."""
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows(40))


def spread_run(folder: Path, kind: str, **settings: Any) -> Path:
    """Write a run folder for two CPU processes."""
    parallel = RecipeParallel(kind=kind, processes=2, device="cpu")  # type: ignore[arg-type]
    return make_run(folder, parallel=parallel, **{**SMALL, **settings})


def losses(folder: Path) -> list[float]:
    """Return the loss of each step, of a resumed run the last time it was made."""
    return list({event["step"]: event["loss"] for event in events_of(folder, "step")}.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    """One process with all weights in training."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    made = make_run(folder, tuner="full", model=tiny_model, data=data, **SMALL)
    assert run_here(made) == 0
    return made


def test_ddp_trains_as_one_process_does(alone: Path, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Same effective batch, same losses, same held-out losses; every event is written once."""
    folder = spread_run(tmp_path / "run", "ddp", tuner="full", model=tiny_model, data=data)
    assert run_spread(folder) == [0, 0], events_of(folder, "error")
    assert losses(folder) == pytest.approx(losses(alone), abs=SAME_LOSS)
    names = [event["event"] for event in read_events(folder / "events.jsonl")]
    names.remove("parallel")
    assert names == [event["event"] for event in read_events(alone / "events.jsonl")]
    (found,) = events_of(folder, "parallel")
    assert (found["kind"], found["processes"]) == ("ddp", 2)
    assert found["held_here"] == found["parameters"]
    first, second = (load_file(one / "model" / "model.safetensors") for one in (alone, folder))
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-5


def test_a_stop_asked_of_one_process_stops_both_and_the_rest_is_the_same(
    alone: Path, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """They agree on the step, save it together, and the resumed run ends with the losses of one process."""
    folder = spread_run(tmp_path / "run", "ddp", tuner="full", model=tiny_model, data=data)

    def stop_the_second(number: int) -> None:
        if number == 1:
            threading.Thread(target=_signal_after_first_step, args=(folder, os.getpid()), daemon=True).start()

    assert run_spread(folder, first=stop_the_second) == [130, 130], events_of(folder, "error")
    reached = len(losses(folder))
    assert reached < SMALL["max_steps"]
    assert (folder / "checkpoints" / f"checkpoint-{reached}" / "complete.json").is_file()
    assert run_spread(folder) == [0, 0]
    assert losses(folder) == pytest.approx(losses(alone), abs=SAME_LOSS)


def _signal_after_first_step(folder: Path, process: int) -> None:
    while not events_of(folder, "step"):
        threading.Event().wait(0.005)
    os.kill(process, signal.SIGTERM)


def test_fsdp_holds_a_half_in_each_process_and_trains_as_one_does(
    alone: Path, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """Same losses, sharded gradients, the model saved whole, and a resumed run ends in the same weights."""
    from torch.distributed.fsdp import FSDPModule

    folder = spread_run(tmp_path / "run", "fsdp", tuner="full", model=tiny_model, data=data)

    def shard_and_watch(number: int) -> None:
        shard_on_cpu(number)
        settle = FSDPModule.set_requires_gradient_sync

        def told(self: Any, wanted: bool, **rest: Any) -> None:
            if not wanted:
                (folder / "whole_gradients").touch()
            settle(self, wanted, **rest)

        FSDPModule.set_requires_gradient_sync = told  # type: ignore[method-assign,assignment]

    assert run_spread(folder, first=shard_and_watch) == [0, 0], events_of(folder, "error")
    assert not (folder / "whole_gradients").exists()
    assert losses(folder) == pytest.approx(losses(alone), abs=SAME_LOSS)
    (found,) = events_of(folder, "parallel")
    assert (found["kind"], 2 * found["held_here"]) == ("fsdp", found["parameters"])
    before, after = (
        {event["when"]: event["loss"] for event in events_of(one, "heldout")} for one in (alone, folder)
    )
    assert after == pytest.approx(before, abs=SAME_LOSS)
    first, second = (load_file(one / "model" / "model.safetensors") for one in (alone, folder))
    assert first.keys() == second.keys()
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-5

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for gone in (again / "model", again / "checkpoints" / "checkpoint-4"):
        shutil.rmtree(gone)
    assert run_spread(again, first=shard_on_cpu) == [0, 0], events_of(again, "error")
    third = load_file(again / "model" / "model.safetensors")
    assert max(np.abs(second[name] - third[name]).max() for name in second) < 1e-6


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs pip install 'ftadvisor[deepspeed]'")
def test_deepspeed_trains_as_one_process_does(
    alone: Path, tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 with the configuration of a plan: weights in halves, same losses, saved whole, resumed alike."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folder = spread_run(tmp_path / "run", "zero3", tuner="full", model=tiny_model, data=data)
    run(folder)
    (found,) = events_of(folder, "parallel")
    assert (found["kind"], 2 * found["held_here"]) == ("zero3", found["parameters"])
    assert losses(folder) == pytest.approx(losses(alone), abs=SAME_LOSS)
    first, second = (load_file(one / "model" / "model.safetensors") for one in (alone, folder))
    assert first.keys() == second.keys()
    assert max(np.abs(first[name] - second[name]).max() for name in first) < 1e-5

    for gone in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(folder / gone)
    for gone in ("events.jsonl", "report.json"):
        (folder / gone).unlink()
    run(folder, resume=True)
    assert [event["step"] for event in events_of(folder, "step")] == [3, 4]
    third = load_file(folder / "model" / "model.safetensors")
    assert max(np.abs(second[name] - third[name]).max() for name in second) < 1e-6


def test_a_4_bit_base_is_spread_too(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Its packed weights pose as 16-bit ones, so that each process holds half; the adapter is saved whole."""
    kind: dict[str, Any] = {
        "tuner": "qlora", "model": tiny_model, "data": data, "precision": "bf16", "lora_dropout": 0.0,
    }  # fmt: skip
    one = make_run(tmp_path / "one", **{**SMALL, **kind})
    folder = spread_run(tmp_path / "two", "fsdp", **kind)
    assert run_here(one) == 0
    assert run_spread(folder, first=shard_on_cpu) == [0, 0], events_of(folder, "error")
    (found,) = events_of(folder, "parallel")
    assert 2 * found["held_here"] == found["parameters"]
    assert losses(folder) == pytest.approx(losses(one), abs=SAME_LOSS_4_BITS)
    shapes = [
        {name: value.shape for name, value in load_file(place / "adapter/adapter_model.safetensors").items()}
        for place in (one, folder)
    ]
    assert shapes[0] == shapes[1]


def test_sharding_that_turns_into_ddp_is_an_error(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Accelerate runs FSDP between CPU processes as DDP without a word; the run says so and ends."""
    folder = spread_run(tmp_path / "run", "fsdp", tuner="full", model=tiny_model, data=data)
    assert run_spread(folder) == [1, 1]
    error = events_of(folder, "error")[0]
    assert error["code"] == "parallel_fell_back"
    assert "Planned is fsdp on 2 processes; what really runs is ddp" in error["message"]
    assert not events_of(folder, "step")


def test_one_process_for_a_plan_of_two_is_an_error(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Started by hand without the others, a program refuses."""
    folder = spread_run(tmp_path / "run", "ddp", tuner="full", model=tiny_model, data=data)
    assert run_here(folder) == 1
    assert "wants 2 processes, and 1 were started" in events_of(folder, "error")[0]["message"]


def test_accelerators_that_are_not_there_are_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Every process looks for its own before it loads anything, and says how many there are."""
    parallel = RecipeParallel(kind="ddp", processes=2)
    folder = make_run(tmp_path / "run", tuner="full", model=tiny_model, data=data, parallel=parallel, **SMALL)
    assert run_spread(folder) == [1, 1]
    error = events_of(folder, "error")[0]
    assert (error["kind"], error["code"]) == ("RefusedError", "too_few_devices")
    assert "over 2 accelerators (ddp); 0 can be used" in error["message"]
