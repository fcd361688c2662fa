"""Formats bytes, counts and durations, the only place where GiB exists; makes text safe to show.

Goes in: numbers in bytes, tokens, seconds; any text. Comes out: text or bytes. Never does: round what is
kept.
"""

from __future__ import annotations

GIB = 1024**3


_UNSEEN = dict.fromkeys(
    (*(code for code in range(32) if chr(code) not in "\t\n"), *range(127, 160), *range(0x202A, 0x202F),
     *range(0x2066, 0x206A))
)  # fmt: skip
"""What moves a terminal's cursor, colours it, or turns its text round."""


def printable(text: str) -> str:
    """Return text without what would command a terminal; lines and tabs stay."""
    return text.translate(_UNSEEN)


def gib(bytes_: float) -> float:
    """Convert bytes to GiB."""
    return bytes_ / GIB


def from_gib(value: float) -> int:
    """Convert GiB to bytes."""
    return round(value * GIB)


def format_bytes(bytes_: float) -> str:
    """Return bytes with a binary unit and three significant digits, for example `4.89 GiB`."""
    value = float(bytes_)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def format_count(value: float) -> str:
    """Return a count in words people use: 999, 12.3k, 4.89M, 8.03B."""
    for limit, factor, unit in ((9.995e8, 1e9, "B"), (9.995e5, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def format_score(value: float, error: float | None) -> str:
    """Return a score with its standard error where there is one: `0.812 ± 0.013`."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def format_seconds(seconds: float) -> str:
    """Return a duration: `42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{round(whole / 60)} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
