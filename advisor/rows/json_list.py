"""Cuts a JSON list of objects into its objects without reading it whole.

Goes in: a binary stream. Comes out: the bytes of one object after another, with the line it begins on.
Memory: the longest object and one buffer. Never does: decode the objects (a real parser does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from advisor.errors import DataError
from advisor.rows.formats import BOM, quote

BUFFER_BYTES = 1 << 20
MOST_ROW_BYTES = 1 << 28
"""An object longer than this is taken for one that was never closed."""
# A whole string, a bracket, or a quote that is not closed on its line (JSON strings hold no line break).
# No more is needed to find where an element ends.
_PIECES = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"|["\[\]{}]')


class JsonList:
    """The position inside one list; iterate over `elements()` once."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path = path
        self.row = 0
        self.line = 1
        self._stream = stream
        self._buffer = b""
        self._position = 0
        self._begin = 0
        self._counted = 0
        self._depth = 0

    def elements(self) -> Iterator[tuple[bytes, int]]:
        """Yield (bytes of one object, its first line).

        Raises:
            DataError: an element is no object, a string or bracket is never closed, or the file goes on.
        """
        while True:
            piece = _PIECES.search(self._buffer, self._position)
            if piece is None or piece.group() == b'"':
                if piece is not None and self._buffer.find(b"\n", piece.start()) >= 0:
                    raise self._unclosed(piece.start())
                if not self._more():
                    raise self._cut_off()
                continue
            if self._depth <= 1:
                self._check_between(piece)
            self._position = piece.end()
            mark = self._buffer[piece.start()]
            if mark in b"[{":
                if self._depth == 1:
                    self._open(piece.start())
                self._depth += 1
            elif mark in b"]}":
                self._depth -= 1
                if self._depth == 1:
                    yield self._buffer[self._begin : self._position], self.line
                elif self._depth == 0:
                    self._check_end()
                    return

    def _more(self) -> bool:
        # growing with the object keeps the work on a long one linear
        chunk = self._stream.read(max(BUFFER_BYTES, len(self._buffer)))
        keep = self._begin if self._depth > 1 else self._position
        self._count_lines(keep)
        self._buffer = self._buffer[keep:] + chunk
        self._position -= keep
        self._begin = self._counted = 0
        return bool(chunk) and len(self._buffer) <= MOST_ROW_BYTES

    def _count_lines(self, until: int) -> None:
        self.line += self._buffer.count(b"\n", self._counted, until)
        self._counted = until

    def _open(self, start: int) -> None:
        self._begin, self.row = start, self.row + 1
        self._count_lines(start)
        if self._buffer[start] == ord("["):
            raise self._not_an_object(start)

    def _check_between(self, piece: re.Match[bytes]) -> None:
        """Between the objects of the list only commas and white space may stand."""
        between = self._buffer[self._position : piece.start()].removeprefix(BOM)
        if between.strip(b" \t\r\n,"):
            start = piece.start() - len(between.lstrip(b" \t\r\n,"))
        elif piece.group()[:1] == b'"':
            start = piece.start()
        else:
            return
        self._count_lines(start)
        self.row += 1
        raise self._not_an_object(start)

    def _check_end(self) -> None:
        rest = self._buffer[self._position :] + self._stream.read(BUFFER_BYTES)
        if rest.strip():
            raise DataError(
                f"{self.path}: the list ends after row {self.row}, but the file goes on: {quote(rest)}",
                "Two files joined? Put all rows into one list, or write one object a line.",
            )

    def _not_an_object(self, start: int) -> DataError:
        return DataError(
            f"{self.path}, row {self.row} (line {self.line}): a row must be an object with named columns, "
            f"not {quote(self._buffer[start : start + 200])}",
            'Write the list as [{"text": "..."}, ...].',
        )

    def _unclosed(self, start: int) -> DataError:
        self._count_lines(start)
        begin = self._buffer.rfind(b"\n", 0, start) + 1
        return DataError(
            f"{self.path}, row {max(self.row, 1)} (line {self.line}): not valid JSON: a text is not closed "
            f"before the line ends: {quote(self._buffer[begin : begin + 200])}",
            f"Mend the line: sed -n {self.line}p '{self.path}'",
        )

    def _cut_off(self) -> DataError:
        return DataError(
            f"{self.path} ends inside row {max(self.row, 1)}, which begins on line {self.line}: "
            f"{quote(self._buffer[:200])}",
            "The file was cut off, or lacks a closing quote or bracket. Make or download it again.",
        )
