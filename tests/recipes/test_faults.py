"""Faults in the real training process, and what the supervisor makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import advisor.run.launch
import advisor.run.stages
from advisor.recipe import decode
from advisor.run.supervisor import run_plan
from advisor.types import RunReport
from faults import OUT_OF_MEMORY, faulty
from training import make_run

pytestmark = pytest.mark.slow


class Fault:
    """A run whose program has a fault."""

    def __init__(self, place: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._place, self._model, self._data, self._patch = place, model, data, monkeypatch
        self.folder = place / "run"
        self.events: list[dict[str, Any]] = []

    def run(self, *, tuner: str = "full", settings: dict[str, Any] | None = None, **fault: str) -> RunReport:
        """Train with a fault put into the program."""
        programs = faulty(self._place / "programs", "sft", **fault)
        for module in (advisor.run.launch, advisor.run.stages):
            self._patch.setattr(module, "recipes_dir", lambda: programs)
        make_run(self.folder, tuner=tuner, model=self._model, data=self._data, **(settings or {}))
        return run_plan(self.folder, resume=False, on_event=self.events.append, offline=True)

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the events of one name."""
        return [event for event in self.events if event["event"] == name]


@pytest.fixture
def fault(tmp_path: Path, tiny_model: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> Fault:
    """A run folder whose program fails as the test says."""
    return Fault(tmp_path, tiny_model, data_file, monkeypatch)


def test_memory_runs_out_then_the_loss_breaks_and_the_run_ends_well(fault: Fault) -> None:
    """Half the rows at a time from the last checkpoint, the same rows a step; then back with a lower rate."""
    report = fault.run(
        at_step=f"if step == 6 and SET['micro_batch'] > 2:\n    {OUT_OF_MEMORY}",
        at_log="if step == 9 and ATTEMPT == 2:\n    logs['loss'] = float('nan')",
    )
    assert report.status == "done"
    assert (report.steps, report.steps_planned, len(report.decisions)) == (10, 10, 2)
    memory, rate = fault.of("decision")
    assert (memory["code"], memory["changes"]) == ("out_of_memory", {"micro_batch": 2})
    assert "the same 8 rows a step" in memory["message"]
    assert (rate["code"], list(rate["changes"])) == ("loss_not_finite", ["learning_rate"])
    second, third = (decode((fault.folder / f"attempt-{n}.recipe.yaml").read_bytes(), "") for n in (2, 3))
    assert (second.settings["effective_batch"], third.settings["effective_batch"]) == (8, 8)
    assert third.settings["learning_rate"] == pytest.approx(5e-3 / 3)
    assert third.lineage is not None
    assert third.lineage.newest_step == 8
    steps = [event["step"] for event in fault.of("step")]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 10]
    rates = {event["step"]: event["learning_rate"] for event in fault.of("step")}
    told = [event["learning_rate"] for event in fault.of("step") if event["step"] == 9]
    assert told[1] == pytest.approx(told[0] / 3)
    assert rates[10] < rates[9]
