"""How many cores are free at this moment?

Goes in: nothing. Comes out: a number of threads worth starting. Never does: count cores that are
kept busy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from advisor.probe.host import cpu_cores

WATCHED_SECONDS = 0.1


def free_cores() -> int:
    """Return the cores that this process may use, less what runs on them now; at least one."""
    return max(1, min(round(idle_cores()), cpu_cores(Path("/proc"), Path("/sys"))))


def idle_cores() -> float:
    """Return how much of the cores that this process may use is idle at this moment, in cores."""
    busy = psutil.cpu_percent(interval=WATCHED_SECONDS, percpu=True)
    mine = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(len(busy)))
    return float(sum(1 - percent / 100 for cpu, percent in enumerate(busy) if cpu in mine))
