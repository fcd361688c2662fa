"""A run that goes on from an earlier one: what is taken over, what is replayed, and when it is no success."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from advisor.cli.planning import require_trainable, write_plan
from advisor.errors import InputError, RefusedError, UsageError
from advisor.inputs import Inputs
from advisor.intake import gather
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.run.report import build_report
from advisor.run.thresholds import thresholds_of
from advisor.storage import read_record
from advisor.types import Plan, Recipe, RecipeDataset, RecipeModel, RunReport
from training import events_of, report_here, rows, run_here, write_rows

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "save_every_steps": 50, "precision": "fp32"}
LIMITS = thresholds_of(load().rules["policy"]).forgetting


def planned(folder: Path, data: Path, **given: Any) -> Path:
    """Plan as `ftadvisor plan` does, and write the run folder."""
    settings = {**SETTINGS, **given.pop("settings", {})}
    inputs = Inputs(data=(f"{folder.name}={data}",), hardware="none", settings=settings, force=True, **given)
    case = gather(inputs, load(), lambda _: None)
    made = make_plan(case, load())
    require_trainable(made, case)
    return write_plan(made, folder, datetime(2026, 1, 1))


def trained(folder: Path) -> RunReport:
    """Train a run folder in this process and write its report, as the supervisor does."""
    assert run_here(folder) == 0, events_of(folder, "error")
    return report_here(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The old task, and a new one that answers otherwise."""
    place = tmp_path_factory.mktemp("tasks")
    new = [{"instruction": f"Count {n} twice.", "output": f"{n} and {n} are done"} for n in range(60)]
    return {
        "old": write_rows(place / "old.jsonl", rows(42) + rows(42)[:18]),
        "new": write_rows(place / "new.jsonl", new),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, files: dict[str, Path]) -> Path:
    """A finished LoRA run on the old task."""
    folder = tmp_path_factory.mktemp("runs") / "old"
    planned(
        folder, files["old"], model=str(tiny_model), method="lora", settings={"max_steps": 30, "lora_r": 4}
    )
    assert trained(folder).ok
    return folder


