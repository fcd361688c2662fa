"""Reads the rows of a file or folder one after another, in constant memory.

Goes in: a path. Comes out: (row number, row). Memory: one row, for JSON lists too; one batch for Parquet.
Never does: skip a row that it cannot read; interpret columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

import orjson

from advisor.errors import DataError, MissingPackageError
from advisor.rows.formats import BOM, check_utf8, detect_format, missing, quote, suffix_format
from advisor.rows.json_list import BUFFER_BYTES, JsonList

TEXT_ROW_CHARACTERS = 2000
"""Paragraphs of plain text are joined into rows of at least so many characters."""
TEXT_ROW_MOST = 1 << 20
"""Where a text has no blank lines, a row ends here."""
OnBytes = Callable[[bytes | memoryview], None]
Rows = Iterator[tuple[int, dict[str, object]]]
_IGNORED = ("readme", "license", "licence", "dataset_info", "dataset_dict", "state.json", "changelog")
_HELD_OUT = ("test", "valid", "validation", "val", "dev", "eval")


def read_rows(path: Path, *, format: str | None = None, on_bytes: OnBytes | None = None) -> Rows:
    """Yield (row number from 1, row) of a file, or of all data files of a folder one after another.

    Args:
        path: a file, or a folder of which `data_files` are read.
        format: one of `FORMATS`; None looks into the file.
        on_bytes: receives every byte of the files as they lie on the disk, for a checksum in the same pass.

    Raises:
        DataError: a file is missing, empty or broken; names file, row and line, and quotes the place.
        MissingPackageError: Parquet without pyarrow.
    """
    files = data_files(path)
    row = 0
    for file in files:
        kind = format if format is not None and len(files) == 1 else detect_format(file)
        for _, value in _read_file(file, kind, on_bytes):
            row += 1
            yield row, value
    if row == 0:
        raise DataError(f"{path} holds no rows.", "Give a file with at least one row.")


def data_files(path: Path) -> list[Path]:
    """Return the files to train on: `path` itself, or those of a folder, sorted by name.

    Read-me files, licences and hidden files do not count; text files count only where there is nothing
    structured. Where files are named train*, only they count; test*, valid*, dev* and eval* count only alone.

    Raises:
        DataError: there is none, or the folder was written by `save_to_disk`.
    """
    if not path.is_dir():
        if not path.exists():
            raise missing(path)
        return [path]
    found = [file for file in sorted(path.rglob("*")) if _counts(file, path)]
    structured = [file for file in found if suffix_format(file) not in (None, "text")]
    chosen = structured or [file for file in found if suffix_format(file) == "text"]
    train = [file for file in chosen if _named(file, path, ("train",))]
    chosen = train or [file for file in chosen if not _named(file, path, _HELD_OUT)] or chosen
    if chosen:
        return chosen
    if (path / "state.json").exists() or list(path.glob("*/state.json")):
        raise DataError(
            f"{path} was written by datasets' save_to_disk (Arrow files).",
            f"python -c \"import datasets; datasets.load_from_disk('{path}').to_parquet('data.parquet')\"",
        )
    if any(file.suffix.lower() == ".pdf" for file in found):
        raise DataError(
            f"{path} holds only PDF files.", f"for f in {path}/*.pdf; do pdftotext -layout $f; done"
        )
    raise DataError(
        f"The folder {path} holds no data file.",
        "Accepted: .json .jsonl .csv .tsv .parquet .txt .md (also .gz).",
    )


def _counts(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return file.is_file() and not hidden and not file.name.lower().startswith(_IGNORED)


def _named(file: Path, folder: Path, words: tuple[str, ...]) -> bool:
    """Tell whether the file, or a folder that it lies in, is named after one of the splits."""
    return any(re.split(r"[-_. 0-9]", part.lower())[0] in words for part in file.relative_to(folder).parts)


class _Tap(io.RawIOBase):
    """Passes a file through and shows every byte to `on_bytes` once."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # typeshed's private buffer protocol
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._on_bytes(content)
        return len(content)


def _read_file(path: Path, kind: str, on_bytes: OnBytes | None) -> Rows:
    if kind == "parquet":
        return _parquet(path, on_bytes)
    return _read_stream(path, kind, on_bytes)


