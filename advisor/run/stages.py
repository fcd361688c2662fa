"""The stages of a run folder: which there are, which are done, where the result of a done one lies.

Goes in: a run folder. Comes out: one Job a stage; the folder `stages/<stage>` for each stage but the last,
whose result lies in the run folder itself. Never does: start a program."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import InputError, RefusedError
from advisor.programs import read_program
from advisor.recipe import check
from advisor.resources import recipes_dir
from advisor.run.devices import ACCELERATE, DEEPSPEED
from advisor.run.events import read_events, stage_of
from advisor.storage import file_sha256, read_record, write_json
from advisor.types import Plan, Program, Recipe, Record, RunReport, StageEstimate

EVENTS, REPORT, PLAN = "events.jsonl", "report.json", "plan.json"
EVALUATIONS = ("evaluation-before.json", "evaluation-after.json")
RESULTS = ("adapter", "model", "heldout.jsonl", *EVALUATIONS)
WEIGHTS = ("adapter", "model")
CHECKPOINTS = "checkpoints"
AGAIN = "Plan again: ftadvisor plan --help"
NUMBERED = re.compile(r"recipe-(\d+)-")


class Job(Record, frozen=True, kw_only=True):
    """One stage to run, read and checked."""

    folder: str
    recipe_file: str
    recipe: Recipe
    recipe_sha256: str
    estimate: StageEstimate | None
    last: bool = True
    """Whether its result is that of the whole run."""
    apart: bool = False
    """Whether every stage has a result of its own."""

    @property
    def stage(self) -> str:
        """Return the stage's name in events."""
        return stage_of(self.recipe_file, self.recipe.objective)


def read_jobs(folder: Path) -> tuple[Job, ...]:
    """Read the recipes of a run folder in order, and what the plan predicts for each.

    Raises:
        InputError: the folder, plan.json or a recipe is missing or wrong.
        UsageError: a setting is not one of the program's, or out of its range.
        RefusedError: a program does not exist, or does not spread the training as planned.
    """
    if not folder.is_dir():
        raise InputError(f"There is no run folder {folder}.", "Make one: ftadvisor plan --out DIR ...")
    files = recipe_files(folder)
    if not files:
        raise InputError(f"{folder} holds no recipe.yaml, so it is not a run folder.", AGAIN)
    plan = read_record(folder / PLAN, Plan, remedy=AGAIN) if (folder / PLAN).exists() else None
    estimates = [stage.estimate for stage in plan.stages] if plan is not None else []
    jobs = tuple(
        _job(folder, file, estimates[n] if n < len(estimates) else None, last=file == files[-1])
        for n, file in enumerate(files)
    )
    if plan is not None and plan.apart:
        jobs = tuple(msgspec.structs.replace(job, apart=True) for job in jobs)
    if plan is not None and plan.parallel != "none" and any(job.recipe.parallel is None for job in jobs):
        raise RefusedError(
            f"The plan spreads the training over several devices ({plan.parallel}), and a recipe says "
            "nothing of it; on one device it would not fit, or take another time than planned.",
            "Plan for one device: ftadvisor plan --hardware ..., with a smaller model or --method qlora.",
        )
    return jobs


