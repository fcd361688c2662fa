"""Is the memory estimate true? Compares it with peaks that others measured, and keeps the table.

Goes in: a CSV of measured rows (default benchmarks/data/measured_memory.csv), and how the rows of each source
are read (benchmarks/data/assumptions.toml). Comes out: benchmarks/results/memory-<date>.md, and the same on
the screen.
Never does: train; change a constant of the estimator.

    python benchmarks/memory.py [CSV] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stated_rows import metric_of, settings_of, usual

from advisor import knowledge
from advisor.errors import AdvisorError
from advisor.estimate.activations import saved_per_token, tokens
from advisor.estimate.layers import layout
from advisor.estimate.memory import estimate_memory
from advisor.estimate.stated import stated_tuner
from advisor.estimate.tunable import trainable_parameters
from advisor.scenario.models import name_model
from advisor.types import (
    MemoryEstimate,
    MemorySettings,
    ModelFacts,
    ModelShape,
    ModelSpec,
    Record,
    TunerMemory,
)
from advisor.units import GIB

HERE = Path(__file__).parent
KNOWN = knowledge.load()
RULES = KNOWN.rules["memory"]
SHAPES = tomllib.loads((HERE / "data" / "models.toml").read_text(encoding="utf-8"))
Row = dict[str, str]


class LeftOutError(Exception):
    """A row is not compared; the message says why."""


class Compared(Record, frozen=True, kw_only=True):
    """One row with its estimate, in bytes."""

    id: str
    source: str
    group: str
    method: str
    what: str
    measured: float
    expected: float
    high: float

    @property
    def error(self) -> float:
        """Relative error of the estimate; positive is too much."""
        return self.expected / self.measured - 1


class Fits(Record, frozen=True, kw_only=True):
    """One row of which only is known whether it fitted."""

    id: str
    what: str
    fitted: bool
    low: float
    high: float
    room: float

    @property
    def verdict(self) -> str:
        """What the estimate says of the room: right, open (it lies within the band) or wrong."""
        if self.low <= self.room < self.high:
            return "open"
        return "right" if self.fitted == (self.high <= self.room) else "wrong"


def main() -> None:
    """Read, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", nargs="?", type=Path, default=HERE / "data" / "measured_memory.csv")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"memory-{today}.md")
    chosen = parser.parse_args()
    how = tomllib.loads((HERE / "data" / "assumptions.toml").read_text(encoding="utf-8"))
    with chosen.csv.open(encoding="utf-8", newline="") as lines:
        rows = [usual(row, number) for number, row in enumerate(csv.DictReader(lines), start=1)]
    text = report(rows, how)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def compare(
    rows: Iterable[Row], how: dict[str, Any], **fixed: Any
) -> tuple[list[Compared], list[Fits], dict[str, list[str]]]:
    """Estimate every row that its columns and the assumptions describe; keep the ids of the others by reason.

    Args:
        rows: of the table.
        how: content of assumptions.toml.
        fixed: settings that replace those of the source.
    """
    compared: list[Compared] = []
    fits: list[Fits] = []
    left_out: dict[str, list[str]] = {}
    for row in rows:
        try:
            found = _compare_row(row, how, fixed)
        except (LeftOutError, AdvisorError) as reason:
            left_out.setdefault(str(reason), []).append(row["id"])
            continue
        if isinstance(found, Fits):
            fits.append(found)
        else:
            compared.append(found)
    return compared, fits, left_out


