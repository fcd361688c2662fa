"""A checkpoint is used only when it is whole and belongs to the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from advisor.train import checkpoints
from advisor.train.checkpoints import Fit

RECIPE = "abc"


def make(root: Path, step: int, *, finished: bool = True) -> Path:
    """Write something that looks like a checkpoint."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(2 * checkpoints.HASHED_BELOW_BYTES))
    (folder / "trainer_state.json").write_text(f'{{"step": {step}}}')
    if finished:
        checkpoints.finish(folder, step=step, recipe_sha256=RECIPE)
    return folder


def _truncate(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"x")


def _change(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"step": 9}')


def _empty_marker(folder: Path) -> None:
    (folder / checkpoints.MARKER).write_bytes(b"")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no marker": (lambda f: (f / checkpoints.MARKER).unlink(), "not finished"),
    "marker cut": (_empty_marker, "marker is damaged"),
    "file missing": (lambda f: (f / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
    "file cut": (_truncate, r"optimizer\.pt has 1 bytes instead of"),
    "small file changed": (_change, r"trainer_state\.json was changed"),
}


def test_the_newest_whole_checkpoint_is_chosen(tmp_path: Path) -> None:
    """By number, not by name or time."""
    for step in (100, 20, 3):
        make(tmp_path, step)
    choice = checkpoints.newest(tmp_path, Fit(sha256=RECIPE))
    assert (Path(choice.folder or "").name, choice.step, choice.rejected) == ("checkpoint-100", 100, {})


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_passed_over_with_its_reason(tmp_path: Path, name: str) -> None:
    """The one before it is used, and the damaged one is removed before training goes on."""
    make(tmp_path, 4)
    damage, reason = DAMAGES[name]
    damage(make(tmp_path, 8))
    choice = checkpoints.newest(tmp_path, Fit(sha256=RECIPE))
    assert choice.step == 4
    assert list(choice.rejected) == ["checkpoint-8"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(choice.rejected["checkpoint-8"])
    checkpoints.remove_unusable(tmp_path, choice)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_another_recipe_does_not_fit(tmp_path: Path) -> None:
    """Settings that changed would be ignored silently by the trainer."""
    make(tmp_path, 4)
    choice = checkpoints.newest(tmp_path, Fit(sha256="other"))
    assert choice.folder is None
    assert choice.rejected == {"checkpoint-4": "it belongs to another recipe"}


def test_nothing_there_means_from_the_beginning(tmp_path: Path) -> None:
    """Neither a missing folder nor other files are checkpoints."""
    assert checkpoints.newest(tmp_path / "none", Fit(sha256=RECIPE)).folder is None
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.newest(tmp_path, Fit(sha256=RECIPE)).folder is None


def test_old_checkpoints_are_removed_only_behind_whole_ones(tmp_path: Path) -> None:
    """An unfinished newest one does not count, so the last whole one always stays."""
    for step in (1, 2, 3):
        make(tmp_path, step)
    make(tmp_path, 4, finished=False)
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    shutil.rmtree(tmp_path / "checkpoint-2")
    checkpoints.rotate(tmp_path, keep=2)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    """The newest to go on from, the best to go back to; with room for one, the newest."""
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        checkpoints.note_heldout(make(tmp_path, step), loss)
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    checkpoints.rotate(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_derived_recipe_goes_on_from_its_forebears(tmp_path: Path) -> None:
    """Theirs are used up to the step that was gone back to, its own whatever their step."""
    for step in (4, 8):
        make(tmp_path, step)
    fit = Fit(sha256="derived", of=(RECIPE,), newest_step=4)
    choice = checkpoints.newest(tmp_path, fit)
    assert choice.step == 4
    assert choice.rejected == {"checkpoint-8": "training has gone back behind it"}
    checkpoints.remove_unusable(tmp_path, choice)
    checkpoints.finish(make(tmp_path, 12, finished=False), step=12, recipe_sha256="derived")
    assert checkpoints.newest(tmp_path, fit).step == 12
