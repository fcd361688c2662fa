"""What do tasks of lm-evaluation-harness say of a model before and after a run?

Goes in: a finished run and names of tasks. Comes out: one TaskScore for each task and metric. Never does: ask
unasked; install the harness; let it fetch anything while offline.

The harness is a program of its own, run once with the base and once with the result, both with the trained
tokenizer and its template, so that they answer the same questions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import RefusedError, TrainingError, UsageError
from advisor.run.launch import QUIET_AND_OFFLINE, require_installed
from advisor.run.stages import REPORT, read_jobs
from advisor.storage import write_json
from advisor.types import Recipe, Record, RunReport, TaskScore

WRITES_NO_TEXT = frozenset({"classify", "reward"})
OWN_LAYERS = "adapter"
"""The tuner whose layers PEFT, and so the harness, does not load."""


class Tasks(Record, frozen=True, kw_only=True):
    """What is to be asked."""

    names: tuple[str, ...]
    folder: Path | None = None
    """With tasks of one's own."""
    offline: bool = False


def check_tasks(run: Path, tasks: Tasks) -> None:
    """Refuse what cannot be asked before hours are spent on training.

    Args:
        run: a planned run.
        tasks: to ask.

    Raises:
        MissingPackageError: the harness is not installed.
        RefusedError: the result of this run is nothing that the harness can load.
        UsageError: the harness does not know a task.
    """
    require_installed(("lm_eval",), extra="harness")
    jobs = read_jobs(run)
    recipe = jobs[-1].recipe
    if recipe.program in WRITES_NO_TEXT or recipe.tuner == OWN_LAYERS or jobs[-1].apart:
        raise RefusedError(
            "lm-evaluation-harness loads whole models and adapters of PEFT, one at a time; this run leaves "
            "none.",
            "Leave --lm-eval away.",
        )
    answer = _harness("validate", [], tasks)
    if answer.returncode:
        raise UsageError(
            f"lm-evaluation-harness does not take {', '.join(tasks.names)}: {_last(answer)}",
            "Its tasks: python -m lm_eval ls tasks. Your own: --lm-eval-tasks DIR",
        )


def with_tasks(run: Path, report: RunReport, tasks: Tasks) -> RunReport:
    """Ask the base and the result of a finished run; return the report, and keep it, with the answers.

    Args:
        run: the run folder.
        report: of that run.
        tasks: to ask; the harness may fetch their data unless they are `offline`.

    Raises:
        TrainingError: the harness failed; says its last line.
    """
    recipe = read_jobs(run)[-1].recipe
    base = _pretrained(recipe)
    if "model" in report.artefacts:
        trained = run / report.artefacts["model"]
        arguments = (f"{base},tokenizer={trained}", f"pretrained={trained}")
    else:
        trained = run / report.artefacts["adapter"]
        arguments = (f"{base},tokenizer={trained}", f"{base},peft={trained},tokenizer={trained}")
    before, after = (_results(argument, tasks) for argument in arguments)
    scores = tuple(
        TaskScore(
            task=task, metric=metric, before=before[task, metric][0], after=value,
            before_error=before[task, metric][1], after_error=error,
        )
        for (task, metric), (value, error) in after.items()
    )  # fmt: skip
    report = msgspec.structs.replace(report, tasks=scores)
    write_json(run / REPORT, report)
    return report


def _pretrained(recipe: Recipe) -> str:
    model = recipe.model
    revision = f",revision={model.revision}" if model.path is None and model.revision else ""
    return f"pretrained={model.path or model.id}{revision}"


def _results(arguments: str, tasks: Tasks) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Return (task, metric) -> (value, standard error) of one model."""
    with tempfile.TemporaryDirectory() as place:
        words = ["--model", "hf", "--model_args", arguments, "--apply_chat_template", "--output_path", place]
        answer = _harness("run", words, tasks)
        written = sorted(Path(place).rglob("results_*.json"))
        if answer.returncode or not written:
            raise TrainingError(
                f"lm-evaluation-harness failed: {_last(answer)}",
                "The run is whole. See all that it says: python -m lm_eval run --model hf "
                f"--model_args {arguments} --tasks {','.join(tasks.names)}",
            )
        found = msgspec.json.decode(written[-1].read_bytes(), type=dict[str, Any])
    scores = {}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric}, {kind}"
            scores[task, name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return scores


def _harness(command: str, words: Sequence[str], tasks: Tasks) -> subprocess.CompletedProcess[str]:
    own = ["--include_path", str(tasks.folder)] if tasks.folder is not None else []
    quiet = QUIET_AND_OFFLINE if tasks.offline else {}
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", command, "--tasks", ",".join(tasks.names), *words, *own],
        capture_output=True, text=True, check=False, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _last(answer: subprocess.CompletedProcess[str]) -> str:
    lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
    return lines[-1] if lines else "it said nothing"
