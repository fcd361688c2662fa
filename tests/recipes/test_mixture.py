"""Earlier data that is replayed, and what is measured of each dataset."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.types import Plan, RecipeDataset
from training import events_of, make_run, rows, run, run_here, write_rows

torch = pytest.importorskip("torch")

from advisor.adapters import find_voices  # noqa: E402
from advisor.cli.planning import write_plan  # noqa: E402
from advisor.errors import InputError, RefusedError  # noqa: E402
from advisor.export.source import find_trained  # noqa: E402
from advisor.inputs import Inputs  # noqa: E402
from advisor.intake import gather  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
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


def planned_for_two(tiny_model: Path, place: Path, goal: str) -> tuple[Plan, Path]:
    """Plan two named datasets and write the run folder."""
    data = [write_rows(place / f"{name}.jsonl", rows(30)[start:]) for name, start in (("a", 0), ("b", 6))]
    inputs = Inputs(
        model=str(tiny_model), data=(f"sea={data[0]}", f"hill={data[1]}"), goal=goal, hardware="none",
        method="lora", force=True, settings={"max_steps": 1, "evaluate": False, "lora_r": 4},
    )  # fmt: skip
    made = make_plan(gather(inputs, load(), lambda _: None), load())
    return made, write_plan(made, place / "run", datetime(2026, 1, 1))


def test_one_adapter_for_all_is_one_stage(tiny_model: Path, tmp_path: Path) -> None:
    """Without a word about it, several datasets are mixed in one training."""
    made, folder = planned_for_two(tiny_model, tmp_path, "answer questions")
    assert (made.apart, len(made.stages)) == (False, 1)
    assert "mixing_temperature" in made.stages[0].settings
    assert {one.name for one in read_record(folder / "recipe.yaml", Recipe).datasets} == {"sea", "hill"}


def test_one_adapter_a_task_is_trained_by_one_command(tiny_model: Path, tmp_path: Path) -> None:
    """Each dataset gets an adapter on the untouched base, with figures of its own; all can be talked to, and
    no single one passes for the whole."""
    made, folder = planned_for_two(tiny_model, tmp_path, "one adapter per task")
    assert made.apart
    assert [stage.datasets for stage in made.stages] == [("hill",), ("sea",)]
    assert not {"mixing_cap", "mixing_temperature"} & made.stages[0].settings.keys()
    report = run(folder)
    assert report.status == "done"
    assert report.artefacts == {"adapter": "stages/2-sea/adapter"}
    assert report.earlier_stages[0].heldout_loss_before is not None
    assert run(folder, resume=True) == report
    begun = [event for event in events_of(folder, "heldout") if event["when"] == "before"]
    assert len(begun) == 2
    voices = find_voices([folder], offline=True, on_progress=lambda _: None)
    assert [voice.name for voice in voices] == ["1-hill", "2-sea"]
    assert len({voice.base for voice in voices}) == 1
    with pytest.raises(InputError, match="an adapter for each task"):
        find_trained(folder, offline=True, on_progress=lambda _: None)
    one = find_trained(folder / "stages" / "1-hill", offline=True, on_progress=lambda _: None)
    assert str(one.adapter).endswith("1-hill/adapter")
    with pytest.raises(RefusedError, match="an adapter for each task"):
        gather(Inputs(data=("n=x.jsonl",), continue_from=str(folder)), load(), lambda _: None)
