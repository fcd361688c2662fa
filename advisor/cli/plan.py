"""`ftadvisor plan`: recommend a method and write a run folder."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.cli.planning import require_trainable, write_plan
from advisor.inputs import Inputs, declared, require_files
from advisor.knowledge import Knowledge, load
from advisor.plan import make_plan
from advisor.types import Plan, Scenario


@click.command()
@options.planning
@click.option("--dry-run", is_flag=True, help="Only show the plan; write nothing.")
@click.option("--expert", is_flag=True, help="Show every setting and every candidate.")
@options.as_json
def plan(out: Path | None, *, dry_run: bool, expert: bool, as_json: bool, **wish: Any) -> None:
    """Recommend a method for your data and machine, say why, and write a run folder."""
    inputs = options.inputs_of(out=out, **wish)
    knowledge = load()
    case = declared(inputs, knowledge) if inputs.scenario else _probed(inputs, knowledge, quiet=as_json)
    made = make_plan(case, knowledge)
    if not as_json:
        _show(made, expert=expert)
    if not dry_run:
        require_files(case)
        require_trainable(made, case)
        folder = write_plan(made, out, datetime.now())
        if not as_json:
            print_text(f"Written to {folder}", f"Next: ftadvisor run {folder}")
    if as_json:
        print_json(made)


def _probed(inputs: Inputs, knowledge: Knowledge, *, quiet: bool) -> Scenario:
    """Look at the machine, the model and the data; loads what only that needs."""
    from advisor.intake import gather

    return gather(inputs, knowledge, notifier(quiet=quiet))


def _show(made: Plan, *, expert: bool) -> None:
    from advisor.ui.advice import plan as draw

    print_text(draw(made, expert=expert))