def _compare_row(row: Row, how: dict[str, Any], fixed: dict[str, Any]) -> Compared | Fits:
    for other in how["left_out"]:
        if _matches(row, other):
            raise LeftOutError(other["reason"])
    source = next((one for one in how["sources"] if _matches(row, one)), None)
    if source is None:
        return _by_its_columns(row)
    cases = [case for case in source.get("cases", []) if _matches(row, case)]
    for case in cases:
        if "left_out" in case:
            raise LeftOutError(case["left_out"])
    terms: dict[str, Any] = {**source, **{key: value for case in cases for key, value in case.items()}}
    given = {**source["settings"], **_columns(row, source)}
    for case in cases:
        given |= case.get("settings", {})
    spec = _spec(row, terms)
    settings = _settings({**given, **fixed}, source)
    if not row["peak_gib"] and row["outcome"] not in ("fits", "OOM"):
        raise LeftOutError("no figure")
    stated = int(row["trainable_params"] or 0)
    counted = trainable_parameters(spec, settings)
    if stated and abs(counted - stated) > terms.get("count_tolerance", 0) * stated:
        raise LeftOutError(f"{row['id']} trains {stated:,} parameters where {counted:,} were counted")
    found = estimate_memory(spec, settings, RULES)
    what = f"{row['model']}, batch {settings.micro_batch} x {settings.seq_len}"
    extra = _outside(terms, spec, settings)
    if not row["peak_gib"]:
        return _fits(row, terms, found, extra, f"{what}, {_method(row)}")
    band = found.reserved_bytes if source["metric"] == "reserved" else found.allocated_bytes
    return Compared(
        id=row["id"], source=source["name"], group=terms.get("group", source["name"]), method=_method(row),
        what=what, measured=float(row["peak_gib"]) * GIB, expected=band.expected + extra,
        high=band.high + extra,
    )  # fmt: skip


def _by_its_columns(row: Row) -> Compared | Fits:
    """A row of a source that assumptions.toml does not know: what it leaves open widens the band."""
    if not row["peak_gib"] and row["outcome"].lower() not in ("fits", "oom"):
        raise LeftOutError("no figure")
    named = name_model(row["model"], KNOWN)
    if named.spec is None:  # a name without its owner may still tell the size
        named = name_model("-/" + row["model"].replace(" ", "-"), KNOWN)
    if named.spec is None:
        raise LeftOutError(f"the model {row['model'] or '(none)'} is not known")
    try:
        given = settings_of(row, KNOWN)
    except ValueError as problem:
        raise LeftOutError(str(problem)) from problem
    guessed = (f"the shape of {row['model']} is not known: guessed by its size",)
    given["unknown"] += () if named.spec.verified else guessed
    settings = _settings(given, {})
    found = estimate_memory(named.spec, settings, RULES)
    program, what = (
        row["framework"] or row["source"],
        f"{row['model']}, batch {settings.micro_batch} x {settings.seq_len}",
    )
    if not row["peak_gib"]:
        raise LeftOutError("whether it fitted says nothing without the room of the device")
    band = {"allocated": found.allocated_bytes, "reserved": found.reserved_bytes, "device": found.peak_bytes}
    chosen = band[metric_of(row)]
    return Compared(
        id=row["id"], source=program, group=f"{program}, by its columns", method=_method(row), what=what,
        measured=float(row["peak_gib"]) * GIB, expected=chosen.expected, high=chosen.high,
    )  # fmt: skip


def _fits(row: Row, terms: dict[str, Any], found: MemoryEstimate, extra: int, what: str) -> Fits:
    """A row that ran out of memory or did not, on a device of a known size."""
    return Fits(
        id=row["id"], what=what, fitted=row["outcome"] == "fits", low=found.peak_bytes.low + extra,
        high=found.peak_bytes.high + extra, room=terms["room_gib"] * GIB,
    )  # fmt: skip


def _matches(row: Row, wanted: dict[str, Any]) -> bool:
    """A row matches when each named column begins with the value, and the reference holds `reference`."""
    columns: dict[str, str] = wanted.get("match", {})
    return wanted.get("reference", "") in row["reference"] and all(
        row[name].startswith(value) for name, value in columns.items()
    )


def _method(row: Row) -> str:
    return row["method"] + (f" {row['quant']}" if row["quant"] not in ("", "none") else "")


def _spec(row: Row, terms: dict[str, Any]) -> ModelSpec:
    name = terms.get("model", row["model"])
    shape = SHAPES.get(f"{row['model']}|{row['trainable_params']}") or SHAPES.get(name)
    if shape:
        return _spec_of(name, {"tied": False, "parameters": 1, "context_tokens": 2048, **shape})
    if name not in KNOWN.models:
        raise LeftOutError(f"the shape of {name} is not known")
    facts: ModelFacts = KNOWN.models[name]
    return _spec_of(name, {field: getattr(facts, field) for field in facts.__struct_fields__})


