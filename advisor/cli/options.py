"""The options that several commands share, so that each is described once.

Goes in: nothing. Comes out: click decorators, and the `Inputs` made of the planning options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from advisor.inputs import Inputs, parse_setting

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
offline = click.option("--offline", is_flag=True, help="Never use the network; the cache must do.")
out = click.option("--out", type=FILE, help="Folder to write into.")
context = click.option(
    "--context",
    type=click.IntRange(min=16),
    help="Memory for so many tokens; by default 4096, or what fits.",
)
kv_cache = click.option(
    "--kv-cache",
    type=click.Choice(["f16", "q8_0"]),
    help="Type of the key-value cache; by default 16 bits where they fit.",
)
model = click.option(
    "--model",
    default="auto",
    show_default=True,
    help="Hub id, local folder, `starter` (the embedded model) or `auto`.",
)
hardware = click.option(
    "--hardware", help="Plan for another machine: 'RTX 3060', '8xH100', 'none', FILE.yaml."
)

_PLANNING = (
    model,
    click.option("--data", multiple=True, help="File, folder or hub id; repeatable; name=path names a task."),
    click.option(
        "--earlier", multiple=True, help="Data of what must not be forgotten: replayed in part and measured."
    ),
    click.option(
        "--continue", "continue_from", type=FILE, help="Go on from a finished run: its result and its data."
    ),
    click.option("--goal", default="", help="What you want, in your own words."),
    click.option("--deploy", default="", help="Where it must run afterwards, for example 'laptop, Ollama'."),
    click.option("--commercial/--no-commercial", default=None, help="Will it be used commercially?"),
    click.option("--must-not-forget", is_flag=True, help="What the model can do now must not get worse."),
    click.option(
        "--max-hours",
        type=click.FloatRange(min=0, min_open=True),
        help="Longest time that training may take.",
    ),
    click.option("--method", help="Insist on a method, for example lora, qlora, full."),
    hardware,
    click.option("--scenario", help="YAML file that declares machine, model, data, goal."),
    click.option(
        "--set", "settings", multiple=True, help="Override a setting: --set max_steps=50; repeatable."
    ),
    click.option("--force", is_flag=True, help="Do what --method asks even where it is not advised."),
    out,
    offline,
)


def planning(command: Command) -> Command:
    """Add every option that a planning command takes."""
    return reduce(lambda inner, option: option(inner), reversed(_PLANNING), command)


def inputs_of(
    *,
    settings: tuple[str, ...] = (),
    out: Path | None = None,
    continue_from: Path | None = None,
    **given: Any,
) -> Inputs:
    """Return the planning options as one record; `--set` texts are parsed."""
    parsed = dict(parse_setting(text) for text in settings)
    return Inputs(
        settings=parsed, out=str(out) if out else None,
        continue_from=str(continue_from) if continue_from else None, **given,
    )  # fmt: skip
