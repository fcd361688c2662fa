"""The supervisor with small stand-in programs in real processes: refusals, failures, signals, locks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

import advisor.run.launch
import advisor.run.machine
import advisor.run.stages
import advisor.run.supervisor
from advisor.errors import (
    DataError,
    DiskError,
    InputError,
    InterruptedRunError,
    ModelError,
    RefusedError,
    TrainingError,
    UnknownNameError,
)
from advisor.run.events import read_events
from advisor.run.folder import read_state
from advisor.run.lock import FolderLock
from advisor.run.page import write_page
from advisor.run.policy import Action
from advisor.run.supervisor import run_plan
from advisor.storage import read_record, write_json
from advisor.types import Asked, Measured, Observation, Recipe, RunReport
from cases import A100, plan
from cases import rows as planned_rows
from training import make_run, rows, run, write_rows

ROOT = Path(__file__).parent.parent.parent
HEAD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from advisor.run.events import EventWriter, stage_of
events = EventWriter(Path("events.jsonl"), stage_of(sys.argv[1], "sft"))
def step(n, loss=1.0, norm=1.0):
    events.write("step", step=n, total=5, loss=loss, grad_norm=norm, memory_bytes=1000 + n)
def say(kind, code, message):
    events.write("error", kind=kind, code=code, message=message, remedy="Do this.")
    sys.exit(1)
"""


class Stage:
    """A run folder whose program is a few lines of Python."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place / "run"
        self.data = write_rows(place / "data.jsonl", rows(3))
        make_run(self.folder, tuner="full", model=place, data=self.data)

    def program(self, body: str) -> Path:
        """Write the program and return the run folder."""
        (self.place / "recipes" / "sft").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "recipes" / "sft" / "program.toml", self.place / "recipes" / "sft")
        text = HEAD.format(root=str(ROOT)) + textwrap.dedent(body)
        (self.place / "recipes" / "sft" / "train.py").write_text(text)
        return self.folder

    @property
    def report(self) -> RunReport:
        """The report that was written."""
        return read_record(self.folder / "report.json", RunReport)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A place for programs that stand in for training."""
    for module in (advisor.run.launch, advisor.run.stages):
        monkeypatch.setattr(module, "recipes_dir", lambda: tmp_path / "recipes")
    return Stage(tmp_path)


def test_a_run_reports_what_its_events_say(stage: Stage) -> None:
    """Steps that were trained twice count once; peak, losses and held-out losses are taken from the
    events."""
    folder = stage.program(
        """
        events.write("data", supervised_tokens=44, rows=3)
        events.write("heldout", when="before", loss=3.0)
        for n in (1, 2, 3, 2, 3, 4, 5):
            step(n, loss=5.0 - n)
        events.write("heldout", when="after", loss=1.0)
        """
    )
    seen: list[dict[str, Any]] = []
    report = run(folder, on_event=seen.append)
    assert report == stage.report
    assert (report.status, report.steps, report.steps_planned) == ("done", 5, 5)
    assert (report.first_loss, report.last_loss) == (4.0, 0.0)
    assert (report.heldout_loss_before, report.heldout_loss_after) == (3.0, 1.0)
    assert (report.supervised_tokens, report.measured_peak_bytes) == (44, 1005)
    assert seen[0]["event"] == "start"
    assert seen[-1]["event"] == "end"
    assert seen == list(read_events(folder / "events.jsonl"))


def test_a_program_that_asks_nothing_is_judged_by_its_own_figures(stage: Stage) -> None:
    """A head that picks classes has no answers to compare; how many texts it classes right is its verdict."""
    make_run(stage.folder, tuner="full", model=stage.place, data=stage.data, evaluate=True)
    folder = stage.program(
        """
        events.write("heldout", when="before", loss=1.1, accuracy=0.2)
        step(1)
        events.write("heldout", when="after", loss=0.1, accuracy=0.9, texts=40, most_frequent_class=0.3)
        """
    )
    evaluation = run(folder).evaluation
    assert evaluation is not None
    assert evaluation.verdict == "better"
    assert evaluation.evidence[0].startswith("Held-out texts classed right: 30% before, 90% after")


