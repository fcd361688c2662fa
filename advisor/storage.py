"""Reads and writes the records of a run folder, atomically and with errors that name file and field.

Goes in: records and paths. Comes out: files (JSON indented, YAML in field order) or decoded records.
Never does: leave a half-written file under its final name.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from advisor.errors import AdvisorError, DiskError, InputError

T = TypeVar("T")
CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, content: bytes) -> None:
    """Write aside, sync and rename, so that `path` holds either the old or the whole new content.

    Raises:
        DiskError: the folder is not writable or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).chmod(0o644)
            Path(aside).replace(path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError(
            f"Cannot write {path}: {error.strerror or error}.",
            "Free some space or choose another folder with --out.",
        ) from error


def encode_json(record: object) -> bytes:
    """Return a record as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def write_json(path: Path, record: object) -> None:
    """Write a record as indented JSON, atomically."""
    write_atomic(path, encode_json(record))


def encode_yaml(record: object) -> bytes:
    """Return a record as YAML in field order; the same record always gives the same bytes."""
    return yaml.dump(
        msgspec.to_builtins(record),
        Dumper=yaml.CSafeDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=100,
    ).encode()


def read_record(path: Path, kind: type[T], *, error: type[AdvisorError] = InputError, remedy: str = "") -> T:
    """Decode a JSON or YAML file (by suffix) into a record.

    Raises:
        AdvisorError: of class `error`; the message names the file and the wrong field.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            return msgspec.json.decode(content, type=kind)
        return msgspec.convert(read_yaml(path, error=error, remedy=remedy), type=kind)
    except OSError as problem:
        raise error(f"Cannot read {path}: {problem.strerror or problem}.", remedy) from problem
    except (msgspec.ValidationError, msgspec.DecodeError) as problem:
        raise error(f"{path}: {problem}", remedy) from problem


def read_yaml(path: Path, *, error: type[AdvisorError] = InputError, remedy: str = "") -> Any:
    """Return the plain values of a YAML file.

    Raises:
        AdvisorError: of class `error`, with the line of the problem.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except OSError as problem:
        raise error(f"Cannot read {path}: {problem.strerror or problem}.", remedy) from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path} is not valid YAML: {' '.join(str(problem).split())}", remedy) from problem


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
