"""The attempts of a stage: the planned recipe, and those that the supervisor derived from it on the way.

Goes in: a Job and an Action. Comes out: `attempt-<n>.<recipe file>` beside the planned recipe, which stays as
it is. Never does: decide; change a recipe that exists."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from advisor.errors import RefusedError
from advisor.recipe import encode
from advisor.run.policy import Action
from advisor.run.signs import RunState
from advisor.run.stages import Job
from advisor.storage import file_sha256, read_record, write_atomic
from advisor.types import Lineage, Recipe, Record

NAME = re.compile(r"attempt-(\d+)\.")


class Attempt(Record, frozen=True, kw_only=True):
    """One recipe that a program is started on."""

    file: str
    recipe: Recipe
    sha256: str

    @property
    def number(self) -> int:
        """Return 1 for the planned recipe."""
        return self.recipe.lineage.attempt if self.recipe.lineage else 1


def newest_attempt(job: Job) -> Attempt:
    """Return the attempt to start or go on with: the last derived one, else the planned recipe.

    Raises:
        RefusedError: the planned recipe was changed since another was derived from it.
    """
    folder = Path(job.folder)
    files = sorted(folder.glob(f"attempt-*.{job.recipe_file}"), key=_number)
    if not files:
        return Attempt(file=job.recipe_file, recipe=job.recipe, sha256=job.recipe_sha256)
    recipe = read_record(files[-1], Recipe, remedy=f"Remove {files[-1].name}, or plan again.")
    if recipe.lineage is None or recipe.lineage.of[0] != job.recipe_sha256:
        raise RefusedError(
            f"{job.recipe_file} was changed since {files[-1].name} was derived from it.",
            "Undo the change, or plan into another folder.",
        )
    return Attempt(file=files[-1].name, recipe=recipe, sha256=file_sha256(files[-1]))


def derive(job: Job, before: Attempt, action: Action, state: RunState) -> Attempt:
    """Write the recipe of the next attempt and return it.

    Args:
        job: the stage.
        before: the attempt that ended.
        action: `restart` or `finish`, with what changes and why.
        state: after that action.

    Raises:
        DiskError: it cannot be written.
    """
    old = before.recipe.lineage
    lineage = Lineage(
        of=(*(old.of if old else ()), before.sha256),
        attempt=before.number + 1,
        reason=action.reason,
        newest_step=action.newest_step,
        finish=action.kind == "finish",
        rates_lowered=state.rates_lowered,
        consents=state.consents,
    )
    recipe = msgspec.structs.replace(
        before.recipe, settings={**before.recipe.settings, **action.changes}, lineage=lineage
    )
    path = Path(job.folder) / f"attempt-{lineage.attempt}.{job.recipe_file}"
    write_atomic(path, encode(recipe))
    return Attempt(file=path.name, recipe=recipe, sha256=file_sha256(path))


def _number(path: Path) -> int:
    match = NAME.match(path.name)
    return int(match.group(1)) if match else 0
