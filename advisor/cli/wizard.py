"""`ftadvisor wizard`: questions, the plan with its reasons, and the start."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.export import export_and_prove
from advisor.cli.output import notifier, print_json, print_next, print_text
from advisor.cli.planning import write_plan
from advisor.cli.run import train
from advisor.errors import UsageError
from advisor.goals import understand
from advisor.inputs import require_files
from advisor.intake import gather, hardware_of, profiles_of
from advisor.knowledge import Knowledge, load
from advisor.plan import make_plan
from advisor.types import Goal, Plan
from advisor.ui import render
from advisor.ui.questions import Answer, inputs_from
from advisor.ui.wizard import ask_all, decide, load_answers, require_terminal, save_draft, show_plan


class WizardAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `wizard --answers FILE --json`."""

    schema: str = "ftadvisor.wizard/1"
    ok: bool = True
    folder: str | None
    plan: Plan


@click.command()
@click.option("--answers", type=options.FILE, help="YAML file with answers; what it lacks is asked.")
@click.option("--expert", is_flag=True, help="Show every setting and candidate.")
@options.out
@options.offline
@options.as_json
def wizard(answers: Path | None, out: Path | None, *, expert: bool, offline: bool, as_json: bool) -> None:
    """Answer a few questions, see the plan and its reasons, start it."""
    knowledge = load()
    given = load_answers(answers)
    if as_json and answers is None:
        raise UsageError("--json needs --answers FILE.", "ftadvisor wizard --answers FILE --json")
    if as_json or not require_terminal(given):
        _replay(given, knowledge, out=out, offline=offline, as_json=as_json, expert=expert)
        return
    print_text(render.hardware(hardware_of(inputs_from({}), knowledge)))
    defaults: dict[str, Answer] = {}
    questioned: set[str] = set()

    def show(key: str, so_far: dict[str, Answer]) -> None:
        if key == "goal":
            _show_understood(str(so_far[key]), questioned, knowledge)
        _show_found(key, so_far, knowledge, offline=offline)

    while True:
        given = ask_all(given, defaults, show)
        inputs = msgspec.structs.replace(inputs_from(given), offline=offline)
        made = make_plan(gather(inputs, knowledge, notifier(quiet=False)), knowledge)
        show_plan(made, given, expert=expert)
        decision = decide(made, given)
        if decision == "all settings":
            expert = True
            show_plan(made, given, expert=True)
            decision = decide(made, given)
        if decision == "change":
            given, defaults = {}, given
            continue
        break
    if decision == "stop":
        save_draft(given)
        return
    folder = write_plan(made, out, datetime.now())
    print_text(f"Written to {folder}")
    if decision == "write":
        print_next(f"ftadvisor run {folder}")
        return
    print_text(render.report(train(folder, resume=False, offline=offline, quiet=False)))
    exported, _ = export_and_prove(folder, offline=offline)
    files = [file.path for file in exported.files if file.kind == "gguf"]
    print_next(f"ftadvisor chat {files[-1] if files else folder}")


def _replay(
    given: dict[str, Answer],
    knowledge: Knowledge,
    *,
    out: Path | None,
    offline: bool,
    as_json: bool,
    expert: bool,
) -> None:
    """Make and write the plan of an answers file without asking anything."""
    require_terminal(given)
    inputs = msgspec.structs.replace(inputs_from(given), offline=offline)
    scenario = gather(inputs, knowledge, notifier(quiet=as_json))
    made = make_plan(scenario, knowledge)
    require_files(scenario)
    folder = write_plan(made, out, datetime.now()) if made.stages and made.verdict == "train" else None
    if as_json:
        print_json(WizardAnswer(folder=str(folder) if folder else None, plan=made))
        return
    show_plan(made, given, expert=expert)
    print_text(f"Written to {folder}" if folder else "Nothing was written.")
    if folder:
        print_next(f"ftadvisor run {folder}")


def _show_understood(goal: str, questioned: set[str], knowledge: Knowledge) -> None:
    """Echo what the goal was taken for; ask once more for one that names no kind of task.

    Raises:
        UsageError: the goal is unclear, and was not questioned before.
    """
    found = understand(Goal(text=goal), knowledge)
    heard = [f"{name} (from '{words}')" for name, words in found.phrases.items()]
    if heard:
        print_text(f"Understood: {', '.join(heard)}. Esc takes you back.")
    if found.tasks or found.requested_method or found.requested_objective or goal in questioned:
        return
    questioned.add(goal)
    raise UsageError(
        "I could not tell what kind of task that is.",
        "Add a word such as style, classify, extract, translate, facts, tools or reasoning; or press Enter: "
        "then the data decide.",
    )


def _show_found(key: str, given: dict[str, Answer], knowledge: Knowledge, *, offline: bool) -> None:
    """Show what an answer led to, so that a wrong one is noticed at once."""
    inputs = msgspec.structs.replace(inputs_from(given), offline=offline)
    if key == "hardware" and inputs.hardware:
        print_text(render.hardware(hardware_of(inputs, knowledge)))
    if key == "data":
        for profile in profiles_of(inputs, knowledge, notifier(quiet=False)):
            print_text(render.dataset(profile))
