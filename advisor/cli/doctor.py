"""`ftadvisor doctor`: is everything there and does it work."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor import __version__
from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.intake import cache_dir
from advisor.probe.hardware import probe_hardware
from advisor.probe.software import doctor_findings, installed_packages
from advisor.self_test import SelfTest, self_test
from advisor.types import Finding, Hardware


class DoctorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `doctor --json`; `ok` is false when a finding is an error or the self-test failed."""

    schema: str = "ftadvisor.doctor/1"
    ok: bool
    version: str = __version__
    packages: dict[str, str]
    hardware: Hardware
    findings: tuple[Finding, ...]
    self_test: SelfTest | None = None


@click.command()
@click.option(
    "--self-test",
    "tried",
    is_flag=True,
    help="Train, export, verify and chat with the embedded model; about a minute.",
)
@options.as_json
def doctor(*, tried: bool, as_json: bool) -> None:
    """Check that everything needed is installed and works; exit 1 when something must be mended."""
    machine = probe_hardware(output=Path.cwd(), cache=cache_dir())
    findings = doctor_findings(machine)
    ok = all(finding.severity != "error" for finding in (*machine.findings, *findings))
    packages = installed_packages()
    if not as_json:
        from advisor.ui import render

        print_text(render.hardware(machine), render.packages(packages), render.findings(findings))
    found = self_test(notifier(quiet=as_json)) if tried else None
    ok = ok and (found is None or found.passed)
    if as_json:
        print_json(
            DoctorAnswer(ok=ok, packages=packages, hardware=machine, findings=findings, self_test=found)
        )
    elif found is not None:
        print_text(render.self_test(found))
    if not ok:
        raise click.exceptions.Exit(1)
