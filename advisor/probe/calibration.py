"""What was predicted, and what was measured then: the local file from which this machine's errors are known.

Goes in: an Observation. Comes out: one JSON line more in `calibration.jsonl` in ftadvisor's data folder; all
lines that can be read. Never does: send anything; keep data, texts, or paths; fail a training because the
file cannot be written.

The file is the person's own: delete it to forget, copy it to share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from advisor.probe.software import installed_packages
from advisor.types import Hardware, MatrixBench, Observation

PLACE = "FTADVISOR_CALIBRATION"
"""Environment variable that names another file; empty: nothing is kept."""


def calibration_file() -> Path | None:
    """Return where observations are kept; None when the person wants none."""
    given = os.environ.get(PLACE)
    if given is not None:
        return Path(given) if given else None
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "ftadvisor" / "calibration.jsonl"


def remember(observation: Observation) -> bool:
    """Append one observation; tell whether that was possible.

    The line reaches the file in one call, so that two trainings can write at the same time.
    """
    path = calibration_file()
    if path is None:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            cut = (
                size and os.pread(handle, 1, size - 1) != b"\n"
            )  # by a full disk: the new line must not join
            os.write(handle, (b"\n" if cut else b"") + msgspec.json.encode(observation) + b"\n")
        finally:
            os.close(handle)
    except OSError:  # a read-only home must not end a training that is done
        return False
    return True


def observations() -> tuple[Observation, ...]:
    """Return all lines that can be read, oldest first; those cut off or of another form are passed over."""
    return tuple(one for one in _lines() if one is not None)


def unreadable_lines() -> int:
    """Return how many lines are passed over."""
    return sum(one is None for one in _lines())


def _lines() -> Iterator[Observation | None]:
    path = calibration_file()
    if path is None or not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield msgspec.json.decode(line, type=Observation)
        except (msgspec.ValidationError, msgspec.DecodeError):
            yield None


def measured_rates(machine: Hardware, *, recent_days: float) -> MatrixBench | None:
    """Return what `probe --bench` measured last on this machine as it is now; None where that does not hold.

    Args:
        machine: probed; its device and cores, and the installed torch, must be those of the measurement. Of
            several kinds of accelerators only one was measured, so it does not count for them. A line without
            a date is of a version that did not look whether other programs ran.
        recent_days: an older measurement does not count.
    """
    if len(machine.accelerators) > 1:
        return None
    here = [
        one for one in observations()
        if one.bench and one.bench.date and not one.bench.disturbed
        and one.device == machine.device_name and one.cpu_cores == machine.cpu_cores
    ]  # fmt: skip
    if not here or here[-1].bench is None:
        return None
    last, torch = here[-1], installed_packages().get("torch")
    recent = datetime.fromisoformat(last.time) >= datetime.now(UTC) - timedelta(days=recent_days)
    return last.bench if recent and last.packages.get("torch") == torch else None
