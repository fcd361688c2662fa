"""What may this process use of the computer: cores, instruction sets, memory, free disk?

Goes in: the roots of /proc and /sys, paths. Comes out: plain numbers, with affinity and every cgroup limit
up the path applied. Never does: start programs, write, fail because a file is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from advisor.types import Volume

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Instruction sets that change the advice, as Linux names them in /proc/cpuinfo."""


def cpu_cores(proc: Path, sys_root: Path) -> int:
    """Return how many cores this process may keep busy: its affinity, or less by a cgroup's quota.

    A quota of 2.5 cores counts as 2: a third computing thread would be throttled and the others wait for it.
    """
    if sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = cpu_quota(proc, sys_root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(proc: Path, sys_root: Path) -> float | None:
    """Return the smallest CPU quota up the path of cgroups, in cores; None when there is none."""
    quotas = []
    for folder in _cgroups(proc, sys_root, "cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2:
            quota, period = _whole(words[0]), _whole(words[1])
        else:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cpu_identity(proc: Path) -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and those of `CPU_FEATURES` that it has."""
    fields: dict[str, str] = {}
    try:
        with (proc / "cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip() and fields:
                    break  # the first processor is enough; the file is long on a machine with many cores
                key, _colon, value = line.partition(":")
                fields[key.strip().lower()] = value.strip()
    except OSError:
        fields = {}
    flags = set(fields.get("flags", fields.get("features", "")).split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in CPU_FEATURES if feature in flags)


def memory(proc: Path, sys_root: Path) -> tuple[int, int]:
    """Return total and free memory in bytes: the machine's, or less by a cgroup's limit.

    File cache that the kernel gives back on demand counts as free.
    """
    total, free = _machine_memory(proc)
    for folder in _cgroups(proc, sys_root, "memory"):
        statistics = _fields(folder / "memory.stat")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        cache = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        for limit in (
            _number(folder / "memory.max"),
            _number(folder / "memory.high"),
            _number(folder / "memory.limit_in_bytes"),
            statistics.get("hierarchical_memory_limit"),
        ):
            if limit is not None and limit > 0:
                total = min(total, limit)
                free = min(free, limit - max(0, used - cache))
    return total, max(0, min(free, total))


def oom_kills(proc: Path, sys_root: Path) -> int | None:
    """Return how often the kernel has killed for want of memory, in the cgroups that bind this process, else
    on the whole machine; None where it does not count."""
    counted = [
        count
        for folder in _cgroups(proc, sys_root, "memory")
        for name in ("memory.events", "memory.oom_control")
        if (count := _fields(folder / name).get("oom_kill")) is not None
    ]
    return sum(counted) if counted else _fields(proc / "vmstat").get("oom_kill")


def volume(role: Literal["output", "cache"], path: Path) -> Volume:
    """Return the free space where `path` lies or would lie once it is made."""
    try:
        whole = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        whole = path.absolute()
    for place in (whole, *whole.parents):
        try:
            return Volume(role=role, path=str(path), free_bytes=shutil.disk_usage(place).free)
        except OSError:
            continue
    return Volume(role=role, path=str(path), free_bytes=0)


def operating_system() -> str:
    """Return the system's name and release, for example `Linux 6.8.0`."""
    return f"{platform.system()} {platform.release()}".strip()


def _machine_memory(proc: Path) -> tuple[int, int]:
    fields = _fields(proc / "meminfo")
    if fields.get("MemTotal"):
        unused = fields.get("MemFree", 0) + fields.get("Cached", 0)
        return fields["MemTotal"] * 1024, fields.get("MemAvailable", unused) * 1024
    import psutil  # only where there is no /proc/meminfo

    found = psutil.virtual_memory()
    return found.total, found.available


def _cgroups(proc: Path, sys_root: Path, controller: str) -> Iterator[Path]:
    """Yield the cgroup folders that bind this process, from the root of the mount down to its own.

    Version 2 lists `0::/path`, version 1 `4:cpu,cpuacct:/path`. In a container the path may be the host's
    and not exist below the mount; then the mount's root is the container's own group.
    """
    mount = sys_root / "fs" / "cgroup"
    for line in _text(proc / "self" / "cgroup").splitlines() or ["0::/"]:
        number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        if number == "0" and not controllers:
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = (
                [mount / controllers]
                if controllers == controller
                else [mount / controllers, mount / controller]
            )
        else:
            continue
        for base in bases:
            folder = base
            yield folder
            for part in PurePosixPath(path).parts:
                if part not in ("/", ".."):
                    folder = folder / part
                    yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _whole(text: str) -> int | None:
    """Read a whole number; `max` and anything else that is none means no limit."""
    try:
        return int(text)
    except ValueError:
        return None


def _number(path: Path) -> int | None:
    return _whole(_text(path).strip())


def _fields(path: Path) -> dict[str, int]:
    """Read lines of `name value` or `name: value kB` into numbers."""
    found = {}
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and (value := _whole(words[1])) is not None:
            found[words[0]] = value
    return found
