"""Which format does a data file have: looked up in its content first, in its name second.

Goes in: a path. Comes out: one of `FORMATS`, or an error with the command that mends the file. Never does:
read more than the first bytes; guess an encoding and go on.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

from advisor.errors import DataError, nearest
from advisor.rows.tables import names_to_role

FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "text")
SUFFIXES = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".txt": "text", ".md": "text", ".text": "text", ".rst": "text",
}  # fmt: skip
HEAD_BYTES = 65536
BOM = b"\xef\xbb\xbf"
_ARCHIVES = {
    b"PK\x03\x04": (
        "a zip archive (documents of Word and Excel are, too)",
        "unzip {name}; a document: save it as .txt, a table as .csv",
    ),
    b"BZh": ("compressed with bzip2", "bunzip2 --keep {name}"),
    b"\xfd7zXZ": ("compressed with xz", "unxz --keep {name}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unzstd {name}"),
    b"%PDF": ("a PDF", "pdftotext -layout {name}"),
    b"ARROW1": ("an Arrow file", "In Python: datasets.load_from_disk(FOLDER).to_parquet('data.parquet')"),
    b"SQLite format": ("an SQLite database", "sqlite3 -header -csv {name} 'select * from TABLE' > data.csv"),
}  # fmt: skip


def suffix_format(path: Path) -> str | None:
    """Return the format that the name promises, looking through .gz; None: the name says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def detect_format(path: Path) -> str:
    """Return the format of one file.

    Raises:
        DataError: missing, empty, not UTF-8, a model or archive, or of no known format; with what to do.
    """
    head, whole = read_head(path)
    if head.startswith(b"PAR1"):
        return "parquet"
    refuse_binary(path, head)
    content = head.removeprefix(BOM)
    check_utf8(path, content if whole else content[:-4])
    start = content.lstrip()
    if not start:
        raise DataError(f"{path} is empty.", "Give a file with at least one row.")
    promised = suffix_format(path)
    if start[:1] in b"[{" and (promised not in ("text", "csv", "tsv") or _is_json(start)):
        return "json" if start[:1] == b"[" else "jsonl"
    if promised in ("csv", "tsv"):
        return promised
    if promised in ("json", "jsonl"):
        line = content[: len(content) - len(start)].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not JSON: {quote(start)}",
            "JSON starts with [ or {. If this is a table, name the file .csv or .tsv; if it is text, .txt.",
        )
    return promised or _from_text(path, start)


def read_head(path: Path) -> tuple[bytes, bool]:
    """Return the first bytes, decompressed, and whether they are the whole content.

    Raises:
        DataError: the file is missing, a folder, unreadable, empty, or its gzip data is damaged.
    """
    if not path.exists():
        raise missing(path)
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is no regular file.", "Write its content into a file and give that.")
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                head = gzip.GzipFile(fileobj=file).read(HEAD_BYTES + 1)
            else:
                file.seek(0)
                head = file.read(HEAD_BYTES + 1)
    except IsADirectoryError as problem:
        raise DataError(f"{path} is a folder.", "Name one file in it.") from problem
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise DataError(f"{path} is a damaged gzip file: {problem}.", f"gzip --test {path}") from problem
    except OSError as problem:
        raise DataError(
            f"Cannot read {path}: {problem.strerror or problem}.", "Check the permissions."
        ) from problem
    if not head:
        raise DataError(f"{path} is empty (0 bytes).", "Give a file with at least one row.")
    return head[:HEAD_BYTES], len(head) <= HEAD_BYTES


def missing(path: Path) -> DataError:
    """Return the error for a path that does not exist, naming its nearest neighbour."""
    parent = path.parent
    near = nearest(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else []
    hint = f" Did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""
    where = "" if parent.is_dir() else f" The folder {parent} does not exist either."
    return DataError(f"There is no file {path}.{hint}{where}", "Check the path, then: ftadvisor inspect FILE")


def refuse_binary(path: Path, head: bytes) -> None:
    """Refuse what is plainly not text.

    Raises:
        DataError: a model file, archive, database, picture or other binary, with what to do.
    """
    if head.startswith(b"GGUF"):
        raise DataError(
            f"{path} is a GGUF model, not data.", "Give it to --model, or to: ftadvisor chat FILE"
        )
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        raise DataError(f"{path} holds model weights (safetensors), not data.", "Give its folder to --model.")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise DataError(
            f"{path} is a Python pickle; it is not opened because it can run code.",
            "Save the rows as JSON lines with the program that made it.",
        )
    for magic, (what, command) in _ARCHIVES.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.", command.format(name=path))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise wrong_encoding(path, "UTF-16")
    zeros = head.count(b"\0")
    if zeros:
        even, odd = head[0::2].count(b"\0"), head[1::2].count(b"\0")
        if max(even, odd) > len(head) // 5 and min(even, odd) * 8 < max(even, odd):
            raise wrong_encoding(path, "UTF-16LE" if odd > even else "UTF-16BE")
        raise DataError(
            f"{path} is a binary file of an unknown format.", f"Accepted: {', '.join(FORMATS)} (also .gz)."
        )


def check_utf8(path: Path, content: bytes, *, line: int = 1) -> None:
    """Refuse content that is not UTF-8.

    Args:
        path: for the message.
        content: bytes that begin at the start of line `line`.
        line: number of the first line of `content`.

    Raises:
        DataError: with the line and the exact iconv command.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as problem:
        at = line + content.count(b"\n", 0, problem.start)
        windows = any(0x80 <= byte <= 0x9F for byte in content[problem.start : problem.start + 4096])
        raise wrong_encoding(path, "WINDOWS-1252" if windows else "ISO-8859-1", at) from problem


def wrong_encoding(path: Path, encoding: str, line: int | None = None) -> DataError:
    """Return the error for a file in another encoding, with the iconv line that converts it."""
    where = f", line {line}," if line is not None else ""
    target = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return DataError(
        f"{path}{where} is not UTF-8; it looks like {encoding}.",
        f"iconv -f {encoding} -t UTF-8 '{path}' > '{target}'",
    )


def quote(content: bytes | str) -> str:
    """Return the start of a line for a message, on one line and at most 60 characters."""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    line = text.strip().splitlines()[0] if text.strip() else ""
    return repr(line[:60] + ("..." if len(line) > 60 else ""))


def _is_json(start: bytes) -> bool:
    """Tell JSON from prose or a table that begins with a bracket."""
    return start[1:].lstrip()[:1] in (b"{", b'"', b"]", b"}")


def _from_text(path: Path, start: bytes) -> str:
    """A file whose name says nothing: a table if its first line names columns that we know."""
    first = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    known = names_to_role("columns", "columns")
    for delimiter, found in ((",", "csv"), ("\t", "tsv")):
        cells = next(csv.reader([first], delimiter=delimiter), [])
        if len(cells) > 1 and sum(cell.strip().lower() in known for cell in cells) >= 2:
            return found
    if not path.suffix:
        return "text"
    raise DataError(
        f"{path}: {path.suffix} is not a format of training data that is read here.",
        f"Accepted: {', '.join(FORMATS)} (also .gz), by content. Plain text: name it .txt",
    )
