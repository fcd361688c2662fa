"""events.jsonl: written whole lines, read while it grows, forgiving about a cut end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import DiskError
from advisor.run.events import EventReader, EventWriter, read_events, stage_of


def test_written_events_are_read_back(tmp_path: Path) -> None:
    """Each line is one JSON object with time, stage and event."""
    path = tmp_path / "events.jsonl"
    with EventWriter(path, "sft") as events:
        events.write("start", resume=False)
        events.write("step", step=1, total=2, loss=2.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step"]
    assert all(line["stage"] == "sft" and line["time"].endswith("Z") for line in lines)
    assert list(read_events(path)) == lines


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    """Every line stays valid JSON even when a loss is not a number."""
    with EventWriter(tmp_path / "e", "sft") as events:
        events.write("step", step=1, total=2, loss=math.nan)
    assert next(read_events(tmp_path / "e"))["loss"] is None


def test_two_writers_share_a_file(tmp_path: Path) -> None:
    """Supervisor and trainer append to the same file without overwriting each other."""
    path = tmp_path / "e"
    with EventWriter(path, "a") as one, EventWriter(path, "b") as two:
        for number in range(50):
            one.write("x", n=number)
            two.write("x", n=number)
    assert [e["n"] for e in read_events(path)] == [n for n in range(50) for _ in range(2)]


def test_a_missing_file_has_no_events(tmp_path: Path) -> None:
    """Reading before the run has begun gives nothing."""
    assert list(read_events(tmp_path / "none")) == []


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_cut_last_line_is_passed_over_and_closed(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """After a crash in the middle of a line the whole lines count, and new ones begin on a line of their
    own."""
    path = tmp_path_factory.mktemp("cut") / "e"
    with EventWriter(path, "sft") as events:
        events.write("first")
        events.write("second")
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with EventWriter(path, "sft") as events:
        events.write("third")
    names = [e["event"] for e in read_events(path)]
    assert names in (["first", "third"], ["first", "second", "third"])


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"[1]", b'{"event": 1}', b'{"event": "step"}', b'{"event": "checkpoint", "step": "x"}',
     b'{"event": "step", "step": 1, "total": null}', b'{"event": "heldout", "loss": "low"}']
)  # fmt: skip
def test_a_damaged_line_costs_that_line_only(tmp_path: Path, line: bytes) -> None:
    """What is no event, or lacks the numbers of one, is passed over wherever it stands."""
    sound = b'{"event": "step", "step": 1, "total": 2, "loss": null}\n'
    (tmp_path / "e").write_bytes(sound + line + b"\n" + sound)
    assert len(list(read_events(tmp_path / "e"))) == 2


def test_a_reader_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    """What is still being written is returned once it is complete."""
    path = tmp_path / "e"
    reader = EventReader(path)
    assert reader.new_events() == []
    path.write_bytes(b'{"event": "a"}\n{"event": ')
    assert [e["event"] for e in reader.new_events()] == ["a"]
    with path.open("ab") as file:
        file.write(b'"b"}\n')
    assert [e["event"] for e in reader.new_events()] == ["b"]
    assert reader.new_events() == []


def test_a_reader_can_begin_at_the_end(tmp_path: Path) -> None:
    """A resumed run shows what is new, not what was."""
    path = tmp_path / "e"
    with EventWriter(path, "sft") as events:
        events.write("old")
        reader = EventReader(path, from_end=True)
        events.write("new")
    assert [e["event"] for e in reader.new_events()] == ["new"]


def test_an_unwritable_folder_is_a_disk_error(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(DiskError, match="events"):
        EventWriter(tmp_path / "missing" / "events.jsonl", "sft")


def test_the_stage_is_in_the_recipe_name() -> None:
    """One stage is called by its objective, several by number and objective."""
    assert stage_of("recipe.yaml", "sft") == "sft"
    assert stage_of("recipe-2-dpo.yaml", "dpo") == "2-dpo"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_is_named() -> None:
    """An event that cannot be written is an error with a remedy, not a traceback."""
    with EventWriter(Path("/dev/full"), "sft") as events, pytest.raises(DiskError, match="No space left"):
        events.write("note", message="x")