def test_what_an_earlier_stage_forgot_is_not_forgiven(stage: Stage) -> None:
    """The general questions of a later stage are compared with the model before the first one."""
    make_run(stage.folder, tuner="full", model=stage.place, data=stage.data, evaluate=True)
    known, lost = (
        Measured(probes=tuple(
            Asked(prompt=f"{n}?", answer=str(right), tokens=1, ended=True, right=right) for n in range(20)
        ))
        for right in (True, False)
    )  # fmt: skip
    folder = stage.program("events.write('evaluation', when='before', rows=0, seconds=1.5); step(1)")
    for place, found in (("stages/1-sft/evaluation-before.json", known), ("evaluation-before.json", lost)):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / place, found)
    write_json(folder / "evaluation-after.json", lost)
    report = run(folder)
    assert report.evaluation_seconds == 1.5
    assert report.evaluation is not None
    assert any(
        "since before the first stage: 100% before, 0% after" in one for one in report.evaluation.evidence
    )


def test_the_program_has_no_network_and_a_group_of_its_own(stage: Stage) -> None:
    """The child is offline, sends no telemetry, and a terminal's Ctrl-C does not reach it directly."""
    folder = stage.program(
        """
        names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "OMP_NUM_THREADS")
        env = {n: os.environ.get(n) for n in names}
        events.write("note", message="x", env=env, group=os.getpgid(0), safe=sys.flags.safe_path)
        """
    )
    seen: list[dict[str, Any]] = []
    run(folder, on_event=seen.append)
    note = next(e for e in seen if e["event"] == "note")
    assert note["env"] == {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    assert note["group"] != os.getpgid(0)
    assert note["safe"]


@pytest.mark.parametrize(
    ("body", "error", "code", "says"),
    [
        ("say('DataError', 'data', 'Row 3 is bad.')", DataError, "data", "Row 3"),
        ("say('ModelError', 'chat_template', 'No template.')", ModelError, "chat_template", "No template"),
        ("say('RefusedError', 'refused', 'Not so.')", RefusedError, "refused", "Not so"),
        ("say('Strange', 'strange', 'Odd.')", TrainingError, "strange", "Odd"),
        ("raise RuntimeError('CUDA out of memory.')", TrainingError, "out_of_memory", "out of"),
        ("say('OutOfMemoryError', None, 'Out of memory.')", TrainingError, "out_of_memory", "ran out of"),
        ("raise MemoryError", TrainingError, "out_of_memory", "memory"),
        ("raise OSError(28, 'No space left on device')", DiskError, "disk", "full"),
        ("raise OSError(30, 'Read-only file system')", DiskError, "disk", "only be read"),
        ("raise RuntimeError('unexpected pos 64 vs 0')", DiskError, "disk", "written to its end"),
        ("os.kill(os.getpid(), signal.SIGKILL)", TrainingError, "killed", "from outside"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", TrainingError, "training", "SIGSEGV"),
        ("print('the last words'); sys.exit(7)", TrainingError, "training", "the last words"),
    ],
)  # fmt: skip
def test_a_failure_is_named_and_reported(
    stage: Stage, body: str, error: type[Exception], code: str, says: str
) -> None:
    """Each way to fail becomes one error with a remedy, and report.json says so too."""
    folder = stage.program(body)
    with pytest.raises(error, match=says) as caught:
        run(folder)
    assert caught.value.code == code  # type: ignore[attr-defined]
    assert caught.value.remedy  # type: ignore[attr-defined]
    assert stage.report.status == ("refused" if error is RefusedError else "failed")
    assert says in str(stage.report.error)


LADDER = """
import yaml
recipe = yaml.safe_load(Path(sys.argv[1]).read_text())
SET, ATTEMPT = recipe["settings"], (recipe["lineage"] or {"attempt": 1})["attempt"]
events.write("model", device="cpu")
def save(n):
    events.write("checkpoint", step=n, path=f"checkpoints/checkpoint-{n}", bytes=100)
def measure(n, loss, when=None):
    events.write("heldout", when=when or f"at step {n}", step=n, loss=loss)
def too_big():
    say("OutOfMemoryError", None, "CUDA out of memory.")
"""


def test_after_running_out_of_memory_the_next_attempt_needs_less(stage: Stage) -> None:
    """One rung at a time; the derived recipes lie beside the planned one, which stays as it is."""
    folder = stage.program(LADDER + "step(1); save(1)\nif SET['micro_batch'] > 1: too_big()\nstep(5)")
    planned = (folder / "recipe.yaml").read_bytes()
    seen: list[dict[str, Any]] = []
    report = run(folder, on_event=seen.append)
    assert report.status == "done"
    assert [e["changes"] for e in seen if e["event"] == "decision"] == [
        {"micro_batch": 2},
        {"micro_batch": 1},
    ]
    assert [e["recipe"] for e in seen if e["event"] == "start"] == [
        "recipe.yaml", "attempt-2.recipe.yaml", "attempt-3.recipe.yaml"
    ]  # fmt: skip
    assert (folder / "recipe.yaml").read_bytes() == planned
    last = read_record(folder / "attempt-3.recipe.yaml", Recipe)
    assert (last.settings["micro_batch"], last.settings["effective_batch"]) == (1, 8)
    assert last.lineage is not None
    assert len(last.lineage.of) == 2
    assert {e["stage"] for e in seen} == {"sft"}


def test_what_needs_consent_is_asked_and_a_resume_may_allow_it(stage: Stage) -> None:
    """Without an answer the run stops and names the word; with it, or with a yes, rows become shorter."""
    folder = stage.program(
        LADDER + "step(1)\nif SET['max_seq_len'] > 300 or SET['micro_batch'] > 1: too_big()\nstep(5)"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes().replace(b"max_seq_len: 128", b"max_seq_len: 512"))
    with pytest.raises(TrainingError, match="at most 384") as caught:
        run(folder)
    assert "--allow shorter-sequences" in caught.value.remedy
    asked: list[str] = []

    def no(action: Action) -> bool:
        asked.append(action.consent)
        return False

    with pytest.raises(TrainingError):
        run_plan(folder, resume=True, on_event=lambda _: None, offline=True, ask=no)
    assert asked == ["shorter-sequences"]
    allowed = ("shorter-sequences",)
    report = run_plan(folder, resume=True, on_event=lambda _: None, offline=True, allowed=allowed)
    assert report.status == "done"
    newest = sorted(folder.glob("attempt-*"))[-1]
    assert read_record(newest, Recipe).settings["max_seq_len"] == 288


def test_a_broken_loss_goes_back_twice_and_then_stops(stage: Stage) -> None:
    """Each attempt has a lower rate; the last one ends with an explanation, and all is in the report."""
    folder = stage.program(LADDER + "step(1); save(1); step(2, loss=float('nan')); time.sleep(60)")
    with pytest.raises(TrainingError, match="2 times did not help"):
        run(folder)
    assert len(stage.report.decisions) == 3
    last = read_record(folder / "attempt-3.recipe.yaml", Recipe)
    assert last.settings["learning_rate"] == pytest.approx(5e-3 / 9)
    assert last.lineage is not None
    assert last.lineage.newest_step == 1


def test_a_rising_heldout_loss_makes_the_best_checkpoint_the_result(stage: Stage) -> None:
    """The program is started once more, only to save what was best."""
    folder = stage.program(
        LADDER
        + """
if recipe["lineage"]:
    assert recipe["lineage"]["finish"] and recipe["lineage"]["newest_step"] == 1
    Path("model").mkdir()
    measure(1, 1.0, when="after")
    sys.exit(0)
for n, loss in enumerate((1.0, 1.5, 2.0, 3.0), start=1):
    step(n); save(n); measure(n, loss)
time.sleep(60)
"""
    )
    report = run(folder)
    assert (report.status, report.heldout_loss_after) == ("done", 1.0)
    assert "The checkpoint of step 1 is the result" in report.decisions[0]


def test_a_killed_program_steps_down_only_when_the_kernel_counted_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill that the kernel counts is memory; one that it does not was somebody's wish."""
    body = LADDER + "step(1)\nif SET['micro_batch'] > 2: os.kill(os.getpid(), signal.SIGKILL)\nstep(5)"
    folder = stage.program(body)
    with pytest.raises(TrainingError) as caught:
        run(folder)
    assert caught.value.code == "killed"
    counts = iter(range(100))
    monkeypatch.setattr(advisor.run.machine, "oom_kills", lambda *_: next(counts))
    report = run(folder, resume=True)
    assert report.status == "done"
    assert "2 instead of 4 rows" in report.decisions[0]


def test_an_interrupted_run_is_not_started_again(stage: Stage) -> None:
    """Who presses Ctrl-C gets the end of the run, whatever the program dies of."""
    folder = stage.program(
        LADDER
        + """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
step(1)
while not asked: time.sleep(0.01)
too_big()
"""
    )
    press: list[int] = []

    def once(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not press:
            press.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingError) as caught:
        run(folder, on_event=once)
    assert caught.value.code == "out_of_memory"
    assert not list(folder.glob("attempt-*"))


def test_a_resumed_run_goes_on_with_its_derived_recipe(stage: Stage) -> None:
    """What the supervisor decided before it was killed is not decided again."""
    folder = stage.program(
        LADDER
        + """
step(1); save(1)
if SET["micro_batch"] > 2: too_big()
if not Path("again").exists():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(5)
step(5)
"""
    )
    _run_elsewhere(stage, folder).wait()
    (folder / "again").touch()
    seen: list[dict[str, Any]] = []
    deadline = time.monotonic() + 10
    while True:
        try:
            assert run(folder, resume=True, on_event=seen.append).status == "done"
            break
        except RefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert [e["recipe"] for e in seen if e["event"] == "start"] == ["attempt-2.recipe.yaml"]
    (folder / "report.json").unlink()
    events = folder / "events.jsonl"
    events.write_bytes(events.read_bytes().replace(b'"status":"done"', b'"status":"failed"'))
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes() + b"\n")
    with pytest.raises(RefusedError, match="was changed since"):
        run(folder, resume=True)


def test_a_cut_line_in_the_events_is_passed_over(stage: Stage) -> None:
    """A line that a crash cut off costs that line only; the next run closes it and goes on."""
    folder = stage.program("step(1); save_nothing = 1; sys.exit(1)")
    with pytest.raises(TrainingError):
        run(folder)
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"time":"2026-01-01T00:00:00Z","stage":"sft","event":"step","st')
    stage.program("step(2); step(5)")
    report = run(folder, resume=True)
    assert (report.status, report.steps) == ("done", 5)


def test_a_folder_that_cannot_be_written_is_said(stage: Stage) -> None:
    """No traceback, no half-written run: the folder and the reason."""
    folder = stage.program("step(1)")
    (folder / ".lock").mkdir()
    with pytest.raises(DiskError, match="Cannot write into"):
        run(folder)


def test_the_first_interrupt_asks_and_the_second_kills(stage: Stage) -> None:
    """A program that does not stop when asked is ended by the second Ctrl-C."""
    folder = stage.program(
        """
        signal.signal(signal.SIGTERM, lambda *_: events.write("note", message="asked"))
        step(1)
        time.sleep(60)
        time.sleep(60)
        """
    )

    def press(event: dict[str, Any]) -> None:
        if event["event"] == "step" or event.get("message") == "asked":
            os.kill(os.getpid(), signal.SIGINT)

    begin = time.monotonic()
    with pytest.raises(InterruptedRunError):
        run(folder, on_event=press)
    assert time.monotonic() - begin < 20
    assert stage.report.status == "interrupted"


def test_an_interrupt_lets_the_program_finish_well(stage: Stage) -> None:
    """A program that ends its work although it was asked to stop is done, not interrupted."""
    folder = stage.program(
        """
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        step(1)
        while not asked:
            time.sleep(0.01)
        """
    )
    report = run(
        folder, on_event=lambda e: os.kill(os.getpid(), signal.SIGINT) if e["event"] == "step" else None
    )
    assert report.status == "done"


def test_a_second_run_in_the_folder_is_refused(stage: Stage) -> None:
    """While one run works, another one is told which process holds the folder."""
    folder = stage.program("step(1)")
    refused: list[RefusedError] = []

    def again(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            with pytest.raises(RefusedError) as caught:
                run(folder, resume=True)
            refused.append(caught.value)

    run(folder, on_event=again)
    assert refused[0].code == "folder_locked"
    assert str(os.getpid()) in refused[0].message


def test_a_lock_left_by_a_dead_process_does_not_hold(stage: Stage) -> None:
    """Only a living process holds the folder, whatever the lock file says."""
    folder = stage.program("step(1)")
    (folder / ".lock").write_text("1\n")
    assert run(folder).status == "done"


def test_a_used_folder_needs_resume(stage: Stage) -> None:
    """A finished folder points to the export, an unfinished one to --resume; nothing is overwritten."""
    folder = stage.program("step(1); sys.exit(1)")
    with pytest.raises(TrainingError):
        run(folder)
    with pytest.raises(RefusedError, match="unfinished") as caught:
        run(folder)
    assert "--resume" in caught.value.remedy
    stage.program("step(2)")
    done = run(folder, resume=True)
    assert run(folder, resume=True) == done
    with pytest.raises(RefusedError, match="already trained") as caught:
        run(folder)
    assert "export" in caught.value.remedy


def test_a_changed_recipe_or_dataset_is_not_resumed(stage: Stage) -> None:
    """Checkpoints belong to one recipe and one dataset."""
    folder = stage.program("step(1); sys.exit(1)")
    with pytest.raises(TrainingError):
        run(folder)
    recipe = folder / "recipe.yaml"
    before = recipe.read_bytes()
    recipe.write_bytes(before.replace(b"seed: 7", b"seed: 8"))
    with pytest.raises(RefusedError, match=r"recipe\.yaml was changed"):
        run(folder, resume=True)
    recipe.write_bytes(before)
    write_rows(stage.data, rows(4))
    with pytest.raises(RefusedError, match="data was changed"):
        run(folder, resume=True)


def test_data_that_changed_since_the_plan_is_said(stage: Stage) -> None:
    """The run goes on, with a warning."""
    folder = stage.program("step(1)")
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes().replace(b"sha256: null", b"sha256: abc"))
    seen: list[dict[str, Any]] = []
    run(folder, on_event=seen.append)
    assert any(e["event"] == "warning" and "changed since the plan" in e["message"] for e in seen)


def test_too_little_disk_is_said_before_anything_starts(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are in the message, and the folder stays unused."""
    folder = stage.program("step(1)")
    job = advisor.run.stages.read_jobs(folder)[0]
    band = {"low": 1.0, "expected": 2.0, "high": 3.0}
    estimate = {"peak_bytes": band, "parts": {}, "seconds": band, "disk_bytes": 1 << 60}
    planned = msgspec.structs.replace(
        job, estimate=msgspec.convert(estimate, advisor.run.stages.StageEstimate)
    )
    monkeypatch.setattr(advisor.run.supervisor, "read_jobs", lambda _: (planned,))
    with pytest.raises(DiskError, match="are free"):
        run(folder)
    assert not list(read_events(folder / "events.jsonl"))


def test_what_is_missing_is_said(stage: Stage) -> None:
    """No folder, no recipe, no data, no program: each names the thing."""
    with pytest.raises(InputError, match="no run folder"):
        run(stage.place / "nowhere")
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        run(stage.place)
    with pytest.raises(RefusedError, match="no training program 'sft'"):
        run(stage.folder)
    folder = stage.program("step(1)")
    stage.data.unlink()
    with pytest.raises(DataError, match=r"data\.jsonl"):
        run(folder)


def test_curves_that_cannot_be_written_are_refused_before_anything_starts(stage: Stage) -> None:
    """What is asked for and not installed is named, with the way out."""
    folder = stage.program("step(5)")
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes().replace(b"settings:\n", b"settings:\n  report_to: mlflow\n"))
    with pytest.raises(RefusedError, match="mlflow, which is not installed"):
        run(folder)


def test_a_wrong_setting_is_said_at_once(stage: Stage) -> None:
    """The nearest accepted key is named, before any slow import."""
    folder = stage.program("step(1)")
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes().replace(b"warmup_ratio", b"warm_up_ratio"))
    with pytest.raises(UnknownNameError, match="warmup_ratio"):
        run(folder)


def test_a_finished_run_is_remembered_and_a_failed_one_is_not(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line without paths; `estimate --calibration` names the file; deleting it forgets."""
    kept = stage.place / "calibration.jsonl"
    monkeypatch.setenv("FTADVISOR_CALIBRATION", str(kept))
    folder = stage.program("if not Path('go').exists(): say('TrainingError', 'mishap', 'not yet')\nstep(5)")
    with pytest.raises(TrainingError):
        run(folder)
    assert not kept.exists()
    (folder / "go").touch()
    run(folder, resume=True)
    (line,) = kept.read_bytes().splitlines()
    seen = msgspec.json.decode(line, type=Observation)
    assert (seen.kind, seen.tuner, seen.steps, seen.measured_peak_bytes) == ("run", "full", 5, 1005)
    assert seen.measured_seconds
    assert seen.packages
    assert str(stage.place) not in line.decode()
    answer = [sys.executable, "-m", "advisor", "estimate", "--calibration"]
    assert str(kept) in subprocess.run(answer, capture_output=True, text=True, check=True).stdout.replace(
        "\n", ""
    )
    kept.unlink()
    assert (
        "Nothing was trained here yet"
        in subprocess.run(answer, capture_output=True, text=True, check=True).stdout
    )


TWO_STAGES = """
mark = Path("checkpoints/mark")
if Path("go").exists() and Path("again").exists():
    assert mark.read_text() == "recipe-2-sft.yaml"
mark.parent.mkdir(exist_ok=True)
mark.write_text(sys.argv[1])
if "2-" in sys.argv[1]:
    assert Path("stages/1-sft/model/weights").read_text() == "recipe-1-sft.yaml"
    if not Path("go").exists():
        Path("model").mkdir()
        say("TrainingError", "mishap", "not yet")
Path("model").mkdir(exist_ok=True)
Path("model/weights").write_text(sys.argv[1])
events.write("heldout", when="before", loss=1.0)
step(5)
events.write("heldout", when="after", loss=2.0)
"""


def _in_two(stage: Stage) -> Path:
    folder = stage.program(TWO_STAGES)
    recipe = (folder / "recipe.yaml").read_bytes()
    (folder / "recipe.yaml").unlink()
    for number in (1, 2):
        (folder / f"recipe-{number}-sft.yaml").write_bytes(recipe)
    return folder


def test_stages_follow_each_other_and_go_on_where_it_failed(stage: Stage) -> None:
    """The second begins with the first's result; after a failure in it, only the second is trained again. The
    report at the end has the outcome of both."""
    folder = _in_two(stage)
    with pytest.raises(TrainingError, match="not yet"):
        run(folder)
    assert stage.report.status == "failed"
    assert (folder / "stages" / "1-sft" / "model" / "weights").is_file()
    assert read_record(folder / "stages" / "1-sft" / "report.json", RunReport).status == "done"
    for name in ("go", "again"):
        (folder / name).touch()
    seen: list[dict[str, Any]] = []
    assert run(folder, resume=True, on_event=seen.append).status == "done"
    assert {event["stage"] for event in seen} == {"2-sft"}
    assert (folder / "model" / "weights").read_text() == "recipe-2-sft.yaml"
    assert run(folder, resume=True) == stage.report
    (first,) = stage.report.earlier_stages
    assert (first.stage, first.steps) == ("1-sft", 5)


def test_a_kill_while_a_result_is_put_away_loses_nothing(stage: Stage) -> None:
    """Killed between the move and the report, the next run finishes the move and goes on with stage two."""
    folder = _in_two(stage)
    with pytest.raises(TrainingError, match="not yet"):
        run(folder)
    (folder / "stages" / "1-sft" / "report.json").unlink()
    shutil.rmtree(folder / "model")  # what the second stage had begun
    (folder / "go").touch()
    seen: list[dict[str, Any]] = []
    run(folder, resume=True, on_event=seen.append)
    assert {event["stage"] for event in seen} == {"2-sft"}
    again = read_record(folder / "stages" / "1-sft" / "report.json", RunReport)
    assert again.artefacts == {"model": "stages/1-sft/model"}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_the_next_stage_does_not_begin_without_the_result_of_the_one_before(
    stage: Stage, damage: str
) -> None:
    """It would begin from the untrained base without a word."""
    folder = _in_two(stage)
    with pytest.raises(TrainingError, match="not yet"):
        run(folder)
    result = folder / "stages" / "1-sft" / "model"
    if damage == "gone":
        shutil.rmtree(result)
    else:
        save_file({"weight": np.ones(4)}, result / "model.safetensors")
        whole = (result / "model.safetensors").read_bytes()
        (result / "model.safetensors").write_bytes(whole[:-1])
    (folder / "go").touch()
    with pytest.raises(InputError, match=r"neither adapter/ nor model/|cut short"):
        run(folder, resume=True)
    if damage == "cut":
        (result / "model.safetensors").write_bytes(whole)
        assert run(folder, resume=True).status == "done"


def test_a_stage_that_did_not_help_is_said(stage: Stage) -> None:
    """Where the loss on unseen rows rose, a warning tells it before the next stage begins."""
    folder = _in_two(stage)
    (folder / "go").touch()
    seen: list[dict[str, Any]] = []
    run(folder, on_event=seen.append)
    told = [event["event"] for event in seen if event["stage"] == "1-sft"]
    assert told.index("warning") < told.index("end")


def test_a_finished_stage_whose_recipe_was_changed_is_refused(stage: Stage) -> None:
    """What was trained then is not what is planned now."""
    folder = _in_two(stage)
    with pytest.raises(TrainingError):
        run(folder)
    recipe = folder / "recipe-1-sft.yaml"
    recipe.write_bytes(recipe.read_bytes().replace(b"seed: 7", b"seed: 8"))
    with pytest.raises(RefusedError, match="was changed since its stage"):
        run(folder, resume=True)


def test_several_devices_are_not_forgotten(stage: Stage) -> None:
    """A plan for more than one device is not quietly run on one by a recipe that forgets it."""
    folder = stage.program("step(1)")
    made = plan(planned_rows(), hardware=A100 | {"count": 4}, model="Qwen/Qwen3-32B", requested_method="full")
    assert made.parallel != "none"
    write_json(folder / "plan.json", made)
    with pytest.raises(RefusedError, match=made.parallel):
        run(folder)


def test_the_program_ends_with_its_supervisor(stage: Stage) -> None:
    """When the supervisor is killed, the program is asked to stop, and the folder is free again."""
    folder = stage.program(
        """
        from advisor.train.process import StopRequest, end_with_parent
        stop = StopRequest(); stop.install(); end_with_parent()
        step(1)
        while not stop.asked:
            time.sleep(0.01)
        events.write("note", message="stopped well")
        """
    )
    supervisor = _run_elsewhere(stage, folder)
    _wait_for(folder, "step")
    supervisor.kill()
    supervisor.wait()
    assert _wait_for(folder, "note")["message"] == "stopped well"
    deadline = time.monotonic() + 10
    while True:
        try:
            with FolderLock(folder):
                return
        except RefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _run_elsewhere(stage: Stage, folder: Path) -> subprocess.Popen[bytes]:
    """Start the supervisor in a process of its own, which may be killed."""
    script = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import advisor.run.launch, advisor.run.supervisor
for module in (advisor.run.launch, advisor.run.stages):
    module.recipes_dir = lambda: Path({str(stage.place / "recipes")!r})
from training import run
run(Path({str(folder)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", script])


def _wait_for(folder: Path, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for event in read_events(folder / "events.jsonl"):
            if event["event"] == name:
                return event
        time.sleep(0.05)
    raise AssertionError(f"no event {name!r}")


def test_a_killed_run_is_listed_with_its_steps(stage: Stage) -> None:
    """What the events say is shown, whatever an earlier report says; a living run is called running."""
    folder = stage.program("step(1); step(2, loss=0.5); time.sleep(60)")
    supervisor = _run_elsewhere(stage, folder)
    _wait_for(folder, "step")
    write_json(folder / "plan.json", plan(planned_rows(), model="Qwen/Qwen3-8B"))
    deadline = time.monotonic() + 20
    while read_state(folder).steps < 2:
        assert time.monotonic() < deadline
    assert read_state(folder).status == "running"
    pid = _wait_for(folder, "start")["pid"]
    supervisor.kill()
    supervisor.wait()
    os.killpg(pid, signal.SIGKILL)
    while read_state(folder).status == "running":
        assert time.monotonic() < deadline
    state = read_state(folder)
    assert (state.status, state.steps, state.steps_planned, state.last_loss) == ("unfinished", 2, 5, 0.5)


def test_a_run_without_a_plan_has_no_page(stage: Stage) -> None:
    """A folder of recipes alone is trained like any other; the page, which tells the plan, is left out."""
    folder = stage.program("step(1)")
    assert run(folder).status == "done"
    assert write_page(folder) is None
