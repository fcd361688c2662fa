"""What the supervisor sees of the machine: sleep, disk, heat."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import advisor.run.machine
from advisor.knowledge import load
from advisor.run.machine import MachineWatch, processor_heat
from advisor.run.thresholds import thresholds_of

DRIVERS = thresholds_of(load().rules["policy"]).machine.hot_sensors


class Clocks:
    """Stands in for the module `time`: two clocks that are set by hand."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_000_000.0, 50.0

    def time(self) -> float:
        """Return the time of day."""
        return self.wall

    def monotonic(self) -> float:
        """Return the clock that stands still while the machine sleeps."""
        return self.steady


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Clocks that are set by hand."""
    made = Clocks()
    monkeypatch.setattr(advisor.run.machine, "time", made)
    return made


def test_a_clock_that_jumps_forward_was_a_sleep_and_one_that_jumps_back_was_not(
    clocks: Clocks, tmp_path: Path
) -> None:
    """Only what the clock of the day went beyond the steady one counts; between two looks nothing is said."""
    watch = MachineWatch(tmp_path, os.getpid(), sensors=DRIVERS)
    first = watch.look()
    assert first is not None
    assert (first["slept_seconds"], first["disk_free_bytes"] > 0) == (0.0, True)
    assert watch.look() is None
    for jump, slept in ((0.0, 0.0), (3600.0, 3600.0), (-7200.0, 0.0)):
        clocks.steady += 5
        clocks.wall += 5 + jump
        seen = watch.look()
        assert seen is not None
        assert seen["slept_seconds"] == slept


def test_the_sensor_nearest_to_its_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit may be called high or critical; without one, or without a clock, nothing is said. A disk's heat
    is no processor's."""

    def sensor(current: float, high: float | None = None, critical: float | None = None) -> SimpleNamespace:
        return SimpleNamespace(current=current, high=high, critical=critical)

    found = {"coretemp": [sensor(90.0, 95.0), sensor(97.0, 95.0)], "k10temp": [sensor(80.0, None, 90.0)],
             "nvme": [sensor(99.0, 80.0)]}  # fmt: skip
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=1400.0, max=4000.0))
    assert processor_heat(DRIVERS) == {"celsius": 97.0, "celsius_limit": 95.0, "clock_share": 0.35}
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=2600.0, max=0.0))
    assert processor_heat(DRIVERS) == {}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"coretemp": [sensor(27.8)]}, raising=False)
    assert processor_heat(DRIVERS) == {}
