"""A probe trains a few real steps of a recipe, the longest rows first, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training import events_of, make_run, rows, run_here, write_rows

datasets = pytest.importorskip("datasets")

from test_objectives import judged, marked  # noqa: E402 - after the check

from advisor.knowledge import load  # noqa: E402 - after the check
from advisor.train import evaluation  # noqa: E402 - after the check
from advisor.train.probing import Order, Probe, typical  # noqa: E402 - after the check
from advisor.train.settings import Settings  # noqa: E402 - after the check

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
SETTINGS = Settings(learning_rate=1e-3, micro_batch=4, effective_batch=16, max_seq_len=128)
DATA: dict[str, tuple[str, Any]] = {
    "sft": ("instruction", rows), "dpo": ("preference", judged), "kto": ("unpaired_preference", marked),
    "orpo": ("preference", judged), "reward": ("preference", judged),
}  # fmt: skip


def table(lengths: list[int]) -> Any:
    return datasets.Dataset.from_list([{"input_ids": [1] * n, "labels": [1] * n} for n in lengths])


def test_the_longest_rows_come_first_and_the_others_are_typical() -> None:
    """Two micro batches of the longest rows; then batches that average like the whole data."""
    lengths = [10 + (n * 37) % 90 for n in range(400)]
    probe = Probe(Order(steps=4, seconds=60))
    taken = [len(ids) for ids in probe.rows(table(lengths), SETTINGS)["input_ids"]]
    assert taken[:8] == sorted(lengths, reverse=True)[:8]
    batches = [max(taken[n : n + 4]) for n in range(8, len(taken), 4)]
    assert len(batches) == 8
    assert probe.share_of(8) == pytest.approx(1.0, abs=0.05)
    assert probe.steps_planned == 25


def test_few_rows_are_taken_more_than_once() -> None:
    """Three rows are enough to try a batch of four."""
    taken = Probe(Order(steps=2, seconds=60)).rows(table([5, 9, 7]), SETTINGS)
    assert [len(ids) for ids in taken["input_ids"]][:8] == [9, 7, 5, 9, 7, 5, 9, 7]


def test_typical_batches_spread_evenly_and_balance_each_other() -> None:
    """The two batches of a step lie as far below as above the middle."""
    ranks = typical(100, 4, 2)
    assert sorted(ranks) == [6, 18, 31, 43, 56, 68, 81, 93]
    assert all(abs(ranks[n] + ranks[n + 1] - 99) <= 1 for n in range(0, 8, 2))


def test_the_estimate_knows_what_is_asked() -> None:
    """The rules that the time estimate reads say what the evaluation does."""
    asked = load().rules["time"]["asked"]
    assert (asked["rows"], asked["together"]) == (evaluation.MOST_ROWS, evaluation.TOGETHER)
    assert (asked["answer_tokens"], asked["most_seconds"]) == (
        evaluation.ANSWER_TOKENS,
        evaluation.MOST_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(DATA))
def test_every_objective_can_be_tried(
    objective: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of the real program, with figures of each part, and neither checkpoint nor result."""
    monkeypatch.setenv("FTADVISOR_PROBE", '{"steps": 4, "seconds": 30}')
    kind, content = DATA[objective]
    data = write_rows(tmp_path / "data.jsonl", content())
    folder = make_run(
        tmp_path / "run", tuner="lora", model=tiny_model, data=data, kind=kind, objective=objective,
        weight_bits=32, evaluate=True,
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    (told,) = events_of(folder, "probe")
    assert told["steps_measured"] == 5
    assert told["measured_peak_bytes"] > 2**28
    assert 0 < told["seconds_per_step"] < 10
    assert (told["reference_seconds"] > 0) is (objective in ("dpo", "kto"))
    assert (told["asking_seconds"] > 0) is (objective != "reward")
    parts = (
        told["ready_seconds"] + told["reference_seconds"] + told["asking_seconds"]
        + told["evaluations"] * told["evaluation_seconds"]
    )  # fmt: skip
    assert told["seconds"] == pytest.approx(parts + told["steps_planned"] * told["seconds_per_step"])
    assert not [path.name for path in folder.iterdir() if path.name in ("adapter", "model")]
    assert not list(folder.glob("checkpoints/checkpoint-*"))
    assert not events_of(folder, "checkpoint")


@pytest.mark.slow
def test_the_command_tries_a_recipe_and_leaves_its_folder_as_it_was(
    tiny_model: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`probe --recipe` works in a process and a folder of its own; what it measured is remembered."""
    monkeypatch.setenv("FTADVISOR_CALIBRATION", str(tmp_path / "calibration.jsonl"))
    folder = make_run(tmp_path / "run", tuner="lora", model=tiny_model, data=data_file, weight_bits=32)
    before = sorted(path.name for path in folder.rglob("*"))
    answer = subprocess.run(
        [sys.executable, "-m", "advisor", "probe", "--recipe", str(folder), "--json"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (steps,) = json.loads(answer.stdout)["steps"]
    assert steps["fits"]
    assert steps["measured_peak_bytes"] < steps["whole_peak_bytes"]["high"] < steps["available_bytes"]
    assert steps["whole_seconds"]["low"] < steps["seconds"] < steps["whole_seconds"]["high"]
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert "tiny" in (tmp_path / "calibration.jsonl").read_text()
