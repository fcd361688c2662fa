"""`ftadvisor plan`: recommend a method and write a run folder."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from advisor.cli.options import (
    Commercial,
    Data,
    Deploy,
    Force,
    GoalText,
    HardwareOption,
    Json,
    MaxHours,
    Method,
    Model,
    MustNotForget,
    Offline,
    Out,
    ScenarioFile,
    Set,
    inputs_of,
)
from advisor.cli.output import notifier, print_json, print_text
from advisor.cli.planning import require_trainable, write_plan
from advisor.intake import gather, require_data
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.ui.render import plan as draw

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def plan(
    model: Model = "auto",
    data: Data = None,
    goal: GoalText = "",
    deploy: Deploy = "",
    commercial: Commercial = None,
    must_not_forget: MustNotForget = False,
    max_hours: MaxHours = None,
    method: Method = None,
    hardware: HardwareOption = None,
    scenario: ScenarioFile = None,
    settings: Set = None,
    force: Force = False,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan; write nothing.")] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Recommend a method for your data and machine, say why, and write a run folder."""
    inputs = inputs_of(
        model=model,
        data=data,
        goal=goal,
        deploy=deploy,
        commercial=commercial,
        must_not_forget=must_not_forget,
        max_hours=max_hours,
        method=method,
        hardware=hardware,
        scenario=scenario,
        settings=settings,
        offline=offline,
        force=force,
        out=out,
    )
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
