"""What happens to the machine while a training runs: its disk, its clock, its heat, the program's memory.

Goes in: the run folder, the program's process id. Comes out: `machine` events for the policy, what is known
when the program was killed. Never does: decide; fail, where a figure cannot be read."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from advisor.probe.host import memory, oom_kills

LOOK_EVERY_SECONDS = 2.0


class MachineWatch:
    """Looks every two seconds; `look` returns an event when it has."""

    def __init__(self, folder: Path, pid: int, *, sensors: tuple[str, ...]) -> None:
        self._folder, self._pid, self._sensors = folder, pid, sensors
        self._kills = oom_kills(Path("/proc"), Path("/sys"))
        self._ram, _ = memory(Path("/proc"), Path("/sys"))
        self._held = 0
        self._wall, self._steady = time.time(), time.monotonic()
        self._next = self._steady

    def look(self) -> dict[str, Any] | None:
        """Return free disk space, how long the machine slept since the last look, and how hot the processor
        is, where that can be read; None in between."""
        wall, steady = time.time(), time.monotonic()
        if steady < self._next:
            return None
        # The steady clock stands still while the machine sleeps, the other one does not.
        slept = (wall - self._wall) - (steady - self._steady)
        self._wall, self._steady, self._next = wall, steady, steady + LOOK_EVERY_SECONDS
        self._held = max(self._held, resident_bytes(self._pid))
        return {
            "event": "machine",
            "disk_free_bytes": shutil.disk_usage(self._folder).free,
            "slept_seconds": max(0.0, round(slept, 1)),
            **(processor_heat(self._sensors) if sys.platform == "linux" else {}),
        }

    def at_the_end(self) -> dict[str, Any]:
        """Return what speaks for or against a kill by the system."""
        before, now = self._kills, oom_kills(Path("/proc"), Path("/sys"))
        return {
            "oom_kills": None if before is None or now is None else now - before,
            "memory_share": self._held / self._ram if self._ram and self._held else None,
        }


def resident_bytes(pid: int) -> int:
    """Return what a process holds in memory now; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def processor_heat(drivers: tuple[str, ...]) -> dict[str, float]:
    """Return the temperature that is nearest to its sensor's limit, that limit and the clock's share of the
    highest; nothing where the machine does not tell, as in most containers.

    Args:
        drivers: whose sensors are a processor's.
    """
    found = psutil.sensors_temperatures()
    sensors = [one for driver in drivers for one in found.get(driver, ())]
    limits = [(one.current, limit) for one in sensors if (limit := one.high or one.critical)]
    clock = psutil.cpu_freq()
    if not limits or clock is None or not clock.max:
        return {}
    celsius, limit = max(limits, key=lambda pair: pair[0] - pair[1])
    return {"celsius": celsius, "celsius_limit": limit, "clock_share": round(clock.current / clock.max, 3)}
