"""When real steps are tried before a training, what is concluded from them, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from advisor.errors import RefusedError, TrainingError
from advisor.estimate.calibrate import summarise
from advisor.knowledge import load
from advisor.probe.calibration import (
    calibration_file,
    measured_rates,
    observations,
    remember,
    unreadable_lines,
)
from advisor.probe.software import installed_packages
from advisor.recipe import encode
from advisor.run import probe_steps
from advisor.run.attempts import newest_attempt
from advisor.run.events import EventWriter
from advisor.run.ladder import Trainee
from advisor.run.probe_steps import anchored, judge, probe_first, told, worth_it
from advisor.run.report import build_report
from advisor.run.signs import RunState
from advisor.run.stages import Job
from advisor.run.thresholds import thresholds_of
from advisor.storage import write_atomic
from advisor.types import (
    Band,
    Hardware,
    MatrixBench,
    Observation,
    Recipe,
    RecipeDataset,
    RecipeModel,
    StageEstimate,
)
from advisor.units import GIB

KNOWLEDGE = load()
MACHINE = Hardware(ram_bytes=16 * GIB, ram_free_bytes=10 * GIB, cpu_cores=4, cpu_name="a processor")
TOLD = {
    "seconds": 100.0, "seconds_per_step": 1.0, "cpu_seconds": 90.0, "cpu_seconds_per_step": 0.9,
    "ready_seconds": 10.0, "reference_seconds": 0.0, "evaluation_seconds": 2.0, "asking_seconds": 3.0,
    "steps_planned": 86, "steps_measured": 5, "longest_tokens": 512,
}  # fmt: skip


def recipe(**settings: Any) -> Recipe:
    chosen = {
        "micro_batch": 4,
        "effective_batch": 8,
        "max_seq_len": 1024,
        "gradient_checkpointing": False,
        "loss": "chunked",
    }
    return Recipe(
        program="sft", objective="sft", tuner="lora", model=RecipeModel(id="tiny"),
        datasets=(RecipeDataset(name="data", path="data.jsonl", kind="instruction"),),
        settings={**chosen, **settings},
    )  # fmt: skip


def estimate(high: float, seconds: float) -> StageEstimate:
    return StageEstimate(
        peak_bytes=Band(low=0.8 * high, expected=0.9 * high, high=high),
        seconds=Band(low=seconds / 2, expected=seconds / 1.5, high=seconds), parts={}, disk_bytes=0,
    )  # fmt: skip


def job(high: float = 2 * GIB) -> Job:
    return Job(
        folder=".", recipe_file="recipe.yaml", recipe=recipe(), recipe_sha256="", estimate=estimate(high, 60)
    )


def events(peak: int, device: str = "cpu") -> dict[str, Any]:
    return {"model": {"device": device}, "probe": {**TOLD, "measured_peak_bytes": peak}}


@pytest.mark.parametrize(
    ("high", "seconds", "tried"),
    [(2 * GIB, 60, False), (9 * GIB, 60, True), (2 * GIB, 3600, True)],
    ids=["roomy and short", "scarce memory", "long"],
)
def test_steps_are_tried_where_a_wrong_figure_would_hurt(high: float, seconds: float, tried: bool) -> None:
    """A short training in plenty of memory begins at once; a scarce or long one is tried first."""
    reason = worth_it(estimate(high, seconds), MACHINE, KNOWLEDGE.rules["probe"])
    assert (reason == "") is tried


def test_what_is_measured_decides_whether_it_fits() -> None:
    """More than is free does not fit, whatever was predicted; the next best settings are named."""
    fine = judge(job(), events(3 * GIB), MACHINE, KNOWLEDGE, out_of_memory=False)
    assert fine.fits
    assert fine.smaller == {}
    assert fine.seconds_per_step == 1.0
    bad = judge(job(), events(11 * GIB), MACHINE, KNOWLEDGE, out_of_memory=False)
    assert not bad.fits
    assert bad.smaller == {"micro_batch": 2}
    assert "11 GiB" in bad.reason


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
def test_the_bands_are_narrower_after_real_steps(device: str) -> None:
    """Of memory and time: what is measured lies in its own band, which spans less than any band of a plan."""
    found = judge(job(), events(3 * GIB, device), MACHINE, KNOWLEDGE, out_of_memory=False)
    memory, seconds = found.whole_peak_bytes, found.whole_seconds
    assert memory
    assert seconds
    assert memory.low <= (found.measured_peak_bytes or 0) <= memory.high
    assert seconds.low <= (found.seconds or 0) <= seconds.high
    errors = KNOWLEDGE.rules["memory"]["error"]
    widths = [errors[name]["high"] / errors[name]["low"] for name in ("full", "adapters", "quantised")]
    own = errors.get(f"device_{device}", {"low": 1.0, "high": 1.0})
    assert memory.high / memory.low < min(widths) * own["high"] / own["low"]
    spreads = [one["spread"] for one in KNOWLEDGE.rules["time"].values() if "spread" in one]
    assert spreads
    assert seconds.high / seconds.low < min(one["high"] / one["low"] for one in spreads)


def test_the_report_has_the_narrower_bands() -> None:
    """What the first steps said of the whole stands in report.json beside what was predicted and measured."""
    found = judge(job(), events(3 * GIB), MACHINE, KNOWLEDGE, out_of_memory=False)
    made = build_report(
        [{"event": "probe", **msgspec.to_builtins(told(found))}], recipe(), recipe_sha256="", status="done",
        estimate=estimate(9 * GIB, 60), artefacts={}, packages={}, error=None,
        limits=thresholds_of(KNOWLEDGE.rules["policy"]).forgetting,
    )  # fmt: skip
    assert made.whole_peak_bytes == found.whole_peak_bytes
    assert made.whole_seconds == found.whole_seconds


def test_the_upper_bound_after_the_steps_decides() -> None:
    """A step that just fits does not promise the whole training, which keeps kernels for more row lengths."""
    close = judge(job(), events(round(9.5 * GIB)), MACHINE, KNOWLEDGE, out_of_memory=False)
    assert not close.fits
    assert "the whole takes up to" in close.reason


def test_a_device_loses_its_context_too() -> None:
    """On a card, torch's figure is not all: the context lies beside it."""
    processor, card = (
        judge(job(), events(3 * GIB, device), MACHINE, KNOWLEDGE, out_of_memory=False)
        for device in ("cpu", "cuda:0")
    )
    context = KNOWLEDGE.rules["memory"]["device"]["cuda"]["context_bytes"]
    assert (card.measured_peak_bytes or 0) - (processor.measured_peak_bytes or 0) == context


