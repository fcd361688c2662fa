"""Is the time estimate true? Compares it with token rates that others measured, and keeps the table.

Goes in: a CSV of measured rates (default benchmarks/data/measured_speed.csv). Comes out:
benchmarks/results/time-<date>.md and the same on the screen. Never does: train; fit.

    python benchmarks/time.py [CSV] [--out FILE]
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
from advisor.estimate.time import estimate_time
from advisor.types import AcceleratorFacts, Hardware, MemorySettings, ModelShape, ModelSpec, Record

HERE = Path(__file__).parent
PADDED_TO_MEAN = 1.4
"""Padded over mean length of four rows: assumed for rows whose lengths are not logged (mean 210 tokens)."""
TUNERS = {"full": "full", "lora": "lora", "qlora": "lora", "ia3": "ia3", "ln_tuning": "layernorm"}
DEVICES = {
    "RTX 4090": "RTX 4090", "A100 80GB": "A100 80GB", "A100 40GB": "A100 40GB", "H100 80GB": "H100 80GB",
    "L40S": "L40S",
}  # fmt: skip


class Compared(Record, frozen=True, kw_only=True):
    """One row: tokens a second of one device."""

    id: str
    group: str
    what: str
    measured: float
    low: float
    expected: float
    high: float

    @property
    def error(self) -> float:
        """Relative error of the estimated time; positive is too long."""
        return self.measured / self.expected - 1


def main() -> None:
    """Read, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", nargs="?", type=Path, default=HERE / "data" / "measured_speed.csv")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"time-{today}.md")
    chosen = parser.parse_args()
    compared: list[Compared] = []
    skipped: dict[str, int] = {}
    with chosen.csv.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                compared.append(_compare_row(row))
            except LookupError as reason:
                skipped[str(reason.args[0])] = skipped.get(str(reason.args[0]), 0) + 1
    text = report(compared, skipped)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def _compare_row(row: dict[str, str]) -> Compared:
    if row["suspect"]:
        raise LookupError("the source's figure is beyond the device's peak")
    if row["method"] not in TUNERS:
        raise LookupError("a tuner that is not compared")
    device, spec = _device(row["gpu"]), _spec(row["model"])
    padded = row["tokens"] == "without padding"
    if not padded and not row["seq_len"].isdigit():
        raise LookupError("batch or length is not known")
    if "padded" not in row["tokens"] and row["packing"] != "yes" and not padded:
        raise LookupError("padding is not known")
    length = 210 if padded else int(row["seq_len"])
    computed = round(length * (PADDED_TO_MEAN if padded else 1))
    settings = MemorySettings(
        tuner=TUNERS[row["method"]], weight_bits=4 if row["quant"] else 16, packed=not padded,
        micro_batch=int(row["micro_batch"]), seq_len=computed,
        gradient_checkpointing="yes" in row["grad_ckpt"],
    )  # fmt: skip
    if row["quant"] == "none":
        settings = MemorySettings(
            **{**{k: getattr(settings, k) for k in settings.__struct_fields__}, "weight_bits": 16}
        )
    found = estimate_time(
        spec, settings, rows=1000, epochs=1, effective_batch=settings.micro_batch, max_steps=None,
        mean_tokens=computed, lengths=None, accelerator=device,
        hardware=Hardware(ram_bytes=0, ram_free_bytes=0, cpu_cores=8), rules=knowledge.load().rules["time"],
    ).tokens_per_second  # fmt: skip
    share = length / computed
    return Compared(
        id=row["id"], group=f"{row['framework'].partition(' ')[0]} {row['method']} on {row['gpu']}",
        what=f"{row['model']}, {row['micro_batch']} x {row['seq_len']}, checkpointing {row['grad_ckpt']}",
        measured=float(row["tok_per_s_per_gpu"]), low=found.low * share, expected=found.expected * share,
        high=found.high * share,
    )  # fmt: skip


def _device(name: str) -> AcceleratorFacts:
    for facts in knowledge.load().accelerators.values():
        if facts.name == DEVICES.get(name) or name in facts.aliases:
            return facts
    raise LookupError("the device is not in kb/hardware")


def _spec(name: str) -> ModelSpec:
    models = tomllib.loads((HERE / "data" / "models.toml").read_text(encoding="utf-8"))
    if name in models:
        fields: dict[str, Any] = {"tied": False, **models[name]}
    else:
        plain = name.replace(" ", "-")
        known = next((f for key, f in knowledge.load().models.items() if key.endswith("/" + plain)), None)
        if known is None:
            raise LookupError("the model's shape is not known")
        fields = {key: getattr(known, key) for key in known.__struct_fields__}
    shape = {key: fields[key] for key in ModelShape.__struct_fields__ if key in fields}
    return ModelSpec(
        id=name, architecture="", model_type=fields["model_type"], shape=ModelShape(**shape),
        parameters=int(fields.get("parameters", 0)), context_tokens=0, source=fields["source"],
    )  # fmt: skip


def report(compared: list[Compared], skipped: dict[str, int]) -> str:
    """Return the table in Markdown."""
    lines = [
        "# Time: estimated against measured",
        "",
        f"{len(compared)} rows compared. Error: of the time.",
        "",
    ]
    lines += ["| runs | rows | median error | 90th percentile | outside the band | worst |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row.group for row in compared):
        lines.append(_line(name, [row for row in compared if row.group == name]))
    lines += [_line("all", compared), "", "## The worst rows", ""]
    lines += ["| row | runs | what | measured tokens/s | estimated | error |", "|---|---|---|---|---|---|"]
    for row in sorted(compared, key=lambda one: -abs(one.error))[:12]:
        figures = f"{row.measured:.0f} | {row.expected:.0f} ({row.low:.0f} to {row.high:.0f})"
        lines.append(f"| {row.id} | {row.group} | {row.what} | {figures} | {row.error:+.0%} |")
    lines += ["", "## What had to be assumed", ""]
    lines += [
        "- The utilisation of Ampere and Hopper was set from the llm-foundry rows, and the time that a layer",
        "  loses from other sweeps; the other rows are a test. llm-foundry: FSDP over 8 or 16 devices.",
        f"- Rows of PEFT: mean 210 tokens, padded to {PADDED_TO_MEAN} times that in batches of four.",
        "- torchtune compiles; its 4090 rows do not say whether they recompute.",
        "- S108 to S112 repeat other rows, a third faster at half the utilisation: 8-bit runs, it seems.",
        "", "## Rows left out", "",
    ]  # fmt: skip
    lines += [f"- {number} rows: {reason}" for reason, number in sorted(skipped.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: list[Compared]) -> str:
    errors = sorted(abs(row.error) for row in rows)
    worst = max(rows, key=lambda row: abs(row.error))
    ninth = errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))]
    outside = sum(not row.low <= row.measured <= row.high for row in rows)
    return (
        f"| {name} | {len(rows)} | {statistics.median(errors):.0%} | {ninth:.0%} | {outside} "
        f"| {worst.id} {worst.error:+.0%} |"
    )


if __name__ == "__main__":
    main()