def read_job(place: Path) -> Job:
    """Read one recipe: the file itself, or the first of a run folder.

    Raises:
        InputError, UsageError, RefusedError: as `read_jobs`.
    """
    if place.is_dir():
        return read_jobs(place)[0]
    if not place.is_file():
        raise InputError(f"There is no recipe {place}.", "Give a run folder, or a recipe.yaml in one.")
    jobs = read_jobs(place.parent)
    return next((job for job in jobs if job.recipe_file == place.name), None) or _job(
        place.parent, place, None, last=True
    )


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes of a run folder in the order of their stages."""
    return sorted(folder.glob("recipe*.yaml"), key=_number)


def _number(file: Path) -> int:
    match = NUMBERED.match(file.name)
    return int(match.group(1)) if match else 0


def _job(folder: Path, file: Path, estimate: StageEstimate | None, *, last: bool) -> Job:
    recipe = read_record(file, Recipe, remedy=f"Correct {file}, or plan again.")
    program = recipes_dir() / recipe.program
    if not (program / "train.py").is_file():
        raise RefusedError(
            f"This version has no training program {recipe.program!r}.", "Plan again: ftadvisor plan --help"
        )
    facts = read_program(program / "program.toml")
    check(recipe, facts)
    _check_parallel(folder, recipe, facts)
    return Job(
        folder=str(folder),
        recipe_file=file.name,
        recipe=recipe,
        recipe_sha256=file_sha256(file),
        estimate=estimate,
        last=last,
    )


def _check_parallel(folder: Path, recipe: Recipe, facts: Program) -> None:
    if recipe.parallel is None:
        return
    needed = (ACCELERATE, DEEPSPEED) if recipe.parallel.kind == "zero3" else (ACCELERATE,)
    for name in needed:
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which says how the devices work together.", AGAIN)
    if recipe.parallel.kind == "zero3" and recipe.tuner == "qlora":
        raise RefusedError(
            "A base in 4 bits is not spread by DeepSpeed here.", "Set kind: fsdp in the recipe."
        )
    if recipe.parallel.kind != "ddp" and recipe.tuner not in facts.sharded:
        raise RefusedError(
            f"{recipe.objective} with {recipe.tuner} is not trained with its weights spread over several "
            f"devices ({recipe.parallel.kind}); so far that goes with "
            + (f"{' and '.join(facts.sharded)}." if facts.sharded else "sft and cpt."),
            "Plan it so that it fits each device: a smaller model, --method qlora, or a shorter max_seq_len.",
        )


def stage_folder(job: Job) -> Path:
    """Return where the result of a stage lies once it is done."""
    return Path(job.folder) / "stages" / job.stage


def is_done(job: Job) -> bool:
    """Tell whether a stage came to its end.

    Raises:
        RefusedError: its recipe was changed since; what was trained then is not what is planned now.
    """
    events = [event for event in read_events(Path(job.folder) / EVENTS) if event.get("stage") == job.stage]
    ends = [event for event in events if event["event"] == "end"]
    if not ends or ends[-1].get("status") != "done":
        return False
    starts = [event for event in events if event["event"] == "start"]
    if starts[-1].get("recipe_sha256") != job.recipe_sha256:
        raise RefusedError(
            f"{job.recipe_file} was changed since its stage was trained.",
            "Undo the change, or plan into another folder.",
        )
    return True


def is_put_away(job: Job) -> bool:
    """Tell whether the result of a done stage lies in its folder; what lies in the run folder then belongs to
    a later stage."""
    return (stage_folder(job) / REPORT).is_file()


def put_away(job: Job, report: RunReport) -> RunReport:
    """Move the result of a done stage to its folder and drop its checkpoints; the report, written last, says
    that all is there. Returns it, with the places that hold now."""
    folder, target = Path(job.folder), stage_folder(job)
    target.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        if (folder / name).exists():
            (folder / name).rename(target / name)
    if (folder / CHECKPOINTS).is_dir():
        shutil.rmtree(folder / CHECKPOINTS)
    # Asked of the target: a put-away that was cut short has moved the result already.
    artefacts = {
        name: str((target / name).relative_to(folder)) for name in WEIGHTS if (target / name).is_dir()
    }
    report = msgspec.structs.replace(report, artefacts=artefacts)
    write_json(target / REPORT, report)
    return report


def require_result(job: Job) -> None:
    """Refuse to go on from a finished stage whose result is not there, or cut short.

    Raises:
        InputError: says which file; the next stage would silently begin from the untrained base.
    """
    place = stage_folder(job)
    files = [file for name in WEIGHTS for file in sorted((place / name).glob("*")) if file.is_file()]
    cut = next((file for file in files if file.suffix == ".safetensors" and not _is_whole(file)), None)
    if files and cut is None:
        return
    what = f"{cut} is cut short" if cut else f"{place} holds neither adapter/ nor model/"
    raise InputError(
        f"Stage {job.stage} was trained, but its result cannot be gone on from: {what}.",
        "Put it back from a copy, or plan into another folder and train again.",
        code="stage_result",
    )


def _is_whole(file: Path) -> bool:
    """Tell whether a safetensors file holds all that its header announces."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        if size + 8 > file.stat().st_size:
            return False
        try:
            header = msgspec.json.decode(content.read(size), type=dict[str, dict[str, Any]])
        except msgspec.DecodeError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + size + max(ends, default=0) == file.stat().st_size


def got_worse(report: RunReport) -> str:
    """Return what to say when a stage did not help on rows that it was not trained on; empty when it did."""
    before, after = report.heldout_loss_before, report.heldout_loss_after
    if before is None or after is None or after <= before:
        return ""
    return (
        f"On rows that were not trained on, the loss rose from {before:.3f} to {after:.3f}: this stage did "
        "not help. Look at the data, or plan again with a lower --set learning_rate=..."
    )
