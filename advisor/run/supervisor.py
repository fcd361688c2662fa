"""Runs a planned training: checks, starts the program, follows it, ends it well, writes the report.

Goes in: a run folder with plan.json and one recipe a stage. Comes out: the trained result, events.jsonl,
report.json. Never does: import torch; train in its own process; start on a folder that another run is using.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from advisor.errors import (
    AdvisorError,
    DataError,
    DiskError,
    InterruptedRunError,
    RefusedError,
    TrainingError,
)
from advisor.probe.software import installed_packages
from advisor.rows import data_files
from advisor.run.events import Event, EventReader, EventWriter, read_events
from advisor.run.failures import classify
from advisor.run.launch import LOG, Interrupts, require_packages, start_program
from advisor.run.lock import FolderLock
from advisor.run.policy import Action, RunState, advance, decide
from advisor.run.report import Status, build_report
from advisor.run.stages import EVENTS, REPORT, Job, got_worse, is_done, is_put_away, put_away, read_jobs
from advisor.storage import read_record, write_json
from advisor.types import Recipe, RunReport
from advisor.units import format_bytes

ARTEFACTS = {"adapter": "adapter", "model": "model"}
LOOK_EVERY_SECONDS = 0.1
LOG_TAIL_BYTES = 16384
OnEvent = Callable[[Event], None]


def run_plan(folder: Path, *, resume: bool, on_event: OnEvent, offline: bool) -> RunReport:
    """Train what a run folder plans, in a process of its own.

    Args:
        folder: written by `ftadvisor plan`.
        resume: go on from the newest whole checkpoint of an earlier, unfinished run of this folder.
        on_event: called with every event as it happens.
        offline: do not fetch a model that is not on this machine.

    Returns:
        The report, which also lies in report.json. A finished run returns its report again under `resume`.

    Raises:
        RefusedError: the folder is used, locked, or plans what cannot be run.
        DiskError: not enough space, or not writable.
        TrainingError, DataError, ModelError, HubError: what stopped the run; report.json holds it too.
        InterruptedRunError: a person stopped it.
    """
    jobs = read_jobs(folder)
    with FolderLock(folder) as lock:
        finished = _finished(folder, resume=resume)
        if finished is not None:
            return finished
        for job in jobs[:-1]:
            if not is_done(job):
                _run_stage(job, lock=lock, resume=resume, on_event=on_event, offline=offline)
            if not is_put_away(job):
                put_away(job, _report(job, status="done", error=None))
        return _run_stage(jobs[-1], lock=lock, resume=resume, on_event=on_event, offline=offline)


def _run_stage(job: Job, *, lock: FolderLock, resume: bool, on_event: OnEvent, offline: bool) -> RunReport:
    """Train one stage and write its report; whatever went wrong is raised after that."""
    folder = Path(job.folder)
    with EventWriter(folder / EVENTS, job.stage) as events:
        data = _check_data(job, resume=resume)
        require_packages(job.recipe)
        _check_disk(job)
        _fetch_model(job.recipe, offline=offline)
        reader = EventReader(folder / EVENTS, from_end=True)
        started = time.monotonic()
        process = start_program(folder, Path(job.recipe_file), job.recipe.program, lock=lock.handle)
        try:
            events.write(
                "start", resume=resume, recipe_sha256=job.recipe_sha256, data_sha256=data, pid=process.pid
            )
            for message in _drift(job, data):
                events.write("warning", message=message)
            error = _follow(process, folder, events, reader, on_event)
        finally:
            _end_group(process)
        status = _status(error)
        report = _report(job, status=status, error=error)
        if status == "done" and (words := got_worse(report)):
            events.write("warning", message=words)
        events.write("end", status=status, seconds=round(time.monotonic() - started, 3))
        for event in reader.new_events():
            on_event(event)
        report = _report(job, status=status, error=error)
        if error is not None or job.last:
            write_json(folder / REPORT, report)
    if error is not None:
        raise error
    return report


def _finished(folder: Path, *, resume: bool) -> RunReport | None:
    """Return the report of a run that is done; refuse a used folder without `resume`."""
    report = read_record(folder / REPORT, RunReport) if (folder / REPORT).is_file() else None
    used = any(True for _ in read_events(folder / EVENTS))
    if not used and not resume:
        return None
    if report is not None and report.status == "done":
        if resume:
            return report
        raise RefusedError(
            f"{folder} was already trained.", f"Export it: ftadvisor export {folder}", code="folder_in_use"
        )
    if not resume:
        raise RefusedError(
            f"{folder} holds an unfinished run.",
            f"Go on with it: ftadvisor run {folder} --resume. Or plan into another folder.",
            code="folder_in_use",
        )
    return None


def _check_data(job: Job, *, resume: bool) -> dict[str, str]:
    """Return name -> SHA-256 of the datasets; a resumed run needs the data and recipe it began with."""
    found = {one.name: _data_sha256(Path(job.folder) / one.path) for one in job.recipe.datasets}
    starts = [
        event
        for event in read_events(Path(job.folder) / EVENTS)
        if event["event"] == "start" and event.get("stage") == job.stage
    ]
    if not resume or not starts:
        return found
    if starts[-1].get("recipe_sha256") != job.recipe_sha256:
        raise RefusedError(
            f"{job.recipe_file} was changed since this run began, so its checkpoints do not fit it any more.",
            "Undo the change, or plan into another folder.",
        )
    if starts[-1].get("data_sha256") != found:
        raise RefusedError(
            "The training data was changed since this run began; resuming would mix two datasets.",
            "Put the old file back, or plan into another folder.",
        )
    return found


def _data_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        for file in data_files(path):
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
    except OSError as problem:
        raise DataError(
            f"Cannot read {path}: {problem.strerror}.", "Check the path in recipe.yaml."
        ) from problem
    return digest.hexdigest()


def _drift(job: Job, found: dict[str, str]) -> list[str]:
    """Say which datasets are not what they were when the plan was made."""
    return [
        f"{one.path} was changed since the plan was made; the plan's figures may not hold."
        for one in job.recipe.datasets
        if one.sha256 is not None and one.sha256 != found[one.name]
    ]


def _check_disk(job: Job) -> None:
    if job.estimate is None:
        return
    folder = Path(job.folder)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = job.estimate.disk_bytes - there, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"Checkpoints and the result need {format_bytes(needed)} in {folder}; only "
            f"{format_bytes(free)} are free.",
            "Free some space, plan into another folder (--out), or keep less: --set keep_checkpoints=1.",
        )


def _fetch_model(recipe: Recipe, *, offline: bool) -> None:
    """Make sure that a model from the hub lies on this machine; the program itself has no network."""
    model = recipe.model
    if "starter" in (model.id, model.path) or model.path is not None or Path(model.id).exists():
        return
    from advisor.probe.hub import fetch_model

    fetch_model(model.id, revision=model.revision, offline=offline)


def _follow(
    process: subprocess.Popen[bytes],
    folder: Path,
    events: EventWriter,
    reader: EventReader,
    on_event: OnEvent,
) -> AdvisorError | None:
    """Pass events on and act on them until the program ends; return what went wrong."""
    state, asked = RunState(), 0
    stopped: Action | None = None
    error: Event | None = None
    with Interrupts() as interrupts:
        while True:
            status = process.poll()
            for event in reader.new_events():
                on_event(event)
                error = event if event["event"] == "error" else error
                action = decide(state, event)
                state = advance(state, event)
                if action.kind == "stop":
                    stopped, state = action, msgspec.structs.replace(state, stopped=True)
                    events.write("decision", action="stop", code=action.code, message=action.reason)
                    _end_group(process)
            if status is not None:
                break
            if interrupts.count > asked:
                asked = interrupts.count
                _interrupt(process, events, times=asked)
            time.sleep(LOOK_EVERY_SECONDS)
    if stopped is not None:
        return TrainingError(stopped.reason, stopped.remedy, code=stopped.code)
    if status == 0:
        return None
    if asked and error is None:
        return InterruptedRunError(
            "The run was interrupted; its checkpoints are kept.", f"Go on: ftadvisor run {folder} --resume"
        )
    return classify(status, error, _log_tail(folder / LOG))


def _status(error: AdvisorError | None) -> Status:
    if error is None:
        return "done"
    if isinstance(error, InterruptedRunError):
        return "interrupted"
    return "refused" if isinstance(error, RefusedError) else "failed"


def _interrupt(process: subprocess.Popen[bytes], events: EventWriter, *, times: int) -> None:
    """First ask the program to save and stop; the second time end it."""
    if times == 1:
        events.write(
            "note", message="Stopping: the step is finished and saved. Ctrl-C again ends it at once."
        )
        process.send_signal(signal.SIGTERM)
    else:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and whatever it started, if it still lives."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _log_tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def _report(job: Job, *, status: Status, error: AdvisorError | None) -> RunReport:
    folder = Path(job.folder)
    events = [event for event in read_events(folder / EVENTS) if event.get("stage") == job.stage]
    artefacts = {name: place for name, place in ARTEFACTS.items() if (folder / place).is_dir()}
    saved = [event["path"] for event in events if event["event"] == "checkpoint"]
    if saved and (folder / saved[-1]).is_dir():
        artefacts["checkpoint"] = saved[-1]
    return build_report(
        events,
        job.recipe,
        recipe_sha256=job.recipe_sha256,
        status=status,
        estimate=job.estimate,
        artefacts=artefacts,
        packages=installed_packages(),
        error=error,
    )
