"""A run that was stopped at any point goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from advisor.errors import InterruptedRunError, RefusedError, TrainingError
from advisor.run.events import read_events
from advisor.storage import read_record
from advisor.types import RunReport
from training import make_run, run

pytestmark = pytest.mark.slow
LAST = "checkpoints/checkpoint-10"


def _assert_equal_weights(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def _losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"}


def test_killed_full_run_resumes_bit_equal(
    trained: Any, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    """SIGKILL after a checkpoint, a newer checkpoint half-written, the folder moved: the end is bit-equal."""
    folder = make_run(tmp_path / "first", tuner="full", model=tiny_model, data=data_file)
    pid = 0

    def kill_at_five(event: dict[str, Any]) -> None:
        nonlocal pid
        pid = event.get("pid", pid)
        if event["event"] == "step" and event["step"] == 5:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(TrainingError) as caught:
        run(folder, on_event=kill_at_five)
    assert caught.value.code == "killed"
    report = read_record(folder / "report.json", RunReport)
    assert report.status == "failed"
    saved_before_the_kill = {
        "checkpoints/checkpoint-4",
        "checkpoints/checkpoint-8",
    }  # it trains while we read
    assert report.artefacts["checkpoint"] in saved_before_the_kill
    with pytest.raises(RefusedError, match="unfinished"):
        run(folder)

    half = folder / "checkpoints" / "checkpoint-8"
    shutil.rmtree(half, ignore_errors=True)  # what the killed process may have begun
    shutil.copytree(folder / "checkpoints" / "checkpoint-4", half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    moved = folder.rename(tmp_path / "moved")
    seen: list[dict[str, Any]] = []
    assert run(moved, resume=True, on_event=seen.append).status == "done"
    assert any(e["event"] == "warning" and "checkpoint-8 is not used" in e["message"] for e in seen)
    assert next(e["step"] for e in seen if e["event"] == "step") == 5
    whole = trained["full"].folder
    _assert_equal_weights(whole / LAST / "model.safetensors", moved / LAST / "model.safetensors")
    _assert_equal_weights(whole / "model" / "model.safetensors", moved / "model" / "model.safetensors")
    assert _losses(moved) == _losses(whole)


def test_interrupted_lora_run_resumes_bit_equal(
    trained: Any, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C saves after the step and stops; with dropout on, --resume ends in the same bits."""
    folder = make_run(tmp_path / "run", tuner="lora", model=tiny_model, data=data_file)

    def interrupt_at_two(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError) as caught:
        run(folder, on_event=interrupt_at_two)
    assert caught.value.exit_status == 130
    assert "--resume" in caught.value.remedy
    report = read_record(folder / "report.json", RunReport)
    assert report.status == "interrupted"
    assert 2 <= report.steps < 10
    assert report.artefacts["checkpoint"] == f"checkpoints/checkpoint-{report.steps}"

    seen: list[dict[str, Any]] = []
    final = run(folder, resume=True, on_event=seen.append)
    assert next(e["step"] for e in seen if e["event"] == "step") == report.steps + 1
    whole = trained["lora"].folder
    name = "adapter_model.safetensors"
    _assert_equal_weights(whole / LAST / name, folder / LAST / name)
    _assert_equal_weights(whole / "adapter" / name, folder / "adapter" / name)
    assert final.heldout_loss_after == trained["lora"].report.heldout_loss_after
    assert run(folder, resume=True) == final
