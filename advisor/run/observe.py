"""What is worth remembering of a probe or a run: the prediction beside the measurement, and what it was of.

Goes in: a stage with its report or probe, the machine. Comes out: an Observation. Never does: keep a path, a
text or a row of the person's.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from advisor.probe import host
from advisor.probe.software import installed_packages
from advisor.run.events import read_events
from advisor.run.stages import EVENTS, Job
from advisor.types import Hardware, Observation, Recipe, RunReport, StepProbe, Value

KEPT = (
    "micro_batch", "effective_batch", "max_seq_len", "precision", "weight_bits", "gradient_checkpointing",
    "packing", "attention", "loss", "optimizer", "lora_r", "target",
)  # fmt: skip
"""Settings that decide memory and time."""


def observed_probe(job: Job, probe: StepProbe, machine: Hardware) -> Observation:
    """Return what to remember of a probe."""
    return Observation(
        time=_now(), kind="probe", device=machine.device_name, cpu_cores=machine.cpu_cores,
        packages=installed_packages(), model=_name(job.recipe), objective=job.recipe.objective,
        tuner=job.recipe.tuner, settings=_kept(job.recipe), steps=probe.steps_planned,
        predicted_peak_bytes=probe.predicted_peak_bytes, measured_peak_bytes=probe.measured_peak_bytes,
        predicted_seconds=probe.predicted_seconds, measured_seconds=probe.seconds,
    )  # fmt: skip


def observed(job: Job, report: RunReport) -> Observation:
    """Return what to remember of a finished stage."""
    events = [e for e in read_events(Path(job.folder) / EVENTS) if e.get("stage") == job.stage]
    device = next((str(e["device"]) for e in reversed(events) if e["event"] == "model" and "device" in e), "")
    name = next((str(e["device_name"]) for e in reversed(events) if e.get("device_name")), "")
    processor = host.cpu_identity(Path("/proc"))[0]
    return Observation(
        time=_now(), kind="run", device=name or (processor if device in ("", "cpu") else device),
        cpu_cores=host.cpu_cores(Path("/proc"), Path("/sys")), packages=report.packages,
        model=_name(job.recipe), objective=job.recipe.objective, tuner=job.recipe.tuner,
        settings=_kept(job.recipe), steps=report.steps, predicted_peak_bytes=report.predicted_peak_bytes,
        measured_peak_bytes=report.measured_peak_bytes, predicted_seconds=report.predicted_seconds,
        measured_seconds=report.seconds, probed_seconds=report.probed_seconds,
        predicted_tokens_per_second=report.predicted_tokens_per_second,
        measured_tokens_per_second=report.tokens_per_second,
    )  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _name(recipe: Recipe) -> str:
    """Return the hub id, or of a folder its last name only."""
    given = recipe.model.id
    return Path(given).name if Path(given).is_absolute() else given


def _kept(recipe: Recipe) -> dict[str, Value]:
    return {name: value for name, value in recipe.settings.items() if name in KEPT}
