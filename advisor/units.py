"""Formats and parses bytes, counts and durations; the only place where GiB exists.

Goes in: plain numbers in bytes, tokens, seconds, or text such as "12 GiB". Comes out: text or bytes.
"""

from __future__ import annotations

import re

from advisor.errors import UsageError

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kb": 1000, "kib": KIB,
    "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
    "t": TIB, "tb": 1000**4, "tib": TIB,
}  # fmt: skip


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


def parse_bytes(text: str) -> int:
    """Parse `12`, `12 GB` (decimal), `12GiB`, `12g` (binary) into bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in _FACTORS:
        raise UsageError(f"{text!r} is not a size.", "Write for example 12GiB, 800MB or 1.5TB.")
    return round(float(match[1]) * _FACTORS[match[2].lower()])


def format_count(value: float) -> str:
    """Return a count in words people use: 999, 12.3k, 4.89M, 8.03B."""
    for limit, factor, unit in ((9.995e8, 1e9, "B"), (9.995e5, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


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
