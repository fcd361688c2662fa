"""Measures this device's matrix products and copies, and remembers them for later estimates.

Goes in: the machine. Comes out: a MatrixBench, one more line of the calibration file. Never does: import
torch in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime

import msgspec

from advisor.errors import TrainingError
from advisor.knowledge import Knowledge
from advisor.probe.calibration import remember
from advisor.probe.load import idle_cores
from advisor.probe.software import installed_packages
from advisor.run.launch import QUIET_AND_OFFLINE, require_installed
from advisor.types import Hardware, MatrixBench, Observation

MOST_BUSY = 0.5
"""Cores that other programs may use while a processor is measured."""


def bench(machine: Hardware, knowledge: Knowledge) -> MatrixBench:
    """Return what the device reaches now.

    Args:
        machine: names the device, and the cores that may be used.
        knowledge: how long it may take.

    Raises:
        MissingPackageError: torch is not installed.
        TrainingError: the measurement failed; says its last line.
    """
    require_installed(("torch",))
    seconds = knowledge.rules["probe"]["bench"]["seconds"]
    disturbed = not machine.accelerators and idle_cores() < machine.cpu_cores - MOST_BUSY
    environment = {"OMP_NUM_THREADS": str(machine.cpu_cores), **os.environ, **QUIET_AND_OFFLINE}
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "advisor.train.bench", str(seconds)], capture_output=True, check=False,
        env=environment,
    )  # fmt: skip
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise TrainingError(f"The measurement failed: {said[-1]}", "ftadvisor doctor")
    now, packages = (
        datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        installed_packages(),
    )
    found = msgspec.structs.replace(
        msgspec.json.decode(answer.stdout, type=MatrixBench), device=machine.device_name, date=now[:10],
        torch=packages["torch"], disturbed=disturbed,
    )  # fmt: skip
    seen = Observation(
        time=now, kind="bench", device=machine.device_name, cpu_cores=machine.cpu_cores, packages=packages,
        bench=found,
    )  # fmt: skip
    remember(seen)
    return found
