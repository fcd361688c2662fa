"""Faults in real trainings, which go on as if nothing had happened: a sample of benchmarks/faults.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # all faults are one process
BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "faults.py"
FAULTS = ("memory_rungs", "nan", "disk_full", "kill", "interrupt", "supervisor_killed")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What came of each fault; one process that loads the libraries once and forks the trainings."""
    child = subprocess.run(
        [sys.executable, str(BENCHMARK), "--only", ",".join(FAULTS), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert rows, child.stderr
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives(found: dict[str, dict[str, Any]], fault: str) -> None:
    """Out of memory down every rung, a loss that is no number, a full disk, SIGKILL with cut files and a
    moved folder, Ctrl-C, a killed supervisor: each ends well, in the same bits where only the fault was
    different. A full disk needs a process that may make one."""
    if found[fault]["passed"] is None:
        pytest.skip(found[fault]["outcome"])
    assert found[fault]["passed"] is True, found[fault]["outcome"]
