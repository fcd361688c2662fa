"""Writes and reads events.jsonl: what happened in a run, one JSON object a line.

Goes in: named events with plain values. Comes out: lines with `time` (UTC, ISO 8601), `stage`, `event` and
the event's own fields. Never does: rewrite or remove a line; fail on a last line that a crash cut off.

A number that is not finite (a loss that became NaN) is written as null.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from advisor.errors import DiskError

Event = dict[str, Any]
WHOLE_NUMBERS = {"step": ("step", "total"), "checkpoint": ("step",)}
"""Event -> what it must say to be one; a line without it was damaged."""


class EventWriter:
    """Appends events of one stage; several processes may append to the same file."""

    def __init__(self, path: Path, stage: str) -> None:
        """Open the file for appending; a last line that was cut off is closed first.

        Raises:
            DiskError: the file cannot be written.
        """
        self.path = path
        self.stage = stage
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as problem:
            raise DiskError(
                f"Cannot write {path}: {problem.strerror}.", "Check the permissions of the run folder."
            ) from problem
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")

    def write(self, event: str, **fields: object) -> Event:
        """Append one event and return it; the whole line reaches the system in one call.

        Raises:
            DiskError: there is no space left, or the disk fails.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record: Event = {"time": now, "stage": self.stage, "event": event, **fields}
        try:
            os.write(self._handle, orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as problem:
            raise DiskError(
                f"Cannot write {self.path}: {problem.strerror}.",
                "Free some space, then go on with --resume; the last whole checkpoint is kept.",
            ) from problem
        return record

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventReader:
    """Returns what was appended since the last call; a line that is still being written waits."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def new_events(self) -> list[Event]:
        """Return the complete new lines; a line that is not a JSON object with an event's name and numbers is
        passed over."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines() if (event := _decode(line)) is not None]


def read_events(path: Path) -> Iterator[Event]:
    """Yield all events of a file, oldest first; none when it does not exist. Cut lines are passed over."""
    yield from EventReader(path).new_events()


def stage_of(recipe_file: str, objective: str) -> str:
    """Return the stage's name in events: `2-dpo` for recipe-2-dpo.yaml, the objective for recipe.yaml; that
    of a derived recipe, `attempt-2.recipe.yaml`, is the same."""
    planned = re.sub(r"^attempt-\d+\.", "", Path(recipe_file).stem)
    return planned.removeprefix("recipe").removeprefix("-") or objective


def _decode(line: bytes) -> Event | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return None
    numbers = WHOLE_NUMBERS.get(value["event"], ())
    loss = value.get("loss")
    sound = all(isinstance(value.get(name), int) for name in numbers) and not isinstance(
        loss, str | list | dict
    )
    return value if sound else None
