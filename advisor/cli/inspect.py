"""`ftadvisor inspect [DATA...]`: what datasets and a model hold, and what is wrong with them."""

from __future__ import annotations

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import UsageError
from advisor.intake import model_spec, profiles_of
from advisor.knowledge import load
from advisor.types import DatasetProfile, ModelSpec


class InspectAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `inspect --json`."""

    schema: str = "ftadvisor.inspect/1"
    ok: bool = True
    datasets: tuple[DatasetProfile, ...]
    model: ModelSpec | None
    """As it is known from kb/ or its own files; None where no one model was named."""


@click.command()
@click.argument("data", nargs=-1)
@options.model
@options.offline
@options.as_json
def inspect(data: tuple[str, ...], model: str, *, offline: bool, as_json: bool) -> None:
    """Show what datasets hold and what is wrong with them, and what is known of --model.

    Tokens are counted by that model's tokenizer.
    """
    if not data and model == "auto":
        raise UsageError(
            "There is nothing to look at.", "ftadvisor inspect DATA..., or --model MODEL, or both"
        )
    inputs = options.inputs_of(model=model, data=data, offline=offline)
    knowledge = load()
    spec = model_spec(inputs, knowledge) if model != "auto" else None
    profiles = profiles_of(inputs, knowledge, notifier(quiet=as_json)) if data else ()
    if as_json:
        print_json(InspectAnswer(datasets=profiles, model=spec))
        return
    from advisor.ui import render

    shown = [render.model(spec)] if spec is not None else []
    print_text(*shown, *(render.dataset(profile) for profile in profiles))
