"""`ftadvisor explain [TOPIC]`: a method, a setting, a warning, a term or a run folder, with sources."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.explain import explain as explain_topic
from advisor.knowledge import load
from advisor.storage import read_record
from advisor.types import Explanation, Plan


class ExplainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `explain --json`."""

    schema: str = "ftadvisor.explain/1"
    ok: bool = True
    explanation: Explanation | Plan


@click.command()
@click.argument("topic", default="topics")
@options.as_json
def explain(topic: str, *, as_json: bool) -> None:
    """Explain a method, a setting, a warning, a term or a run folder, with its sources."""
    plan_file = Path(topic) / "plan.json"
    is_run = plan_file.is_file()
    found = read_record(plan_file, Plan) if is_run else explain_topic(topic, load())
    if as_json:
        print_json(ExplainAnswer(explanation=found))
        return
    from advisor.ui import advice, render

    print_text(advice.plan(found, expert=True) if isinstance(found, Plan) else render.explanation(found))
