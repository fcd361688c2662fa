"""Does the closed form agree with the tracer? Compares them over tuners, objectives, families, lengths.

Goes in: nothing. Comes out: benchmarks/results/trace-<date>.md and the same on the screen. Never does: fit.

    python benchmarks/trace.py [--settings 216] [--seed 0]

Each family keeps the width of a published model, with six layers: what one layer costs does not depend on
how many there are. The settings are drawn from the whole product, the same ones in every run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from advisor import knowledge
from advisor.estimate.memory import estimate_memory, traced_estimate
from advisor.probe.software import installed_packages
from advisor.types import MemorySettings, ModelShape, ModelSpec, Record

HERE = Path(__file__).parent
LAYERS = 6
FAMILIES = (
    "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "google/gemma-3-1b-it",
    "microsoft/Phi-4-mini-instruct", "allenai/OLMo-2-1124-7B",
)  # fmt: skip
SMALL = ("ia3", "ln_tuning", "prompt_tuning", "p_tuning", "prefix_tuning")
TUNERS = ("full", "lora", "lora", "qlora", "dora", *SMALL)
OBJECTIVES = ("sft", "sft", "dpo", "kto", "orpo", "reward")
LENGTHS, BATCHES = (256, 1024, 4096), (1, 4)
WITHOUT = ("olmo2", "phi3")
"""Families for which PEFT names no layers of its own choice."""
TARGETS = ("all-linear", "q_v", "mlp")


class Compared(Record, frozen=True, kw_only=True):
    """One setting with both figures, in bytes."""

    family: str
    settings: MemorySettings
    closed: float
    traced: float
    phases: str

    @property
    def error(self) -> float:
        """Relative error of the closed form."""
        return self.closed / self.traced - 1


def main() -> None:
    """Draw, trace, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", type=int, default=216)
    parser.add_argument("--seed", type=int, default=0)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"trace-{today}.md")
    chosen = parser.parse_args()
    rows = compare(draw(chosen.settings, chosen.seed))
    text = report(rows)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def specs() -> list[ModelSpec]:
    """Return the families, shortened."""
    return [shortened(name) for name in FAMILIES if name in knowledge.load().models]


def shortened(name: str, layers: int = LAYERS) -> ModelSpec:
    """Return a model of kb/models with fewer layers."""
    facts = knowledge.load().models[name]
    shape = {key: getattr(facts, key) for key in ModelShape.__struct_fields__}
    return ModelSpec(
        id=name, architecture=facts.architecture, model_type=facts.model_type, parameters=0,
        shape=ModelShape(**{**shape, "layers": layers}), context_tokens=facts.context_tokens,
        source=facts.source,
    )  # fmt: skip


def draw(count: int, seed: int) -> list[tuple[ModelSpec, MemorySettings]]:
    """Return settings that the programs can train, evenly over the families."""
    every = [
        settings(*point)
        for point in itertools.product(
            TUNERS, OBJECTIVES, LENGTHS, BATCHES, (True, False), ("bf16", "bf16", "fp32"), TARGETS,
            ("chunked", "full_logits"),
        )
    ]  # fmt: skip
    valid = [one for one in every if one is not None]
    families = specs()
    dice = random.Random(seed)
    each = -(-count // len(families))
    drawn = []
    for spec in families:
        possible = [
            one for one in valid if one.tuner not in ("ia3", "ln_tuning") or spec.model_type not in WITHOUT
        ]
        drawn += [(spec, one) for one in dice.sample(possible, each)]
    return drawn[:count]


def settings(
    tuner: str, objective: str, length: int, batch: int, checkpointing: bool, precision: Any, target: str,  # noqa: FBT001
    loss: Any,
) -> MemorySettings | None:  # fmt: skip
    """Return one point of the product, or None where no program trains it."""
    if tuner in SMALL and (objective != "sft" or target != "all-linear"):
        return None
    if tuner == "prefix_tuning" and checkpointing:
        return None
    if loss == "full_logits" and (objective not in ("sft", "orpo") or length == 4096):
        return None
    if tuner == "qlora" and precision == "fp32":
        return None
    wide = precision == "fp32" or (tuner == "full" and length != 1024)
    return MemorySettings(
        tuner=tuner, objective=objective, seq_len=length, micro_batch=batch, precision=precision,
        gradient_checkpointing=checkpointing, target=target, loss=loss,
        weight_bits=4 if tuner == "qlora" else 32 if wide else 16,
        virtual_tokens=20 if tuner in SMALL[2:] else 0,
    )  # fmt: skip


def compare(cases: list[tuple[ModelSpec, MemorySettings]]) -> list[Compared]:
    """Ask both; the tracer in one process of its own."""
    lines = [msgspec.json.encode({"spec": spec, "settings": one}) for spec, one in cases]
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "advisor.train.trace"], input=b"\n".join(lines), capture_output=True,
        check=False,
    )  # fmt: skip
    found = [msgspec.json.decode(line) for line in answer.stdout.splitlines() if line.startswith(b"{")]
    if len(found) != len(cases):
        print(f"Stopped at {cases[len(found)]}\n{answer.stderr.decode()[-3000:]}")
    rules = knowledge.load().rules["memory"]
    rows = []
    for (spec, one), peaks in zip(cases, found, strict=False):
        closed, traced = estimate_memory(spec, one, rules), traced_estimate(spec, one, rules, peaks)
        rows.append(
            Compared(
                family=spec.model_type, settings=one, closed=closed.allocated_bytes.expected,
                traced=traced.allocated_bytes.expected, phases=f"{closed.phase}, {traced.phase}",
            )
        )  # fmt: skip
    return rows


def report(rows: list[Compared]) -> str:
    """Return the tables in Markdown."""
    errors = sorted(abs(row.error) for row in rows)
    versions = ", ".join(
        f"{name} {installed_packages()[name]}" for name in ("torch", "transformers", "peft", "trl")
    )
    lines = [
        "# Memory: closed form against tracer", "",
        f"{len(rows)} settings; median {statistics.median(errors):.2%}, 90th percentile "
        f"{errors[round(0.9 * (len(errors) - 1))]:.2%}, maximum {errors[-1]:.2%}. {versions}.", "",
    ]  # fmt: skip
    for what, key in (
        ("family", lambda row: row.family), ("tuner", lambda row: row.settings.tuner),
        ("objective", lambda row: f"{row.settings.objective}, {row.settings.loss}"),
    ):  # fmt: skip
        lines += [f"| {what} | settings | median | worst |", "|---|---|---|---|"]
        for name in dict.fromkeys(map(key, rows)):
            some = [row.error for row in rows if key(row) == name]
            worst = max(some, key=abs)
            lines.append(f"| {name} | {len(some)} | {statistics.median(map(abs, some)):.2%} | {worst:+.2%} |")
        lines.append("")
    lines += [
        "## The largest differences",
        "",
        "| family | settings | phase | closed GiB | traced GiB | error |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda one: -abs(one.error))[:25]:
        s = row.settings
        what = (
            f"{s.tuner} {s.objective}, {s.micro_batch} x {s.seq_len}, {s.target}, {s.precision} on "
            f"{s.weight_bits} bits, {s.loss}{', recomputed' if s.gradient_checkpointing else ''}"
        )
        lines.append(
            f"| {row.family} | {what} | {row.phases} | {row.closed / 2**30:.2f} | {row.traced / 2**30:.2f} "
            f"| {row.error:+.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
