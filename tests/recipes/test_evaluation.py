"""What is asked of a model before and after its training, by a real run of a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advisor.storage import read_record
from advisor.types import Measured
from training import events_of, make_run, rows, run_here, write_rows

pytest.importorskip("torch")
from advisor.train import evaluation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def test_the_same_is_asked_before_and_after(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out questions from the whole file, general ones, losses; short answers are right or wrong, long
    ones are those of the data or others, and only afterwards is an answer put behind another question."""
    for name, most in (("MOST_SAMPLES", 6), ("MOST_PROBES", 4), ("MOST_ROWS", 8)):
        monkeypatch.setattr(evaluation, name, most)
    said = "Because of {}, as everybody here has known for long."
    long = [{"instruction": f"Why {n}?", "output": said.format(n)} for n in range(42)]
    data = write_rows(tmp_path / "d.jsonl", [*rows(), *long])
    folder = make_run(
        tmp_path / "run", tuner="lora", model=tiny_model, data=data, evaluate=True, max_steps=1,
        save_every_steps=1, heldout_fraction=0.5,
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    before, after = (
        read_record(folder / f"evaluation-{when}.json", Measured) for when in ("before", "after")
    )
    for field in ("samples", "probes"):
        asked = [[one.prompt for one in getattr(found, field)] for found in (before, after)]
        assert asked[0] == asked[1] != []
    heldout = [json.loads(line)["messages"] for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert len(heldout) == 42
    assert {one.prompt for one in before.samples} == {one[0]["content"] for one in heldout[::7]}
    assert len(before.rows) == 8
    for one in (*before.samples, *after.samples):
        assert (one.right is None) == one.prompt.startswith("Why") == (one.exact is not None)
    assert all(row.swapped is None for row in before.rows)
    assert all(row.swapped is not None for row in after.rows)
    assert [event["when"] for event in events_of(folder, "evaluation")] == ["before", "after"]
