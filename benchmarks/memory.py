"""Is the memory estimate true? Compares it with peaks that others measured, and keeps the table.

Goes in: a CSV of measured rows (default benchmarks/data/measured_memory.csv) and the assumptions of each
source. Comes out: benchmarks/results/memory-<date>.md and the same on the screen. Never does: train; fit.

    python benchmarks/memory.py [CSV] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import tomllib
from pathlib import Path
from typing import Any

from advisor import knowledge
from advisor.errors import AdvisorError
from advisor.estimate.activations import tokens
from advisor.estimate.layers import layout
from advisor.estimate.memory import estimate_memory
from advisor.estimate.tunable import trainable_parameters
from advisor.types import MemorySettings, ModelFacts, ModelShape, ModelSpec, Record
from advisor.units import GIB

HERE = Path(__file__).parent
TUNERS = {
    "full": "full", "lora": "lora", "qlora": "lora", "ia3": "ia3", "ln_tuning": "layernorm",
    "prefix_tuning": "prefix_tuning", "prompt_tuning": "prompt_tuning", "p_tuning": "p_tuning",
    "vera": "vera",
}  # fmt: skip
APPROXIMATE = ("phi-1.5", "StableLM Alpha")


class Compared(Record, frozen=True, kw_only=True):
    """One row with its estimate, in bytes."""

    id: str
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


def main() -> None:
    """Read, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", nargs="?", type=Path, default=HERE / "data" / "measured_memory.csv")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"memory-{today}.md")
    chosen = parser.parse_args()
    sources = tomllib.loads((HERE / "data" / "assumptions.toml").read_text(encoding="utf-8"))["sources"]
    compared, skipped = compare(chosen.csv, sources)
    text = report(compared, skipped, sources)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def compare(path: Path, sources: list[dict[str, Any]]) -> tuple[list[Compared], dict[str, int]]:
    """Estimate every row that its columns and the assumptions describe; count the others by reason."""
    compared: list[Compared] = []
    skipped: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                compared.append(_compare_row(row, sources))
            except (LookupError, AdvisorError) as reason:
                text = str(reason.args[0]) if reason.args else type(reason).__name__
                skipped[text] = skipped.get(text, 0) + 1
    return compared, skipped


def _compare_row(row: dict[str, str], sources: list[dict[str, Any]]) -> Compared:
    source = next((one for one in sources if _matches(row, one["match"])), None)
    if source is None:
        raise LookupError("too little of the configuration is known")
    if not row["peak_gib"]:
        raise LookupError("out of memory or no figure")
    if row["method"] not in TUNERS or _unusual(row):
        raise LookupError("a tuner that is not offered")
    if "in-bwd" in row["optimizer"] or "offload" in row["grad_ckpt"]:
        raise LookupError(
            "an optimizer inside the backward pass or offloaded activations, which are not offered"
        )
    spec, settings = _spec(row, source), _settings(row, source)
    stated = int(row["trainable_params"] or 0)
    if stated and stated != trainable_parameters(spec, settings):
        raise LookupError("a variant of the tuner with another number of parameters")
    found = estimate_memory(spec, settings, knowledge.load().rules["memory"])
    band = found.reserved_bytes if source["metric"] == "reserved" else found.allocated_bytes
    extra = _outside(row, source, spec, settings)
    group = source["name"] + (" (layout approximate)" if row["model"] in APPROXIMATE else "")
    group += " compiled" if "compile" in row["attn_impl"] else ""
    return Compared(
        id=row["id"], group=group, method=_method(row),
        what=f"{row['model']}, batch {settings.micro_batch} x {settings.seq_len}",
        measured=float(row["peak_gib"]) * GIB, expected=band.expected + extra, high=band.high + extra,
    )  # fmt: skip


