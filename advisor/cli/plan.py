"""`ftadvisor plan`: recommend a method and write a run folder."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import Envelope, notifier, print_json, print_next, print_text
from advisor.cli.planning import require_trainable, write_plan
from advisor.inputs import Inputs, declared, require_files
from advisor.knowledge import Knowledge, load
from advisor.plan import make_plan
from advisor.run.folder import require_unused
from advisor.types import Plan, Scenario


@click.command()
@options.planning
@click.option("--dry-run", is_flag=True, help="Only show the plan; write nothing.")
@click.option("--expert", is_flag=True, help="Show every setting and every candidate.")
@options.as_json
def plan(out: Path | None, *, dry_run: bool, expert: bool, as_json: bool, **wish: Any) -> None:
    """Recommend a method for your data and machine, say why, and write a run folder.

    A scenario file declares what is not there, so that nothing is written for it.
    Several machines are compared side by side, and nothing is written: --hardware "RTX 3060, RTX 4090".
    """
    inputs = options.inputs_of(out=out, **wish)
    knowledge = load()
    machines = machines_named(inputs.hardware)
    if len(machines) > 1:
        _compare(inputs, machines, knowledge, as_json=as_json)
        return
    if out is not None and not dry_run:
        require_unused(out)
    case = declared(inputs, knowledge) if inputs.scenario else _probed(inputs, knowledge, quiet=as_json)
    if inputs.scenario and machines:
        from advisor.intake import hardware_of

        case = msgspec.structs.replace(case, hardware=hardware_of(inputs, knowledge))
    made = make_plan(case, knowledge)
    if not as_json:
        _show(made, expert=expert)
    if not dry_run and not inputs.scenario:
        require_files(case)
        require_trainable(made, case)
        folder = write_plan(made, out, datetime.now())
        if not as_json:
            print_text(f"Written to {folder}")
            print_next(f"ftadvisor run {folder}")
    if as_json:
        print_json(made)


class Comparison(Envelope, frozen=True, kw_only=True):
    """The answer for several machines."""

    plans: dict[str, Plan]
    """Machine, as it was named -> what would be planned for it."""


def machines_named(given: str | None) -> tuple[str, ...]:
    """The machines of one `--hardware`, which may list several."""
    return tuple(dict.fromkeys(name for part in (given or "").split(",") if (name := part.strip())))


def _compare(inputs: Inputs, machines: tuple[str, ...], knowledge: Knowledge, *, as_json: bool) -> None:
    """Plan the same wish for every machine, and show the plans side by side."""
    from advisor.intake import gather, hardware_of

    asked = {name: msgspec.structs.replace(inputs, hardware=name) for name in machines}
    found = {name: hardware_of(one, knowledge) for name, one in asked.items()}
    hardware = None if inputs.scenario else machines[0]
    case = gather(msgspec.structs.replace(inputs, hardware=hardware), knowledge, notifier(quiet=as_json))
    made = {
        name: make_plan(msgspec.structs.replace(case, hardware=machine), knowledge)
        for name, machine in found.items()
    }
    if as_json:
        print_json(Comparison(schema="ftadvisor.comparison/1", plans=made))
        return
    from advisor.ui.render import machines as draw

    print_text(draw(made))


def _probed(inputs: Inputs, knowledge: Knowledge, *, quiet: bool) -> Scenario:
    """Look at the machine, the model and the data; loads what only that needs."""
    from advisor.intake import gather

    return gather(inputs, knowledge, notifier(quiet=quiet))


def _show(made: Plan, *, expert: bool) -> None:
    from advisor.ui.advice import plan as draw

    print_text(draw(made, expert=expert))