def _spec_of(name: str, fields: dict[str, Any]) -> ModelSpec:
    shape = {key: fields[key] for key in ModelShape.__struct_fields__ if key in fields}
    return ModelSpec(
        id=name, architecture=fields.get("architecture", ""), model_type=fields["model_type"],
        shape=ModelShape(**shape), parameters=fields["parameters"], context_tokens=fields["context_tokens"],
        source=fields["source"],
    )  # fmt: skip


def _columns(row: Row, source: dict[str, Any]) -> dict[str, Any]:
    """Settings that stand in the columns of the row."""
    given: dict[str, Any] = {"tuner": row["method"]}
    for column in ("micro_batch", "seq_len", "lora_r"):
        if row[column]:
            given[column] = int(row[column])
    if int(row["n_gpu"] or 1) > 1:
        given |= {"gpus": int(row["n_gpu"]), "shard": "fsdp"}
    if "nf4" in row["quant"] or "fp4" in row["quant"]:
        given |= {"weight_bits": 4, "double_quant": "dq" in row["quant"]}
    if "int8" in row["quant"]:
        given["weight_bits"] = 8
    if row["grad_ckpt"]:
        given["gradient_checkpointing"] = row["grad_ckpt"].startswith("yes")
    if source.get("targets_named") and row["lora_targets"]:
        given["target"] = ",".join(row["lora_targets"].split())
    return given


def _settings(given: dict[str, Any], source: dict[str, Any]) -> MemorySettings:
    """Add what is stated of a tuner: by the source, for a program of its own, or by kb/."""
    tuner = given["tuner"]
    own = source.get("tuners", {}).get(tuner)
    return MemorySettings(
        **given, stated=TunerMemory(**own) if own else stated_tuner(tuner, KNOWN.rules["tuners"])
    )


def _outside(terms: dict[str, Any], spec: ModelSpec, settings: MemorySettings) -> int:
    """Bytes that the source's program keeps beyond the one that is estimated, as its assumptions say."""
    plan, shape = layout(spec), spec.shape
    each = terms.get("kept_per_hidden", 0) * shape.hidden
    if terms.get("keeps_quantised_inputs") and settings.weight_bits < 16:
        each += 2 * (3 * shape.hidden + shape.intermediate)
    if terms.get("keeps_cache") and settings.tuner != "prefix_tuning":
        each += 2 * 2 * shape.kv_heads * shape.head_dim
    if compiled := terms.get("compiled"):
        sizes = {
            "hidden": shape.hidden,
            "query": shape.heads * shape.head_dim,
            "intermediate": shape.intermediate,
        }
        kept = sum(factor * sizes[name] for name, factor in compiled.items()) + 4 * shape.heads
        each += kept - saved_per_token(spec, plan, settings)
    if "mlp_kept" in SHAPES.get(spec.id, {}):
        each -= 2 * (4 - SHAPES[spec.id]["mlp_kept"]) * shape.intermediate
    blocks = 1 if settings.gradient_checkpointing else plan.blocks
    whole = 2 * (plan.blocks + 2) * plan.block_weights if terms.get("whole_gradients") else 0
    wide = terms.get("wide_vocabulary", 0) * (plan.embedding + plan.head)
    logits = terms.get("logit_bytes", 0) * shape.vocab
    return int(tokens(settings) * (blocks * each + logits) + whole + wide)


def report(rows: list[Row], how: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    compared, fits, left_out = compare(rows, how)
    if not compared:
        return "\n".join(
            ["No row can be compared:", *(f"- {', '.join(ids)}: {why}" for why, ids in left_out.items())]
        )
    head = f"{len(compared)} of {len(rows)} rows compared, {len(fits)} more on whether they fit."
    lines = ["# Memory: estimated against measured", "", head, ""]
    lines += [*_table("source", {row.group: row.group for row in compared}, compared, "group"), ""]
    lines += [*_table("method", {row.method: row.method for row in compared}, compared, "method"), ""]
    lines += [*_swapped(compared), "", *_halves(rows, how), "", *_worst(compared), "", *_fitting(fits)]
    lines += ["", "## What had to be assumed", ""]
    for source in how["sources"]:
        lines += [f"- **{source['name']}** ({source['metric']}): " + "; ".join(source["assumed"]) + "."]
    lines += ["", "## Rows left out", ""]
    lines += [f"- {len(ids)} rows ({_span(ids)}): {reason}" for reason, ids in left_out.items()]
    return "\n".join(lines) + "\n"


def _span(ids: list[str]) -> str:
    return ", ".join(ids) if len(ids) <= 8 else f"{ids[0]} to {ids[-1]}"


def _table(title: str, names: Iterable[str], compared: list[Compared], field: str) -> list[str]:
    lines = [
        f"| {title} | rows | median error | 90th percentile | above high | worst |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(name, [row for row in compared if getattr(row, field) == name]) for name in names]
    return [*lines, _line("all", compared)]


def _line(name: str, rows: list[Compared]) -> str:
    worst = max(rows, key=lambda row: abs(row.error))
    above = sum(row.measured > row.high for row in rows)
    middle, ninth = _errors(rows)
    return f"| {name} | {len(rows)} | {middle:.1%} | {ninth:.1%} | {above} | {worst.id} {worst.error:+.1%} |"


def _errors(rows: list[Compared]) -> tuple[float, float]:
    """Median and 90th percentile of the absolute errors."""
    errors = sorted(abs(row.error) for row in rows)
    return statistics.median(errors), errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))]


