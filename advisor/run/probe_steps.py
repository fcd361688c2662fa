"""What do real steps of a recipe take on this machine, and does it fit?

Goes in: a stage of a run folder, the machine, kb/rules/probe.toml. Comes out: a StepProbe, measured by the
stage's own program in a process and a folder of its own, so that the training that follows begins as if
nothing had been. Never does: change the run folder's results; let a fault of the probe itself stop a
training.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import AdvisorError, InterruptedRunError, RefusedError, TrainingError
from advisor.knowledge import Knowledge, load
from advisor.probe.calibration import remember
from advisor.probe.hardware import probe_hardware
from advisor.run.attempts import Attempt, derive
from advisor.run.events import Event, EventWriter, read_events
from advisor.run.failures import classify
from advisor.run.follow import log_tail
from advisor.run.ladder import Trainee, next_rung
from advisor.run.launch import LOG, Interrupts, Workers, require_packages, start_program
from advisor.run.observe import observed_probe
from advisor.run.policy import react
from advisor.run.signs import RunState
from advisor.run.stages import EVENTS, Job
from advisor.run.thresholds import Thresholds, thresholds_of
from advisor.storage import encode_yaml, write_atomic
from advisor.types import Band, Hardware, Recipe, StageEstimate, StepProbe, Value
from advisor.units import format_bytes

ORDER = "FTADVISOR_PROBE"
"""As advisor/train/probing.py reads it."""
RECIPE = "recipe.yaml"
LOOK_EVERY_SECONDS = 0.1
MEASURED = (
    "seconds", "seconds_per_step", "cpu_seconds", "cpu_seconds_per_step", "ready_seconds",
    "reference_seconds", "evaluation_seconds", "asking_seconds", "steps_planned", "steps_measured",
    "longest_tokens",
)  # fmt: skip
"""Fields that the program's own event has by the same names."""
PATHS = ("reward_file", "reward_model")
"""Settings that hold a path."""


def probe_first(
    job: Job, start: tuple[Attempt, RunState], rules: Thresholds, events: EventWriter,
    on_event: Callable[[Event], None], *, wanted: bool | None,
) -> tuple[Attempt, RunState]:  # fmt: skip
    """Try a few real steps before a training where that is worth it; go down the ladder until it fits.

    Args:
        job: the stage.
        start: the attempt to begin with, and what is known of it.
        rules: of the policy, which decides what is changed when it does not fit.
        events: of the run.
        on_event: told each event at once.
        wanted: do it in any case (True), or not at all (False).

    Returns:
        The attempt to begin with after that.

    Raises:
        RefusedError: it does not fit, and what is left to change is the person's to decide.
        InterruptedRunError: a person stopped it.
    """
    if wanted is False:
        return start
    if job.recipe.parallel is not None:
        on_event(events.write("note", message="No steps are tried first on several devices."))
        return start
    knowledge, folder = load(), Path(job.folder)
    machine = probe_hardware(output=folder, cache=folder, knowledge=knowledge)
    needless = "" if wanted else worth_it(job.estimate, machine, knowledge.rules["probe"])
    if needless:
        if job.estimate is not None:
            on_event(events.write("note", message=f"No steps are tried first: {needless}."))
        return start
    attempt, state = start
    while True:
        on_event(events.write("note", message="Trying a few steps with the longest rows first."))
        tried = msgspec.structs.replace(job, recipe=attempt.recipe)
        try:
            found = probe_steps(tried, machine, knowledge, scratch=folder)
        except TrainingError as problem:
            words = f"The trial of a few steps failed, so nothing is known of it: {problem.message}"
            on_event(events.write("warning", message=words))
            return attempt, state
        on_event(events.write("probe", **told(found)))
        remember(observed_probe(tried, found, machine))
        if found.fits:
            return attempt, state
        state, action = react(msgspec.structs.replace(state, loaded=True), _as_ended(found), rules)
        said = {
            "action": action.kind,
            "code": action.code,
            "message": action.reason,
            "changes": action.changes,
        }
        on_event(events.write("decision", remedy=action.remedy, **said))
        if action.kind != "restart":
            raise RefusedError(action.reason, action.remedy, code="does_not_fit")
        attempt = derive(job, attempt, action, state)
        state = msgspec.structs.replace(state.fresh(), settings=attempt.recipe.settings)


def _as_ended(found: StepProbe) -> Event:
    """A probe that does not fit, as the policy hears of a program that ran out of memory."""
    message = f"It does not fit: {found.reason}."
    return {"event": "ended", "code": "out_of_memory", "message": message}


def worth_it(estimate: StageEstimate | None, machine: Hardware, rules: Mapping[str, Any]) -> str:
    """Return why a stage need not be probed; empty where it should be.

    Args:
        estimate: what the plan predicts; a recipe without a plan has none to compare with.
        machine: this one.
        rules: tables of kb/rules/probe.toml.
    """
    if estimate is None:
        return "there is no plan to compare with"
    limits, free = rules["real_steps"], available(machine)
    roomy = estimate.peak_bytes.high <= limits["memory_share"] * free
    if roomy and estimate.seconds.high <= limits["seconds"]:
        most = format_bytes(estimate.peak_bytes.high)
        return f"it needs at most {most} of {format_bytes(free)}, and little time"
    return ""


def available(machine: Hardware) -> int:
    """Return the free memory of the device that trains: the largest accelerator, or the machine itself."""
    return max((card.free_bytes for card in machine.accelerators), default=machine.ram_free_bytes)


