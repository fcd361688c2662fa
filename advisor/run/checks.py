"""Can this stage be run here and now? What is looked at before a program is started.

Goes in: a Job. Comes out: hashes of the data, or an error. Never does: write; start a program."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from advisor.errors import DataError, DiskError, InputError, RefusedError
from advisor.rows import data_files
from advisor.run.events import read_events
from advisor.run.stages import EVENTS, Job
from advisor.types import Recipe
from advisor.units import format_bytes


def check_data(job: Job, *, resume: bool) -> dict[str, str]:
    """Return name -> SHA-256 of the datasets; a resumed run needs the data and recipe it began with.

    Raises:
        RefusedError: they are not what they were when the run began.
        DataError: a dataset cannot be read.
    """
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


def drift(job: Job, found: dict[str, str]) -> list[str]:
    """Say which datasets are not what they were when the plan was made."""
    return [
        f"{one.path} was changed since the plan was made; the plan's figures may not hold."
        for one in job.recipe.datasets
        if one.sha256 is not None and one.sha256 != found[one.name]
    ]


def check_disk(job: Job) -> None:
    """Make sure that what the plan needs on disk fits.

    Raises:
        DiskError: it does not.
    """
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


def fetch_model(recipe: Recipe, *, offline: bool) -> None:
    """Make sure that the model lies on this machine; the program itself has no network.

    Raises:
        InputError: its folder is gone.
        HubError: it cannot be fetched.
    """
    model = recipe.model
    if "starter" in (model.id, model.path) or Path(model.path or model.id).exists():
        return
    if model.path is not None:
        raise InputError(
            f"The model {model.id} is not in {model.path} any more.",
            "Put it back, or write where it lies now into the recipe (model: path).",
        )
    from advisor.probe import hub

    hub.fetch_model(model.id, revision=model.revision, offline=offline)