def _swapped(compared: list[Compared]) -> list[str]:
    """Judge each source by what the others alone would have taught: a factor, and an upper bound.

    The factor is the median of measured over estimated of the others; the bound covers their largest
    shortfall twice over, at least 5%.
    """
    lines = [
        "## Calibrated on the others", "",
        "What each source would have got from the other sources alone: a factor, and the upper bound.", "",
        "| source | rows | factor of the others | median error as it is | with that factor | their bound "
        "| above it |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = dict.fromkeys(row.source for row in compared)
    for name in names if len(names) > 1 else ():
        own = [row for row in compared if row.source == name]
        others = [row.measured / row.expected for row in compared if row.source != name]
        factor, bound = statistics.median(others), 1 + max(0.05, 2 * (max(others) - 1))
        scaled = statistics.median(abs(factor * row.expected / row.measured - 1) for row in own)
        above = sum(row.measured > bound * row.expected for row in own)
        errors = f"{_errors(own)[0]:.1%} | {scaled:.1%}"
        lines.append(f"| {name} | {len(own)} | {factor:.3f} | {errors} | {bound:.2f} | {above} |")
    return lines


def _halves(rows: list[Row], how: dict[str, Any]) -> list[str]:
    """The unknown of PEFT's benchmark, its longest batch: found on half of the rows, tried on the rest."""
    (source,) = (one for one in how["sources"] if one["name"] == "peft")
    own = [row for row in rows if _matches(row, source)]
    if len(own) < 2:
        return []
    lines = [
        "## The length of PEFT's longest batch", "",
        "Found on every second row (least median error), tried on the others; and the other way round.", "",
        "| found on | tokens | median error there | on the others | 90th percentile on the others |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, first, second in (("even rows", own[::2], own[1::2]), ("odd rows", own[1::2], own[::2])):
        by_length = {length: _errors(compare(first, how, seq_len=length)[0]) for length in range(650, 769, 5)}
        best = min(by_length, key=lambda length: by_length[length])
        middle, ninth = _errors(compare(second, how, seq_len=best)[0])
        lines.append(f"| {name} | {best} | {by_length[best][0]:.1%} | {middle:.1%} | {ninth:.1%} |")
    return lines


def _worst(compared: list[Compared]) -> list[str]:
    lines = [
        "## The worst rows", "",
        "| row | source | method | what | measured GiB | estimated | high | error |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(compared, key=lambda one: -abs(one.error))[:15]:
        figures = f"{row.measured / GIB:.2f} | {row.expected / GIB:.2f} | {row.high / GIB:.2f}"
        lines.append(f"| {row.id} | {row.group} | {row.method} | {row.what} | {figures} | {row.error:+.1%} |")
    return lines


def _fitting(fits: list[Fits]) -> list[str]:
    lines = [
        "## Rows of which only is known whether they fitted", "",
        "| row | what | it | low | high | room GiB | the estimate is |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in fits:
        said = "fitted" if row.fitted else "ran out of memory"
        figures = f"{row.low / GIB:.1f} | {row.high / GIB:.1f} | {row.room / GIB:.1f}"
        lines.append(f"| {row.id} | {row.what} | {said} | {figures} | {row.verdict} |")
    return lines


if __name__ == "__main__":
    main()