def test_running_out_of_memory_is_an_answer() -> None:
    """A probe that was killed for memory says so and names smaller settings; it has no figures."""
    found = judge(job(), {}, MACHINE, KNOWLEDGE, out_of_memory=True)
    assert not found.fits
    assert found.measured_peak_bytes is None
    assert found.smaller


def test_a_probe_that_tells_nothing_is_a_fault_not_a_verdict() -> None:
    """Without figures nothing is concluded."""
    with pytest.raises(TrainingError):
        judge(job(), {"model": {"device": "cpu"}}, MACHINE, KNOWLEDGE, out_of_memory=False)


def first_state(given: Recipe) -> RunState:
    return RunState(trainee=Trainee(objective="sft", tuner="lora"), settings=given.settings)


def run_folder(folder: Path) -> Job:
    """A run folder with one recipe, as a job whose plan leaves no room."""
    write_atomic(folder / "recipe.yaml", encode(recipe()))
    return msgspec.structs.replace(job(high=9 * GIB), folder=str(folder))


def try_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, needs: Callable[[dict[str, Any]], int]
) -> tuple[Any, list[dict[str, Any]]]:
    """Begin a run on a machine with 10 GiB; `needs` says how many bytes a trial of some settings takes."""

    def tried(one: Job, machine: Hardware, knowledge: Any, *, scratch: Path | None) -> Any:
        peak = needs(one.recipe.settings)
        return judge(one, events(peak), machine, knowledge, out_of_memory=False)

    monkeypatch.setattr(probe_steps, "probe_steps", tried)
    monkeypatch.setattr(probe_steps, "probe_hardware", lambda **_: MACHINE)
    planned, seen = run_folder(folder), list[dict[str, Any]]()
    start = (newest_attempt(planned), first_state(planned.recipe))
    rules = thresholds_of(KNOWLEDGE.rules["policy"])
    with EventWriter(folder / "events.jsonl", "sft") as written:
        try:
            return probe_first(planned, start, rules, written, seen.append, wanted=None), seen
        except RefusedError as refused:
            return refused, seen


def test_what_does_not_fit_goes_down_the_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a trial fits, the policy's next rung is taken and tried; the effective batch stays."""
    begun, seen = try_first(tmp_path, monkeypatch, lambda settings: 4 * settings["micro_batch"] * GIB)
    attempt, state = begun
    assert attempt.recipe.settings["micro_batch"] == state.settings["micro_batch"] == 2
    assert attempt.recipe.settings["effective_batch"] == 8
    assert [event["fits"] for event in seen if event["event"] == "probe"] == [False, True]


