"""`ftadvisor inspect DATA...`: what datasets hold and what is wrong with them."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from advisor.cli.options import Json, Model, Offline, inputs_of
from advisor.cli.output import notifier, print_json, print_text
from advisor.intake import profiles_of
from advisor.knowledge import load
from advisor.types import DatasetProfile

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class InspectAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `inspect --json`."""

    schema: str = "ftadvisor.inspect/1"
    ok: bool = True
    datasets: tuple[DatasetProfile, ...]


@app.command()
def inspect(
    data: Annotated[list[str], typer.Argument(help="Files, folders or hub ids; name=path names a task.")],
    model: Model = "auto",
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what a dataset holds and what is wrong with it; --model names whose tokenizer counts."""
    inputs = inputs_of(model=model, data=data, offline=offline)
    profiles = profiles_of(inputs, load(), notifier(quiet=as_json))
    if as_json:
        print_json(InspectAnswer(datasets=profiles))
        return
    from advisor.ui.render import dataset

    print_text(*(dataset(profile) for profile in profiles))