def _matches(row: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(row[column].startswith(value) for column, value in wanted.items())


def _unusual(row: dict[str, str]) -> bool:
    return any(word in row["reference"] for word in ("lorafa", "bdlora", "mica"))


def _method(row: dict[str, str]) -> str:
    kind = row["method"] + (f" {row['quant']}" if row["quant"] not in ("", "none") else "")
    return f"{kind}, checkpointing {row['grad_ckpt']}" if row["source"].startswith("pytorch") else kind


def _spec(row: dict[str, str], source: dict[str, Any]) -> ModelSpec:
    known = tomllib.loads((HERE / "data" / "models.toml").read_text(encoding="utf-8"))
    shape = known.get(f"{row['model']}|{row['trainable_params']}") or known.get(row["model"])
    if shape:
        return _spec_of(row["model"], {"tied": False, "parameters": 1, "context_tokens": 2048, **shape})
    models = knowledge.load().models
    name = source.get("model", row["model"])
    if name not in models:
        raise LookupError("the model's shape is not known")
    return _spec_of(name, _fields(models[name]))


def _fields(facts: ModelFacts) -> dict[str, Any]:
    return {name: getattr(facts, name) for name in facts.__struct_fields__}


def _spec_of(name: str, fields: dict[str, Any]) -> ModelSpec:
    shape = {key: fields[key] for key in ModelShape.__struct_fields__ if key in fields}
    return ModelSpec(
        id=name, architecture=fields.get("architecture", ""), model_type=fields["model_type"],
        shape=ModelShape(**shape), parameters=fields["parameters"], context_tokens=fields["context_tokens"],
        source=fields["source"],
    )  # fmt: skip


def _settings(row: dict[str, str], source: dict[str, Any]) -> MemorySettings:
    tuner = "dora" if "dora" in row["reference"] else TUNERS[row["method"]]
    given: dict[str, Any] = {**source["settings"], "tuner": tuner}
    for column, key in (("micro_batch", "micro_batch"), ("seq_len", "seq_len"), ("lora_r", "lora_r")):
        if row[column]:
            given[key] = int(row[column])
    if "nf4" in row["quant"]:
        given |= {"weight_bits": 4, "double_quant": "dq" in row["quant"]}
    targets = row["lora_targets"].split()
    if source["name"] == "peft" and targets:
        given["target"] = ",".join(targets)
    if source["name"] == "torchtune":
        given |= _torchtune(row)
    width = {"prefix_tuning": 28 * 2 * 1024, "prompt_tuning": 3072}.get(row["method"])
    if width:
        given["virtual_tokens"] = int(row["trainable_params"]) // width
    if row["method"] == "p_tuning":
        given["virtual_tokens"] = 20
    return MemorySettings(**given)


def _torchtune(row: dict[str, str]) -> dict[str, Any]:
    eight = "8bit" in row["optimizer"]
    return {
        "gradient_checkpointing": row["grad_ckpt"] != "no",
        "loss": "chunked" if "chunked" in row["loss_impl"] else "full_logits",
        "optimizer": "adamw_8bit" if eight else "adamw_torch_fused",
    }


def _outside(row: dict[str, str], source: dict[str, Any], spec: ModelSpec, settings: MemorySettings) -> int:
    """Bytes that the source's program keeps beyond the one that is estimated, as its assumptions say."""
    blocks, hidden, ffn = layout(spec).blocks, spec.shape.hidden, spec.shape.intermediate
    each = source.get("kept_per_hidden", 0) * hidden
    if source.get("keeps_quantised_inputs") and settings.weight_bits == 4:
        each += 2 * (3 * hidden + ffn)
    known = tomllib.loads((HERE / "data" / "models.toml").read_text(encoding="utf-8"))
    if "mlp_kept" in known.get(row["model"], {}):
        each -= 2 * (4 - known[row["model"]]["mlp_kept"]) * ffn
    return tokens(settings) * blocks * each


def report(compared: list[Compared], skipped: dict[str, int], sources: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = ["# Memory: estimated against measured", "", f"{len(compared)} rows compared.", ""]
    lines += [
        "| source | rows | median error | 90th percentile | above high | worst |",
        "|---|---|---|---|---|---|",
    ]
    groups = dict.fromkeys(row.group for row in compared)
    lines += [_line(name, [row for row in compared if row.group == name]) for name in groups]
    lines.append(_line("all", compared))
    methods = dict.fromkeys(row.method.partition(",")[0] for row in compared)
    lines += [
        "",
        "| method | rows | median error | 90th percentile | above high | worst |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        _line(name, [row for row in compared if row.method.partition(",")[0] == name]) for name in methods
    ]
    lines += ["", *_swapped(compared)]
    lines += [
        "",
        "## The worst rows",
        "",
        "| row | source | method | what | measured GiB | estimated | high | error |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in sorted(compared, key=lambda one: -abs(one.error))[:12]:
        figures = f"{row.measured / GIB:.2f} | {row.expected / GIB:.2f} | {row.high / GIB:.2f}"
        lines.append(f"| {row.id} | {row.group} | {row.method} | {row.what} | {figures} | {row.error:+.1%} |")
    lines += ["", "## What had to be assumed", ""]
    for source in sources:
        lines += [f"- **{source['name']}** ({source['metric']}): " + "; ".join(source["assumed"]) + "."]
    lines += ["", "## Rows left out", ""]
    lines += [f"- {count} rows: {reason}" for reason, count in sorted(skipped.items())]
    return "\n".join(lines) + "\n"


def _swapped(compared: list[Compared]) -> list[str]:
    """Judge each source by what the others alone would have taught: a factor, and an upper bound.

    The factor is the median of measured over estimated of the others; the bound covers their largest
    shortfall twice over, at least 5%.
    """
    lines = [
        "## Calibrated on the others",
        "",
        "What each source would have got from the other sources alone: a factor, and the upper bound.",
        "",
        "| source | rows | factor of the others | median error as it is | with that factor | their bound "
        "| above it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(_source(row) for row in compared):
        own = [row for row in compared if _source(row) == name]
        others = [row.measured / row.expected for row in compared if _source(row) != name]
        factor, bound = statistics.median(others), 1 + max(0.05, 2 * (max(others) - 1))
        plain = statistics.median(abs(row.error) for row in own)
        scaled = statistics.median(abs(factor * row.expected / row.measured - 1) for row in own)
        above = sum(row.measured > bound * row.expected for row in own)
        lines.append(
            f"| {name} | {len(own)} | {factor:.3f} | {plain:.1%} | {scaled:.1%} | {bound:.2f} | {above} |"
        )
    return lines


def _source(row: Compared) -> str:
    return row.group.partition(" ")[0]


def _line(name: str, rows: list[Compared]) -> str:
    errors = sorted(abs(row.error) for row in rows)
    worst = max(rows, key=lambda row: abs(row.error))
    ninth = errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))]
    above = sum(row.measured > row.high for row in rows)
    return (
        f"| {name} | {len(rows)} | {statistics.median(errors):.1%} | {ninth:.1%} | {above} "
        f"| {worst.id} {worst.error:+.1%} |"
    )


if __name__ == "__main__":
    main()