def test_what_only_a_person_may_change_is_asked_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all that costs nothing was tried, the training is refused, and the refusal says what is left."""
    refused, seen = try_first(tmp_path, monkeypatch, lambda _: 20 * GIB)
    assert refused.code == "does_not_fit"
    assert "--allow shorter-sequences" in refused.remedy
    assert [event["action"] for event in seen if event["event"] == "decision"] == ["restart"] * 3 + ["ask"]


def test_a_fault_of_the_trial_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that fails for another reason is told as a warning, and the training begins as planned."""

    def broken(*_: Any, **__: Any) -> Any:
        raise TrainingError("a library is broken", "")

    monkeypatch.setattr(probe_steps, "probe_steps", broken)
    planned, seen = run_folder(tmp_path), list[dict[str, Any]]()
    start = (newest_attempt(planned), first_state(planned.recipe))
    with EventWriter(tmp_path / "events.jsonl", "sft") as written:
        rules = thresholds_of(KNOWLEDGE.rules["policy"])
        assert probe_first(planned, start, rules, written, seen.append, wanted=True) == start
    assert "a library is broken" in seen[-1]["message"]


def test_paths_of_a_recipe_hold_from_anywhere(tmp_path: Path) -> None:
    """The probe works in a folder of its own, so relative paths are those of the run folder."""
    (tmp_path / "data.jsonl").write_text("{}")
    found = anchored(recipe(), tmp_path)
    assert found.datasets[0].path == str(tmp_path / "data.jsonl")
    assert found.model.id == "tiny"


def seen(predicted: float, measured: float, **more: Any) -> Observation:
    band = Band(low=predicted * 0.9, expected=predicted, high=predicted * 1.1)
    return Observation(
        time="2026-11-25T00:00:00Z", kind="run", device="a processor", cpu_cores=2, tuner="lora",
        objective="sft", predicted_peak_bytes=band, measured_peak_bytes=round(measured), **more,
    )  # fmt: skip


def test_observations_are_kept_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run adds a line; cut lines are passed over; errors are those of predicted against measured."""
    monkeypatch.setenv("FTADVISOR_CALIBRATION", str(tmp_path / "new" / "calibration.jsonl"))
    for measured in (100, 80, 125):
        assert remember(seen(100.0, measured))
    file = calibration_file()
    assert file is not None
    file.write_bytes(file.read_bytes() + b'{"kind": "run", "cut')
    rate = Band(low=80.0, expected=100.0, high=120.0)
    remember(seen(1.0, 0.0, predicted_tokens_per_second=rate, measured_tokens_per_second=50.0))
    memory, speed = summarise(observations())
    assert unreadable_lines() == 1
    assert (speed.quantity, speed.above_high) == ("time a token", 1)
    assert speed.worst_error == pytest.approx(-0.5)
    assert (memory.quantity, memory.runs, memory.above_high) == ("memory", 3, 1)
    assert memory.median_error == pytest.approx(0.2)
    assert memory.worst_error == pytest.approx(0.25)


def test_a_home_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be: nothing is kept, nothing is raised."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTADVISOR_CALIBRATION", str(tmp_path / "file" / "calibration.jsonl"))
    assert not remember(seen(1.0, 1.0))
    assert observations() == ()


def test_nothing_is_kept_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name means no file; without the variable it lies in the person's data folder."""
    monkeypatch.setenv("FTADVISOR_CALIBRATION", "")
    assert calibration_file() is None
    assert not remember(seen(1.0, 1.0))
    monkeypatch.delenv("FTADVISOR_CALIBRATION")
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert calibration_file() == Path("/somewhere/ftadvisor/calibration.jsonl")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, 2e12),
        ({"device": "another"}, 1e12),
        ({"cpu_cores": 4}, 1e12),
        ({"packages": {"torch": "0.1"}}, None),
        ({"time": "2020-01-01T00:00:00Z"}, None),
        ({"disturbed": True}, 1e12),
        ({"date": ""}, 1e12),
    ],
    ids=["the last one", "another device", "other cores", "another torch", "too old", "busy", "no date"],
)
def test_rates_count_where_they_were_measured(
    change: dict[str, Any], found: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one of this device with these cores, undisturbed; none when torch has changed or it is old."""
    monkeypatch.setenv("FTADVISOR_CALIBRATION", str(tmp_path / "calibration.jsonl"))
    now = datetime.now(UTC).isoformat()
    for rate, differs in ((1e12, {}), (2e12, dict(change))):
        bench = MatrixBench(
            device="card", flops={"bf16": rate}, copy_bytes_per_second=1e9, seconds=1.0,
            date=differs.pop("date", now[:10]), disturbed=differs.pop("disturbed", False),
        )  # fmt: skip
        line = {"kind": "bench", "device": "card", "time": now, "packages": installed_packages(), **differs}
        remember(msgspec.structs.replace(seen(1.0, 1.0), bench=bench, **line))
    machine = Hardware(ram_bytes=1, ram_free_bytes=1, cpu_cores=2, cpu_name="card")
    rates = measured_rates(machine, recent_days=90)
    assert (rates and rates.flops["bf16"]) == found