def _read_stream(path: Path, kind: str, on_bytes: OnBytes | None) -> Rows:
    readers = {"json": _json, "jsonl": _jsonl, "csv": _csv, "tsv": _csv, "text": _text}
    if kind not in readers:
        raise DataError(f"{kind!r} is not a data format.", f"Valid: {', '.join(readers)}, parquet.")
    try:
        with path.open("rb", buffering=0) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            source = _Tap(cast(BinaryIO, raw), on_bytes) if on_bytes else raw
            with io.BufferedReader(source, BUFFER_BYTES) as plain:
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if packed else plain
                yield from readers[kind](path, stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise DataError(f"{path} is a damaged gzip file: {problem}.", f"gzip --test {path}") from problem
    except OSError as problem:
        raise DataError(f"Cannot read {path}: {problem.strerror or problem}.", "Check the file.") from problem


def _jsonl(path: Path, stream: IO[bytes]) -> Rows:
    row = 0
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as problem:
            if not line.strip():
                continue
            raise _broken(path, row + 1, number, line, problem) from problem
        row += 1
        if type(value) is not dict:
            raise _not_a_row(path, row, number, line)
        yield row, value


def _broken(path: Path, row: int, number: int, line: bytes, problem: orjson.JSONDecodeError) -> DataError:
    try:
        check_utf8(path, line, line=number)
    except DataError as encoding:
        return encoding
    message = f"{path}, row {row} (line {number}): not valid JSON: {problem.msg}: {quote(line)}"
    if row == 1 and line.strip() == b"{":
        return DataError(
            f"{path} is not one JSON object a line: row 1 goes on after line {number}.",
            f"jq -c . '{path}' > '{path.with_suffix('.lines.jsonl')}', or put the rows into one list [...].",
        )
    return DataError(message, f"Mend or delete the line: sed -n {number}p '{path}'")


def _not_a_row(path: Path, row: int, number: int, content: bytes) -> DataError:
    return DataError(
        f"{path}, row {row} (line {number}): a row must be an object with named columns, "
        f"not {quote(content)}",
        'For plain texts write {"text": "..."} a line.',
    )


def _json(path: Path, stream: IO[bytes]) -> Rows:
    listed = JsonList(path, stream)
    for row, (content, line) in enumerate(listed.elements(), 1):
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError as problem:
            at = line + content.count(b"\n", 0, problem.pos)
            begin = content.rfind(b"\n", 0, problem.pos) + 1
            raise _broken(path, row, at, content[begin : begin + 4096], problem) from problem
        yield row, value


def _csv(path: Path, stream: IO[bytes]) -> Rows:
    # A quoted cell may hold a whole document; the limit of the csv module exists for hostile input only.
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        first = text.readline()
        reader = csv.reader(itertools.chain([first], text), delimiter=_delimiter(path, first), strict=True)
        row = 0
        try:
            columns = [cell.strip() for cell in next(reader)]
            _check_header(path, columns)
            for cells in reader:
                if not cells:
                    continue
                row += 1
                if len(cells) != len(columns):
                    raise DataError(
                        f"{path}, row {row} (line {reader.line_num}): {len(cells)} cells where the header "
                        f"names {len(columns)} columns ({', '.join(columns)}).",
                        'Put cells that hold a comma or a line break in quotes: "like, this".',
                    )
                yield row, dict(zip(columns, cells, strict=True))
        except csv.Error as problem:
            raise DataError(
                f"{path}, row {row + 1} (line {reader.line_num}): {problem}.",
                'Quotes inside a cell are doubled: "he said ""yes""".',
            ) from problem
        except UnicodeDecodeError as problem:
            raise _locate_encoding(path, problem) from problem


def _locate_encoding(path: Path, problem: UnicodeDecodeError) -> DataError:
    """Find the line of bytes that are not UTF-8; reads the file again, because decoding runs ahead."""
    opener = gzip.open if path.suffix == ".gz" else open
    with cast(IO[bytes], opener(path, "rb")) as file:
        for number, line in enumerate(file, 1):
            try:
                check_utf8(path, line, line=number)
            except DataError as found:
                return found
    return DataError(f"{path} is not UTF-8: {problem}.", f"file '{path}'")


def _delimiter(path: Path, header: str) -> str:
    if suffix_format(path) == "tsv":
        return "\t"
    return max(",;\t|", key=header.count)


def _check_header(path: Path, columns: list[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice or not all(columns):
        what = f"names {', '.join(map(repr, twice))} twice" if twice else "has a column without a name"
        raise DataError(f"{path}: the header (line 1) {what}: {columns}.", "Give every column its own name.")


def _text(path: Path, stream: IO[bytes]) -> Rows:
    """Paragraphs, joined until a row holds connected text of a useful length."""
    row, size = 0, 0
    lines: list[str] = []
    for number, line in enumerate(iter(lambda: stream.readline(TEXT_ROW_MOST), b""), 1):
        if number == 1:
            line = line.removeprefix(BOM)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            # a cut inside a character of an endless line is not an error of the file
            check_utf8(path, line[:-4] if len(line) >= TEXT_ROW_MOST else line, line=number)
            text = line.decode("utf-8", "ignore")
        lines.append(text)
        size += len(text)
        if size >= TEXT_ROW_MOST or (size >= TEXT_ROW_CHARACTERS and not text.strip()):
            row += 1
            yield row, {"text": "".join(lines).strip()}
            lines, size = [], 0
    if rest := "".join(lines).strip():
        yield row + 1, {"text": rest}


def _parquet(path: Path, on_bytes: OnBytes | None) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise MissingPackageError("pyarrow", "train") from problem
    if on_bytes is not None:
        with path.open("rb") as file:
            while chunk := file.read(BUFFER_BYTES):
                on_bytes(chunk)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(
            f"{path}, after row {row}: damaged Parquet file: {problem}", "Make it again."
        ) from problem
