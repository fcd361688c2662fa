"""`ftadvisor probe`: what this machine has."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.inputs import Inputs
from advisor.intake import hardware_of
from advisor.knowledge import load
from advisor.types import Hardware


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `probe --json`."""

    schema: str = "ftadvisor.probe/1"
    ok: bool = True
    hardware: Hardware


@click.command()
@options.hardware
@options.out
@options.as_json
def probe(hardware: str | None, out: Path | None, *, as_json: bool) -> None:
    """Show what this machine has: accelerators, memory, cores, disk."""
    found = hardware_of(Inputs(hardware=hardware, out=str(out or Path.cwd())), load())
    if as_json:
        print_json(ProbeAnswer(hardware=found))
        return
    from advisor.ui.render import hardware as draw

    print_text(draw(found))
