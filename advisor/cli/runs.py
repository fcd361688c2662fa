"""`ftadvisor runs`: the run folders below a folder, or one of them."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.errors import InputError
from advisor.run.folder import RunState, find_runs, read_state


class RunsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `runs --json`."""

    schema: str = "ftadvisor.runs/1"
    ok: bool = True
    runs: tuple[RunState, ...]


@click.command()
@click.argument("root", type=options.FILE, default=".")
@options.as_json
def runs(root: Path, *, as_json: bool) -> None:
    """List the run folders in a folder (two levels deep), or show one: state, loss, files."""
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder.", "Name the folder that holds your runs: ftadvisor runs DIR"
        )
    states = tuple(read_state(folder) for folder in find_runs(root))
    if as_json:
        print_json(RunsAnswer(runs=states))
        return
    from advisor.ui import render

    print_text(render.runs(states))
