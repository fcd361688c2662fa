"""Earlier data that is replayed, and what is measured of each dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.types import RecipeDataset
from training import events_of, make_run, rows, run_here, write_rows

torch = pytest.importorskip("torch")

from advisor.storage import encode_yaml, read_record  # noqa: E402 - after the check that torch is installed
from advisor.train.data import Row, replay  # noqa: E402
from advisor.types import Recipe  # noqa: E402

NOTHING = np.array([], np.int32)


def _rows(name: str, count: int) -> list[Row]:
    return [
        Row(tokens=NOTHING, labels=NOTHING, key=f"{n:05}", dataset=name, content=b"", cut=False)
        for n in range(count)
    ]


@given(first=st.integers(0, 60), second=st.integers(0, 60), new=st.integers(0, 400), share=st.floats(0, 0.9))
def test_replay_takes_the_share_from_every_earlier_dataset_alike(
    first: int, second: int, new: int, share: float
) -> None:
    """As many rows as the share asks for or as there are; none twice; as even as the datasets allow."""
    chosen = replay([*_rows("a", first), *_rows("b", second)], share=share, new_rows=new)
    wanted = min(round(share / (1 - share) * new), first + second)
    assert len(chosen) == wanted
    assert len({(row.dataset, row.key) for row in chosen}) == wanted
    counts = {name: sum(row.dataset == name for row in chosen) for name in ("a", "b")}
    if counts["a"] < first and counts["b"] < second:
        assert abs(counts["a"] - counts["b"]) <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_earlier_tasks_are_replayed_in_part_and_measured_whole(tiny_model: Path, tmp_path: Path) -> None:
    """A tenth of the rows comes from the earlier task, the rest of it is counted out, and what is kept of it
    shows in figures of its own before and after."""
    new = write_rows(tmp_path / "new.jsonl", rows(30))
    old = write_rows(
        tmp_path / "old.jsonl", [{"instruction": f"Count {n}.", "output": f"{n} and {n}"} for n in range(30)]
    )
    folder = make_run(
        tmp_path / "run", tuner="lora", model=tiny_model, data=new, replay_fraction=0.1, max_steps=4
    )
    recipe = read_record(folder / "recipe.yaml", Recipe)
    earlier = RecipeDataset(name="old", path=str(old), kind="instruction", role="earlier_task")
    plain: Any = encode_yaml(Recipe(**{**_fields(recipe), "datasets": (*recipe.datasets, earlier)}))
    (folder / "recipe.yaml").write_bytes(plain)
    assert run_here(folder) == 0, events_of(folder, "error")
    data = events_of(folder, "data")[0]
    new_rows = data["rows"] - round(data["rows"] * 0.1)
    assert data["rows"] == new_rows + round(new_rows / 9)
    assert data["left_out"]["replay"] == 60 - data["heldout_rows"] - data["rows"]
    for event in events_of(folder, "heldout"):
        assert {"loss", "loss of data", "loss of old"} <= set(event)
        assert min(event["loss of data"], event["loss of old"]) <= event["loss"]


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in recipe.__struct_fields__}
