"""`ftadvisor inspect DATA...`: what datasets hold and what is wrong with them."""

from __future__ import annotations

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.intake import profiles_of
from advisor.knowledge import load
from advisor.types import DatasetProfile


class InspectAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `inspect --json`."""

    schema: str = "ftadvisor.inspect/1"
    ok: bool = True
    datasets: tuple[DatasetProfile, ...]


@click.command()
@click.argument("data", nargs=-1, required=True)
@options.model
@options.offline
@options.as_json
def inspect(data: tuple[str, ...], model: str, *, offline: bool, as_json: bool) -> None:
    """Show what a dataset holds and what is wrong with it; --model names whose tokenizer counts."""
    inputs = options.inputs_of(model=model, data=data, offline=offline)
    profiles = profiles_of(inputs, load(), notifier(quiet=as_json))
    if as_json:
        print_json(InspectAnswer(datasets=profiles))
        return
    from advisor.ui.render import dataset

    print_text(*(dataset(profile) for profile in profiles))
