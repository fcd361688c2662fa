"""Makes a run folder from a plan and finds run folders; the only place that knows how they are named.

Goes in: a plan, its recipes, a place. Comes out: a folder with plan.json and one recipe a stage. Never does:
overwrite a folder that is in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from advisor.errors import RefusedError
from advisor.recipe import encode
from advisor.run.devices import device_files
from advisor.run.events import read_events
from advisor.run.lock import is_locked
from advisor.storage import read_record, write_atomic, write_json
from advisor.types import Plan, Recipe, Record, RunReport


class RunState(Record, frozen=True, kw_only=True):
    """One run folder at a glance."""

    folder: str
    model: str
    method: str
    objectives: tuple[str, ...]
    status: str
    """planned, running, unfinished (it was killed), done, failed, interrupted, refused."""
    steps: int = 0
    steps_planned: int | None = None
    last_loss: float | None = None
    gguf_files: tuple[str, ...] = ()
    result: str = ""
    """adapter or model, once it is trained."""
    result_bytes: int = 0


def default_name(plan: Plan, now: datetime) -> str:
    """Return `ftadvisor-<model>-<method>-<objectives>-<time>`, safe as a file name."""
    model = plan.model.id.rsplit("/", 1)[-1] if plan.model else "model"
    objectives = "-".join(stage.objective for stage in plan.stages)
    words = f"ftadvisor-{model}-{plan.method}-{objectives}-{now:%Y%m%d-%H%M%S}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).lower()


def recipe_names(plan: Plan) -> list[str]:
    """Return the recipe file names of a plan's stages, in order."""
    if len(plan.stages) == 1:
        return ["recipe.yaml"]
    names = [_plain(stage.datasets[0]) if plan.apart else stage.objective for stage in plan.stages]
    return [f"recipe-{number}-{name}.yaml" for number, name in enumerate(names, start=1)]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "task"


def create_run_folder(folder: Path, plan: Plan, recipes: tuple[Recipe, ...]) -> Path:
    """Write plan.json, the recipes, and what several devices need, into a new or empty folder.

    Raises:
        RefusedError: the folder is already in use.
        DiskError: it cannot be written.
    """
    require_unused(folder)
    write_json(folder / "plan.json", plan)
    for name, recipe in zip(recipe_names(plan), recipes, strict=True):
        write_atomic(folder / name, encode(recipe))
    for name, content in device_files(plan, recipes).items():
        write_atomic(folder / name, content)
    return folder


def require_unused(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        RefusedError: it does; says how to go on with a run folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    started = " --resume" if (folder / "events.jsonl").is_file() else ""
    go_on = f", or go on with it: ftadvisor run {folder}{started}" if (folder / "plan.json").is_file() else ""
    raise RefusedError(
        f"{folder} already exists and is not empty.",
        f"Choose another folder with --out{go_on}.",
        code="folder_in_use",
    )


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the run folders in `root`: itself, or those at most two levels below, by name."""
    for pattern in ("plan.json", "*/plan.json", "*/*/plan.json"):
        for path in sorted(root.glob(pattern)):
            yield path.parent


def read_state(folder: Path) -> RunState:
    """Return the state of one run folder.

    Raises:
        InputError: plan.json or report.json cannot be decoded.
    """
    plan = read_record(folder / "plan.json", Plan, remedy=f"Plan again, or remove {folder}.")
    report_file = folder / "report.json"
    report = read_record(report_file, RunReport) if report_file.is_file() else None
    events = list(read_events(folder / "events.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    last = steps[-1] if steps else {}
    # A run that was killed, or that goes on again, has said more since its last report.
    over = report is not None and bool(events) and events[-1]["event"] == "end"
    told = report.status if report is not None and over else "unfinished" if events else "planned"
    return RunState(
        folder=str(folder),
        model=plan.model.id if plan.model else "",
        method=plan.method,
        objectives=tuple(stage.objective for stage in plan.stages),
        status="running" if is_locked(folder) else told,
        steps=int(last.get("step", 0)),
        steps_planned=int(last["total"]) if last else None,
        last_loss=last.get("loss"),
        gguf_files=tuple(str(path) for path in sorted(folder.glob("export/*.gguf"))),
    )
