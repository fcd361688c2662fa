"""`ftadvisor run PLAN_DIR`: train a planned run, export it, prove the export."""

from __future__ import annotations

from pathlib import Path

import click

from advisor.cli import options
from advisor.cli.output import print_json, print_next, print_text
from advisor.run.harness import Tasks, check_tasks, with_tasks
from advisor.run.ladder import CONSENT
from advisor.run.page import write_page
from advisor.run.stages import PLAN
from advisor.run.supervisor import run_plan
from advisor.storage import read_record
from advisor.types import Plan, RunReport


@click.command()
@click.argument("folder", type=options.FILE)
@click.option("--resume", is_flag=True, help="Continue exactly where it stopped.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(sorted(CONSENT.values())),
    help="Allow a change that is not made unasked when memory runs out; repeatable.",
)
@click.option(
    "--probe/--no-probe",
    default=None,
    help="Try a few real steps first; otherwise only where memory is scarce or it takes long.",
)
@click.option(
    "--lm-eval",
    "tasks",
    multiple=True,
    help="Ask a task of lm-evaluation-harness before and after; repeatable; also with --resume at the end.",
)
@click.option("--lm-eval-tasks", "task_folder", type=options.FILE, help="Folder with tasks of your own.")
@options.offline
@options.as_json
def run(
    folder: Path, *, resume: bool, allow: tuple[str, ...], probe: bool | None, tasks: tuple[str, ...],
    task_folder: Path | None, offline: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a planned run; Ctrl-C saves a checkpoint and stops, --resume goes on.

    Exit 1 also when earlier tasks were forgotten beyond the limit, or the new one was not learned beside
    them; the result is kept all the same.
    """
    asked = Tasks(names=tasks, folder=task_folder, offline=offline)
    if tasks:
        check_tasks(folder, asked)
    report = train(folder, resume=resume, offline=offline, quiet=as_json, allowed=allow, probe=probe)
    if tasks:
        report = with_tasks(folder, report, asked)
        write_page(folder)
    if as_json:
        print_json(report)
    else:
        from advisor.ui import measured, render

        print_text(render.report(report))
        if report.evaluation is not None:
            print_text(measured.evaluation(report.evaluation))
        if report.tasks:
            print_text(measured.task_scores(report.tasks))
        # With an adapter for each task, all lie in folders of their own and are talked to together.
        apart = any(place.startswith("stages/") for place in report.artefacts.values())
        done = f"ftadvisor chat {folder}" if apart else f"ftadvisor export {folder}"
        if report.program in ("classify", "reward"):
            done = f"{folder}/report.html says how to load it; it writes no text, so there is no GGUF of it"
        print_next(done if report.ok else _again(folder, report))
    if not report.ok:
        raise click.exceptions.Exit(1)


def _again(folder: Path, report: RunReport) -> str:
    """Return what to do when too much was forgotten, or the new task was not learned."""
    start = read_record(folder / PLAN, Plan).start if (folder / PLAN).is_file() else None
    old = f"--continue {start.folder}" if start else "--earlier OLD"
    change = "a larger --set replay_fraction=..." if report.forgotten else "more --set epochs=..."
    return f"ftadvisor plan {old} --data NEW, with {change}"


def train(
    folder: Path, *, resume: bool, offline: bool, quiet: bool, allowed: tuple[str, ...] = (),
    probe: bool | None = None,
) -> RunReport:  # fmt: skip
    """Run the training of a folder with the live view, or silently; the page is written however it ends."""
    try:
        if quiet:
            return run_plan(
                folder, resume=resume, on_event=lambda _: None, offline=offline, allowed=allowed, probe=probe
            )
        from advisor.ui.live import RunView

        with RunView(folder) as view:
            return run_plan(
                folder, resume=resume, on_event=view.show, offline=offline, allowed=allowed, ask=view.ask,
                probe=probe,
            )  # fmt: skip
    finally:
        write_page(folder)
