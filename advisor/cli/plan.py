"""`ftadvisor plan`: recommend a method and write a run folder."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.cli.planning import require_trainable, write_plan
from advisor.intake import gather, require_data
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.ui.render import plan as draw


@click.command()
@options.planning
@click.option("--dry-run", is_flag=True, help="Only show the plan; write nothing.")
@options.as_json
def plan(out: Path | None, *, dry_run: bool, as_json: bool, **wish: Any) -> None:
    """Recommend a method for your data and machine, say why, and write a run folder."""
    inputs = options.inputs_of(out=out, **wish)
    knowledge = load()
    scenario_ = gather(inputs, knowledge, notifier(quiet=as_json))
    made = make_plan(scenario_, knowledge)
    folder: Path | None = None
    if not dry_run:
        require_data(scenario_)
        if not as_json:
            print_text(draw(made))
        require_trainable(made, scenario_)
        folder = write_plan(made, out, datetime.now())
    if as_json:
        print_json(made)
        return
    if folder is None:
        print_text(draw(made))
    else:
        print_text(f"Written to {folder}", f"Next: ftadvisor run {folder}")