def probe_steps(job: Job, machine: Hardware, knowledge: Knowledge, *, scratch: Path | None) -> StepProbe:
    """Run the stage's program for a few steps and judge what it took.

    Args:
        job: the stage.
        machine: what is free now.
        knowledge: rules and the memory that a device's context takes.
        scratch: folder in which a folder for the probe is made and removed again; None: the system's place.

    Raises:
        InterruptedRunError: a person stopped it.
        MissingPackageError, DiskError: it cannot be started.
        TrainingError: it failed for another reason than memory.
    """
    require_packages(job.recipe)
    folder = Path(tempfile.mkdtemp(prefix=".probe-", dir=scratch))
    try:
        write_atomic(folder / RECIPE, encode_yaml(anchored(job.recipe, Path(job.folder))))
        error = _run(folder, job.recipe, knowledge.rules["probe"]["real_steps"])
        events = {event["event"]: event for event in read_events(folder / EVENTS)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if error is not None and error.code != "out_of_memory":
        raise error
    return judge(job, events, machine, knowledge, out_of_memory=error is not None)


def anchored(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with paths that mean the same from anywhere."""
    root = folder.resolve()

    def whole(path: str) -> str:
        return str(root / path) if (root / path).exists() else path

    model = msgspec.structs.replace(
        recipe.model,
        id=whole(recipe.model.id),
        path=whole(recipe.model.path) if recipe.model.path else None,
        after=whole(recipe.model.after) if recipe.model.after else None,
    )
    settings = {
        name: whole(value) if name in PATHS and isinstance(value, str) else value
        for name, value in recipe.settings.items()
    }
    datasets = tuple(msgspec.structs.replace(one, path=whole(one.path)) for one in recipe.datasets)
    return msgspec.structs.replace(recipe, model=model, datasets=datasets, settings=settings)


def _run(folder: Path, recipe: Recipe, limits: Mapping[str, Any]) -> AdvisorError | None:
    order = {"steps": limits["typical_steps"], "seconds": limits["longest_seconds"]}
    variables = {ORDER: msgspec.json.encode(order).decode()}
    workers = start_program(folder, Path(RECIPE), recipe, lock=None, variables=variables)
    try:
        status = _wait(workers)
    finally:
        workers.kill()
    if status == 0:
        return None
    errors = [event for event in read_events(folder / EVENTS) if event["event"] == "error"]
    return classify(status, errors[-1] if errors else None, log_tail(folder / LOG))


def _wait(workers: Workers) -> int:
    with Interrupts() as interrupts:
        while (status := workers.poll()) is None:
            if interrupts.count:
                raise InterruptedRunError(
                    "Stopped while a few steps were tried; nothing is changed.",
                    "Give the same command again.",
                )
            time.sleep(LOOK_EVERY_SECONDS)
    return status


def judge(
    job: Job, events: Mapping[str, Any], machine: Hardware, knowledge: Knowledge, *, out_of_memory: bool
) -> StepProbe:
    """Return what the program told, and whether it fits.

    Args:
        job: the stage.
        events: name -> the last event of that name that the program wrote.
        machine: as it was before.
        knowledge: kb/rules.
        out_of_memory: the program ended for lack of memory.

    Raises:
        TrainingError: the program ended well without telling anything.
    """
    estimate, free = job.estimate, available(machine)
    predicted = estimate.peak_bytes if estimate else None
    found = StepProbe(
        stage=job.stage, fits=False, predicted_peak_bytes=predicted, available_bytes=free,
        predicted_seconds=estimate.seconds if estimate else None,
    )  # fmt: skip
    if out_of_memory:
        reason = f"at its longest rows it ran out of memory; {format_bytes(free)} are free"
        return msgspec.structs.replace(found, reason=reason, smaller=smaller(job.recipe, knowledge))
    if "probe" not in events:
        raise TrainingError("The probe ended without a figure.", f"ftadvisor run {job.folder}")
    told, device = events["probe"], str(events["model"]["device"])
    context = 0 if device == "cpu" else knowledge.rules["memory"]["device"]["cuda"]["context_bytes"]
    peak = int(told["measured_peak_bytes"]) + context
    factors = knowledge.rules["probe"]["after_steps"][device.partition(":")[0]]
    later = estimate.parts.get("kernels", 0) if estimate and device == "cpu" else 0
    memory = _around(peak + later, factors["memory"])
    fits = memory.high <= free
    measured = {name: told[name] for name in MEASURED}
    reason = (
        f"at its longest rows it took {format_bytes(peak)}, so the whole takes up to "
        f"{format_bytes(memory.high)}; {format_bytes(free)} are free"
    )
    return msgspec.structs.replace(
        found, **measured, measured_peak_bytes=peak, whole_peak_bytes=memory,
        whole_seconds=_around(float(told["seconds"]), factors["seconds"]), fits=fits,
        reason="" if fits else reason, smaller={} if fits else smaller(job.recipe, knowledge),
    )  # fmt: skip


def _around(expected: float, factors: Mapping[str, float]) -> Band:
    """Return the band of the whole training around what its first steps say."""
    return Band(low=expected * factors["low"], expected=expected, high=expected * factors["high"])


def smaller(recipe: Recipe, knowledge: Knowledge) -> dict[str, Value]:
    """Return the settings to change first when a recipe does not fit, what costs the least quality first."""
    trainee = Trainee(
        objective=recipe.objective,
        tuner=recipe.tuner,
        bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
    )
    rung = next_rung(recipe.settings, trainee, thresholds_of(knowledge.rules["policy"]).ladder)
    return rung.changes if rung is not None else {}


def told(probe: StepProbe) -> dict[str, object]:
    """Return the fields of the `probe` event of a run; `stage` is the event's own."""
    fields: dict[str, object] = msgspec.to_builtins(probe)
    return {name: value for name, value in fields.items() if name != "stage" and value is not None}
