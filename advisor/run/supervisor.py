"""Runs a planned training: checks, starts the program, follows it, ends it well, writes the report.

Goes in: a run folder with plan.json and one recipe a stage. Comes out: the trained result, events.jsonl,
report.json. Never does: import torch; train in its own process; start on a folder that another run is using.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from advisor.errors import AdvisorError, InterruptedRunError, RefusedError
from advisor.knowledge import load
from advisor.probe.calibration import remember
from advisor.probe.software import installed_packages
from advisor.run.attempts import Attempt, derive, newest_attempt
from advisor.run.changes import trainer_figures
from advisor.run.checks import check_data, check_disk, drift, fetch_model
from advisor.run.events import EventReader, EventWriter, read_events
from advisor.run.follow import Ask, Follower, OnEvent, begin
from advisor.run.ladder import Trainee
from advisor.run.launch import require_packages, start_program
from advisor.run.lock import FolderLock
from advisor.run.observe import observed
from advisor.run.probe_steps import probe_first
from advisor.run.report import Status, build_report, figures_of_both, outcome
from advisor.run.signs import RunState
from advisor.run.stages import (
    EVALUATIONS,
    EVENTS,
    REPORT,
    Job,
    got_worse,
    is_done,
    is_put_away,
    put_away,
    read_jobs,
    require_result,
)
from advisor.run.thresholds import Thresholds, thresholds_of
from advisor.run.verdict import judge
from advisor.storage import read_record, write_json
from advisor.types import Evaluation, Measured, Record, RunReport

ARTEFACTS = {"adapter": "adapter", "model": "model"}


class How(Record, frozen=True, kw_only=True):
    """How a person wants a folder to be run."""

    resume: bool
    offline: bool
    allowed: tuple[str, ...] = ()
    """Words of `run --allow`: what may be changed that is not changed unasked."""
    probe: bool | None = None
    """Try a few real steps first; None: where memory is scarce or the training is long."""


def run_plan(
    folder: Path, *, resume: bool, on_event: OnEvent, offline: bool, allowed: tuple[str, ...] = (),
    ask: Ask = lambda _: False, probe: bool | None = None,
) -> RunReport:  # fmt: skip
    """Train what a run folder plans, in a process of its own or one for each device.

    Args:
        folder: written by `ftadvisor plan`.
        resume: go on from the newest whole checkpoint of an earlier, unfinished run of this folder.
        on_event: called with every event as it happens.
        offline: do not fetch a model that is not on this machine.
        allowed: what a person allows beforehand, as `shorter-sequences`.
        ask: asks a person whether something may be changed; without one, nothing is.
        probe: try a few real steps first; None: where memory is scarce or the training is long.

    Returns:
        The report, which also lies in report.json. A finished run returns its report again under `resume`.

    Raises:
        RefusedError: the folder is used, locked, or plans what cannot be run.
        DiskError: not enough space, or not writable.
        TrainingError, DataError, ModelError, HubError: what stopped the run; report.json holds it too.
        InterruptedRunError: a person stopped it.
    """
    jobs = read_jobs(folder)
    how = How(resume=resume, offline=offline, allowed=allowed, probe=probe)
    with FolderLock(folder) as lock:
        finished = _finished(folder, resume=resume)
        if finished is not None:
            return _beside_the_others(jobs[-1], finished)
        for job in jobs[:-1]:
            if not is_done(job):
                _run_stage(job, how, lock=lock, on_event=on_event, ask=ask)
            if not is_put_away(job):
                put_away(job, report_of(job, status="done", error=None))
            require_result(job)
        report = _run_stage(jobs[-1], how, lock=lock, on_event=on_event, ask=ask)
        return _beside_the_others(jobs[-1], report)


def _beside_the_others(job: Job, report: RunReport) -> RunReport:
    """Put the last of several results with a folder each away too; the run folder keeps its report."""
    if not job.apart or is_put_away(job):
        return report
    report = put_away(job, report)
    write_json(Path(job.folder) / REPORT, report)
    return report


def _run_stage(job: Job, how: How, *, lock: FolderLock, on_event: OnEvent, ask: Ask) -> RunReport:
    """Train one stage and write its report; whatever went wrong is raised after that."""
    folder = Path(job.folder)
    with EventWriter(folder / EVENTS, job.stage) as events:
        data = check_data(job, resume=how.resume)
        require_packages(job.recipe)
        check_disk(job)
        fetch_model(job.recipe, offline=how.offline)
        rules = thresholds_of(load().rules["policy"])
        attempt = newest_attempt(job)
        start = (attempt, _first_state(job, attempt, how, rules))
        if not _began(job):
            start = probe_first(job, start, rules, events, on_event, wanted=how.probe)
        reader = EventReader(folder / EVENTS, from_end=True)
        follower = Follower(folder, events, reader, rules, on_event=on_event, ask=ask)
        warnings = drift(job, data)

        def told(attempt: Attempt, pid: int) -> None:
            lineage, planned = attempt.recipe.lineage, job.estimate
            events.write(
                "start", resume=how.resume, recipe_sha256=job.recipe_sha256, data_sha256=data, pid=pid,
                attempt=attempt.number, recipe=attempt.file,
                newest_step=lineage.newest_step if lineage else None,
                predicted_peak_bytes=msgspec.structs.asdict(planned.peak_bytes) if planned else None,
            )  # fmt: skip
            while warnings:
                events.write("warning", message=warnings.pop(0))

        started = time.monotonic()
        error = _attempts(job, start, follower, lock=lock, told=told)
        status = _status(error)
        report = report_of(job, status=status, error=error)
        if status == "done":
            for words in filter(None, (got_worse(report), *report.not_learned, *report.forgotten)):
                events.write("warning", message=words)
        events.write("end", status=status, seconds=round(time.monotonic() - started, 3))
        for event in reader.new_events():
            on_event(event)
        report = report_of(job, status=status, error=error)
        if status == "done":
            remember(observed(job, report))
        if error is not None or job.last:
            write_json(folder / REPORT, report)
    if error is not None:
        raise error
    return report


def _attempts(
    job: Job, start: tuple[Attempt, RunState], follower: Follower, *, lock: FolderLock,
    told: Callable[[Attempt, int], None],
) -> AdvisorError | None:  # fmt: skip
    """Start the program until an attempt is the last one; return what went wrong.

    The policy restarts only by using up something finite, so this ends."""
    attempt, state = start
    folder = Path(job.folder)
    while True:
        workers = start_program(folder, Path(attempt.file), attempt.recipe, lock=lock.handle)
        try:
            told(attempt, workers.pid)
            outcome = follower.follow(workers, state)
        finally:
            workers.kill()
        if outcome.action is None:
            return follower.error
        state = outcome.state
        attempt = derive(job, attempt, outcome.action, state)


def _first_state(job: Job, attempt: Attempt, how: How, rules: Thresholds) -> RunState:
    """Return what is known of a stage before its program is started: all that earlier runs of it told."""
    recipe, lineage = attempt.recipe, attempt.recipe.lineage
    earlier = lineage.consents if lineage else ()
    state = RunState(
        trainee=Trainee(
            objective=recipe.objective,
            tuner=recipe.tuner,
            bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
        ),
        settings=recipe.settings,
        consents=(*earlier, *how.allowed),
        rates_lowered=lineage.rates_lowered if lineage else 0,
        finishing=lineage is not None and lineage.finish,
    )
    events = [event for event in read_events(Path(job.folder) / EVENTS) if event.get("stage") == job.stage]
    return begin(state, events if how.resume else [], rules)


def _began(job: Job) -> bool:
    """Tell whether the training of a stage was started before."""
    events = read_events(Path(job.folder) / EVENTS)
    return any(event["event"] == "start" and event.get("stage") == job.stage for event in events)


def _finished(folder: Path, *, resume: bool) -> RunReport | None:
    """Return the report of a run that is done; refuse a used folder without `resume`."""
    report = read_record(folder / REPORT, RunReport) if (folder / REPORT).is_file() else None
    used = any(event["event"] == "start" for event in read_events(folder / EVENTS))
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


def _status(error: AdvisorError | None) -> Status:
    if error is None:
        return "done"
    if isinstance(error, InterruptedRunError):
        return "interrupted"
    return "refused" if isinstance(error, RefusedError) else "failed"


def report_of(job: Job, *, status: Status, error: AdvisorError | None) -> RunReport:
    """Return what came of a stage, from its events and measurements."""
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
        limits=thresholds_of(load().rules["policy"]).forgetting,
        status=status,
        estimate=job.estimate,
        artefacts=artefacts,
        packages=installed_packages(),
        error=error,
        evaluation=_evaluation(job, figures_of_both(events)),
        earlier_stages=tuple(
            outcome(place.parent.name, read_record(place, RunReport))
            for place in sorted(folder.glob(f"stages/*/{REPORT}"))
        ),
    )


def _evaluation(job: Job, figures: dict[str, dict[str, float]]) -> Evaluation | None:
    """Return what a stage changed; None where it was not to be measured, or nothing was at both times."""
    folder, rules = Path(job.folder), load().rules["evaluation"]
    if job.recipe.settings.get("evaluate") is False:
        return None
    found = [read_record(folder / name, Measured) for name in EVALUATIONS if (folder / name).is_file()]
    if len(found) < len(EVALUATIONS):
        return judge(Measured(), Measured(), figures, rules) if trainer_figures(figures) else None
    first = next(iter(sorted(folder.glob(f"stages/*/{EVALUATIONS[0]}"))), None)
    start = read_record(first, Measured) if first else None
    earlier = {one.name for one in job.recipe.datasets if one.role == "earlier_task"}
    return judge(found[0], found[1], figures, rules, start=start, earlier=earlier)
