"""`ftadvisor runs`: the run folders below a folder; one of them shown, or watched while it trains."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.errors import InputError, UsageError
from advisor.run.events import EventReader, read_events
from advisor.run.folder import RunState, find_runs, read_state
from advisor.run.lock import is_locked
from advisor.run.stages import EVENTS, REPORT
from advisor.storage import read_record
from advisor.types import RunReport


class RunsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `runs --json`."""

    schema: str = "ftadvisor.runs/1"
    ok: bool = True
    runs: tuple[RunState, ...]


WORDS = ("show", "watch")
LOOK_EVERY_SECONDS = 0.5


@click.command()
@click.argument("words", metavar="[show|watch] [FOLDER]", type=options.FILE, nargs=-1)
@options.as_json
def runs(words: tuple[Path, ...], *, as_json: bool) -> None:
    """List the run folders in a folder; `show` one, or `watch` one from another terminal."""
    asked = str(words[0]) if words and str(words[0]) in WORDS else ""
    rest = words[1:] if asked else words
    if len(rest) > 1 or (asked == "watch" and as_json):
        raise UsageError(
            "One folder is shown or watched at a time; watch prints no JSON.",
            "ftadvisor runs watch FOLDER; the events are in FOLDER/events.jsonl",
        )
    root = rest[0] if rest else Path()
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder.", "Name the folder that holds your runs: ftadvisor runs DIR"
        )
    if asked == "watch":
        watch(root)
        return
    states = tuple(read_state(folder) for folder in find_runs(root))
    if as_json:
        print_json(RunsAnswer(runs=states))
        return
    from advisor.ui import render

    print_text(render.runs(states))
    if asked == "show":
        _show(root)


def _show(folder: Path) -> None:
    """Print how a run went: its report where there is one, else the last that it told."""
    from advisor.ui import live, measured, render

    if (folder / REPORT).is_file():
        report = read_record(folder / REPORT, RunReport)
        print_text(render.report(report))
        if report.evaluation is not None:
            print_text(measured.evaluation(report.evaluation))
        return
    told = [text for event in read_events(folder / EVENTS) if (text := live.describe(event))]
    print_text(*told[-10:])


def watch(folder: Path) -> None:
    """Draw what a run tells until it ends; Ctrl-C ends the watching, not the run.

    Raises:
        InputError: nothing has begun there.
    """
    if not (folder / EVENTS).is_file() and not is_locked(folder):
        raise InputError(f"Nothing was trained in {folder} yet.", f"Begin: ftadvisor run {folder}")
    from advisor.ui.live import RunView

    reader = EventReader(folder / EVENTS)
    with RunView(folder, watching=True) as view:
        while True:
            running = is_locked(folder)
            for event in reader.new_events():
                view.show(event)
            if not running:
                return
            time.sleep(LOOK_EVERY_SECONDS)
