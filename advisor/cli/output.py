"""Prints what a command found: as JSON on standard output, or as text through ui/render.

Goes in: a record and how to draw it. Comes out: output. Never does: decide what is said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_json(record: object) -> None:
    """Print a record as one JSON object on standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
    sys.stdout.buffer.flush()


def print_text(*parts: RenderableType) -> None:
    """Print renderables on standard output."""
    from advisor.ui.console import make_console

    console = make_console()
    for part in parts:
        console.print(part)


def print_next(*lines: str) -> None:
    """Print what to do next; a command is never broken into lines, so that it can be copied."""
    from advisor.ui.console import make_console

    console = make_console()
    for head, line in zip(("Next: ", *["      "] * len(lines)), lines, strict=False):
        console.print(f"{head}{line}", soft_wrap=True)


def notifier(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that tells on standard error what is being done; it says nothing when `quiet`."""
    if quiet:
        return lambda _: None
    from advisor.ui.console import make_console

    console = make_console(stderr=True)
    return lambda text: console.print(f"{text} ...", style="quiet")


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The first fields of every JSON answer that is not a record with a schema of its own."""

    schema: str
    ok: bool = True
