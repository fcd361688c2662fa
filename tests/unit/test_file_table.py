"""Which of several exported files is recommended."""

from __future__ import annotations

from advisor.knowledge import load
from advisor.types import FileRow
from advisor.verify.card import table_lines
from advisor.verify.table import recommended


def _row(quant: str, size: int, change: float | None, **more: bool | None) -> FileRow:
    kl = None if change is None else abs(change)
    return FileRow(
        path=f"export/model-{quant}.gguf", quant=quant, bytes=size, bits_per_weight=4.5,
        proved=more.get("proved", True), kl_mean=kl, top1=0.99, perplexity_change=change,
        tokens_per_second=30.0, running_bytes=size + 10, fits=more.get("fits"),
    )  # fmt: skip


def test_smallest_file_that_loses_little() -> None:
    """Four bits where they cost less than a percent, else more bits, else the nearest file."""
    rows = [_row("F16", 16, 0.0), _row("Q8_0", 8, 0.001), _row("Q4_K_M", 4, 0.009)]
    assert recommended(rows, None, load()) is rows[2]
    rows[2] = _row("Q4_K_M", 4, 0.05)
    assert recommended(rows, None, load()) is rows[1]
    assert recommended([_row("Q4_K_M", 4, 0.05), _row("Q3_K_M", 3, 0.2)], None, load()).quant == "Q4_K_M"


def test_plan_decides_unless_its_file_failed_or_does_not_fit() -> None:
    """What was planned is taken; a file that is not right or too large never is."""
    rows = [_row("Q8_0", 8, 0.0), _row("Q4_K_M", 4, 0.05)]
    assert recommended(rows, "Q4_K_M", load()) is rows[1]
    assert recommended([rows[0], _row("Q4_K_M", 4, 0.05, proved=False)], "Q4_K_M", load()) is rows[0]
    assert recommended([_row("Q8_0", 8, 0.0, fits=False), rows[1]], "Q8_0", load()) is rows[1]
    assert recommended([_row("Q8_0", 8, 0.0, fits=False)], "Q8_0", load()) is None
    assert recommended([_row("Q8_0", 8, None, proved=None)], None, load()) is None


def test_table_leaves_out_what_was_not_measured() -> None:
    """An unverified file has empty cells, and without a device there is no column for it."""
    head, _, row = table_lines([_row("Q8_0", 8, None, proved=None)])
    assert "fits" not in head
    assert "|  |  |" not in head
    assert row.count("|") == head.count("|")
    assert "fits the device" in table_lines([_row("Q8_0", 8, 0.0, fits=True)])[0]
