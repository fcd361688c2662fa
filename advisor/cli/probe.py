"""`ftadvisor probe`: what this machine has, how fast it is, and what real steps of a recipe take on it."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import UsageError
from advisor.inputs import Inputs
from advisor.intake import hardware_of
from advisor.knowledge import Knowledge, load
from advisor.types import Hardware, MatrixBench, StepProbe

DOES_NOT_FIT = 3


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `probe --json`."""

    schema: str = "ftadvisor.probe/1"
    ok: bool = True
    hardware: Hardware
    bench: MatrixBench | None = None
    steps: tuple[StepProbe, ...] = ()


@click.command()
@options.hardware
@options.out
@click.option(
    "--recipe",
    type=options.FILE,
    help="A run folder or a recipe: train a few real steps with its longest rows and say what they take.",
)
@click.option("--bench", is_flag=True, help="Measure matrix products and copies, five seconds at most.")
@options.as_json
def probe(hardware: str | None, out: Path | None, *, recipe: Path | None, bench: bool, as_json: bool) -> None:
    """Show what this machine has; on wish, measure its rates, or a few real steps of a recipe.

    Exit 3 when the steps show that the recipe does not fit.
    """
    if hardware is not None and (recipe is not None or bench):
        raise UsageError("What is measured is this machine, not another one.", "Leave --hardware out.")
    knowledge, say = load(), notifier(quiet=as_json)
    found = hardware_of(Inputs(hardware=hardware, out=str(out or Path.cwd())), knowledge)
    rates = None
    if bench:
        from advisor.run.bench import bench as measure

        say("Multiplying matrices")
        rates = measure(found, knowledge)
        found = msgspec.structs.replace(found, rates=rates)
    steps = _steps(recipe, found, knowledge, quiet=as_json) if recipe is not None else ()
    fits = all(one.fits for one in steps)
    if as_json:
        print_json(ProbeAnswer(ok=fits, hardware=found, bench=rates, steps=steps))
    else:
        from advisor.ui import measured, render

        drawn = [render.hardware(found)] if bench or not steps else []
        print_text(*drawn, *map(measured.step_probe, steps))
    if not fits:
        raise click.exceptions.Exit(DOES_NOT_FIT)


def _steps(recipe: Path, machine: Hardware, knowledge: Knowledge, *, quiet: bool) -> tuple[StepProbe, ...]:
    """Probe the first stage: those after it begin with what it leaves behind."""
    from advisor.probe.calibration import remember
    from advisor.run.observe import observed_probe
    from advisor.run.probe_steps import probe_steps
    from advisor.run.stages import read_job

    job = read_job(recipe)
    notifier(quiet=quiet)(f"Training a few steps of {job.recipe_file}")
    found = probe_steps(job, machine, knowledge, scratch=None)
    remember(observed_probe(job, found, machine))
    return (found,)