def test_it_goes_on_from_the_adapter_and_keeps_what_was_learned(
    first: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """The adapter keeps its shape and begins where it was; old rows are replayed, measured, mostly kept."""
    folder = planned(
        tmp_path / "new", files["new"], continue_from=str(first),
        settings={"max_steps": 16, "replay_fraction": 0.3, "learning_rate": 3e-3},
    )  # fmt: skip
    made, recipe = read_record(folder / "plan.json", Plan), read_record(folder / "recipe.yaml", Recipe)
    assert made.method == "lora"
    assert made.task_kind == "continual"
    assert recipe.settings["lora_r"] == 4
    assert [one.role for one in recipe.datasets] == ["train", "earlier_task"]
    assert recipe.datasets[1].untrained_loss == events_of(first, "heldout")[0]["loss"]
    begun = load_file(folder / "stages" / "0-earlier" / "adapter" / "adapter_model.safetensors")
    assert begun.keys() == load_file(first / "adapter" / "adapter_model.safetensors").keys()
    report = trained(folder)
    before = report.heldout_figures["before"]
    assert before["loss of old"] == pytest.approx(events_of(first, "heldout")[-1]["loss"], rel=0.25)
    assert report.heldout_figures["after"]["loss of new"] < 0.8 * before["loss of new"]
    assert report.kept["old"] >= 0.8
    assert "exact share of old" in before
    assert report.evaluation is not None
    told = " ".join(report.evaluation.evidence)
    assert "Held-out loss of new" in told
    assert "of old" in told
    counted = events_of(folder, "model")[0]["trainable_parameters"]
    assert made.stages[0].estimate.trainable_parameters == counted


def test_a_run_that_forgets_is_no_success(first: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Without replay the old task goes; the run is done, and its report says that it is no success."""
    folder = planned(
        tmp_path / "new", files["new"], continue_from=str(first),
        settings={"max_steps": 30, "replay_fraction": 0, "learning_rate": 2e-2},
    )  # fmt: skip
    report = trained(folder)
    assert report.status == "done"
    assert not report.ok
    assert report.kept["old"] < 0.5
    assert "of old" in report.forgotten[0]
    assert report.evaluation is not None
    assert report.evaluation.verdict == "forgot"


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_run_that_learns_nothing_new_is_no_success(
    first: Path, files: dict[str, Path], tmp_path: Path, *, evaluate: bool
) -> None:
    """At rate zero all of the old is kept, and the report says that the new task was not learned."""
    folder = planned(
        tmp_path / "new", files["new"], continue_from=str(first),
        settings={"max_steps": 1, "learning_rate": 0.0, "evaluate": evaluate},
    )  # fmt: skip
    report = trained(folder)
    assert (report.status, report.ok, report.forgotten) == ("done", False, ())
    assert report.kept["old"] == 1.0
    assert "new was not learned" in report.not_learned[0]
    assert [one.verdict for one in (report.evaluation,) if one] == ["not_learned"] * evaluate


def test_moved_rows_are_asked_for_and_taken_once(first: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Rows that an earlier run learned and that lie elsewhere now are named by --earlier; the loss they had
    before goes with them."""
    moved = tmp_path / "elsewhere.jsonl"
    files["old"].rename(moved)
    try:
        with pytest.raises(InputError, match=r"not there any more: old \(") as caught:
            planned(tmp_path / "a", files["new"], continue_from=str(first))
        folder = planned(tmp_path / "b", files["new"], continue_from=str(first), earlier=(f"told={moved}",))
    finally:
        moved.rename(files["old"])
    assert "--earlier" in caught.value.remedy
    found = [(one.name, one.role) for one in read_record(folder / "recipe.yaml", Recipe).datasets]
    assert found == [("b", "train"), ("told", "earlier_task")]
    assert read_record(folder / "recipe.yaml", Recipe).datasets[1].untrained_loss is not None


def test_an_adapter_beside_the_earlier_one_begins_anew(
    first: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Where each task is to have an adapter of its own, the earlier one and its rows are left as they are."""
    folder = planned(tmp_path / "new", files["new"], continue_from=str(first), goal="one adapter per task")
    made, recipe = read_record(folder / "plan.json", Plan), read_record(folder / "recipe.yaml", Recipe)
    assert made.start is None
    assert made.method == "lora"
    assert recipe.model.after is None
    assert recipe.model.path == read_record(first / "recipe.yaml", Recipe).model.path
    assert [one.name for one in recipe.datasets] == ["new"]


def test_what_cannot_be_continued_is_refused(
    first: Path, files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Another tuner than the kept adapter's, another model, a folder that is no finished run."""
    with pytest.raises(RefusedError, match="cannot go on with it") as caught:
        planned(tmp_path / "a", files["new"], continue_from=str(first), method="full")
    assert "--to merged" in caught.value.remedy
    with pytest.raises(UsageError, match="--model cannot be added"):
        planned(tmp_path / "b", files["new"], continue_from=str(first), model=str(tiny_model))
    with pytest.raises(InputError, match="no run folder"):
        planned(tmp_path / "c", files["new"], continue_from=str(tmp_path))
    unfinished = planned(tmp_path / "d", files["old"], model=str(tiny_model), method="lora")
    with pytest.raises(InputError, match="not trained to its end"):
        planned(tmp_path / "e", files["new"], continue_from=str(unfinished))


@pytest.mark.parametrize(
    ("untrained", "before", "after", "ok", "kept"),
    [
        (5.0, {"loss of old": 0.4, "exact share of old": 0.5}, {"exact share of old": 0.45}, True, 0.9),
        (5.0, {"loss of old": 0.4, "exact share of old": 0.5}, {"exact share of old": 0.3}, False, 0.6),
        (5.0, {"loss of old": 0.4, "exact share of old": 0.1}, {"loss of old": 0.44}, True, 0.9913),
        (5.0, {"loss of old": 0.4, "exact share of old": 0.1}, {"loss of old": 0.9}, False, 0.8913),
        (None, {"loss of old": 0.4}, {"loss of old": 0.43}, True, None),
        (None, {"loss of old": 0.4}, {"loss of old": 0.5}, False, None),
    ],
)
def test_the_gate_counts_words_before_losses(
    untrained: float | None,
    before: dict[str, float],
    after: dict[str, float],
    *,
    ok: bool,
    kept: float | None,
) -> None:
    """Where answers were written word for word, those that still are count; elsewhere the loss, which hardly
    tells when only the first words are lost, must keep far more."""
    earlier = RecipeDataset(name="old", path="", kind="chat", role="earlier_task", untrained_loss=untrained)
    recipe = Recipe(
        program="sft",
        objective="sft",
        tuner="lora",
        model=RecipeModel(id="m"),
        datasets=(earlier,),
        settings={},
    )
    events = [
        {"event": "heldout", "when": "before", **before},
        {"event": "heldout", "when": "after", **before, **after},
    ]
    made = build_report(
        events, recipe, recipe_sha256="", status="done", estimate=None, artefacts={}, packages={},
        limits=LIMITS, error=None,
    )  # fmt: skip
    assert made.status == "done"
    assert made.ok is ok
    assert bool(made.forgotten) is not ok
    assert made.kept.get("old") == kept
