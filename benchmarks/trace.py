"""Does the closed form agree with the tracer? Compares them over tuners, objectives, families, lengths.

Goes in: nothing. Comes out: benchmarks/results/trace-<date>.md and the same on the screen. Never does: fit.

    python benchmarks/trace.py [--settings 216] [--seed 0] [--processes 2] [--rows FILE] [--no-times]

Each family keeps the width of a published model, with six layers: what one layer costs does not depend on
how many there are. The settings are drawn from the whole product, the same ones in every run. Answers of the
tracer are kept in the rows file, so that a run goes on where it was stopped. Then plans of 8B and 70B are
traced, each in a process of its own as `estimate --engine trace` does it, and timed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import queue
import random
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from advisor import knowledge
from advisor.estimate.memory import estimate_memory, traced_estimate
from advisor.intake import own_cache_dir
from advisor.probe.software import installed_packages
from advisor.types import MemorySettings, ModelShape, ModelSpec, Record, TracedPeaks

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


TRACER = [sys.executable, "-P", "-m", "advisor.train.trace_alone"]
MIDDLE, LARGE = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"
PLANS: tuple[tuple[str, dict[str, Any]], ...] = (
    (MIDDLE, {"tuner": "lora", "seq_len": 2048}),
    (MIDDLE, {"tuner": "qlora", "weight_bits": 4, "seq_len": 8192}),
    (MIDDLE, {"tuner": "full", "seq_len": 4096}),
    (MIDDLE, {"tuner": "full", "objective": "dpo", "seq_len": 2048}),
    (MIDDLE, {"tuner": "qlora", "objective": "dpo", "weight_bits": 4, "seq_len": 4096}),
    (MIDDLE, {"tuner": "lora", "seq_len": 2048, "gradient_checkpointing": False}),
    (LARGE, {"tuner": "qlora", "weight_bits": 4, "seq_len": 2048}),
    (LARGE, {"tuner": "lora", "seq_len": 8192}),
    (LARGE, {"tuner": "full", "seq_len": 4096}),
)


class Row(Record, frozen=True, kw_only=True):
    """One answer of the tracer, as the rows file keeps it."""

    question: str
    peaks: TracedPeaks


class Timed(Record, frozen=True, kw_only=True):
    """How long one trace took."""

    what: str
    wall_seconds: float
    processor_seconds: float
    blocks: str
    error: float


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
    """Draw, trace, compare, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", type=int, default=216)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=own_cache_dir() / "benchmark-trace.jsonl")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"trace-{today}.md")
    chosen = parser.parse_args()
    cases = draw(chosen.settings, chosen.seed)
    text = report(compare(cases, traced(cases, chosen.rows, chosen.processes)))
    if chosen.times:
        text += "\n" + times_report([timed(*plan) for plan in PLANS])
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


def question(spec: ModelSpec, one: MemorySettings) -> str:
    """Return what the tracer is asked."""
    return msgspec.json.encode({"spec": spec, "settings": one}).decode()


def traced(
    cases: list[tuple[ModelSpec, MemorySettings]], rows: Path, processes: int
) -> dict[str, TracedPeaks]:
    """Return the answers of the tracer by question, those of earlier runs among them."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    found = {row.question: row.peaks for row in (msgspec.json.decode(line, type=Row) for line in lines)}
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for asked in dict.fromkeys(question(*case) for case in cases):
        if asked not in found:
            waiting.put(asked)
    if waiting.empty():
        return found
    with rows.open("ab") as kept, ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda _: _ask(waiting, found, kept), range(processes)))
    return found


def _ask(waiting: queue.SimpleQueue[str], found: dict[str, TracedPeaks], kept: BinaryIO) -> None:
    """Ask one process of the tracer until nothing waits."""
    with subprocess.Popen(TRACER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        while not waiting.empty():
            asked = waiting.get()
            process.stdin.write(asked.encode() + b"\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith(b"{")), None)
            if answer is None:
                raise SystemExit(f"The tracer ended at {asked}")
            found[asked] = msgspec.json.decode(answer, type=TracedPeaks)
            kept.write(msgspec.json.encode(Row(question=asked, peaks=found[asked])) + b"\n")
            kept.flush()
        process.stdin.close()


def compare(cases: list[tuple[ModelSpec, MemorySettings]], found: dict[str, TracedPeaks]) -> list[Compared]:
    """Put both figures beside each other."""
    rules = knowledge.load().rules["memory"]
    rows = []
    for spec, one in cases:
        peaks = found[question(spec, one)]
        closed, followed = estimate_memory(spec, one, rules), traced_estimate(spec, one, rules, peaks)
        rows.append(
            Compared(
                family=spec.model_type, settings=one, closed=closed.allocated_bytes.expected,
                traced=followed.allocated_bytes.expected, phases=f"{closed.phase}, {followed.phase}",
            )
        )  # fmt: skip
    return rows


def timed(name: str, wanted: dict[str, Any]) -> Timed:
    """Trace one plan in a process of its own, from its start to its end."""
    spec, one = shortened(name, knowledge.load().models[name].layers), MemorySettings(**wanted)
    rules = knowledge.load().rules["memory"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    answer = subprocess.run(TRACER, input=question(spec, one).encode(), capture_output=True, check=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = msgspec.json.decode(answer.stdout.splitlines()[-1], type=TracedPeaks)
    closed, followed = estimate_memory(spec, one, rules), traced_estimate(spec, one, rules, peaks)
    return Timed(
        what=f"{name}, {described(one)}", wall_seconds=wall,
        processor_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        blocks=", ".join(map(str, peaks.traced_blocks)) or "all",
        error=closed.allocated_bytes.expected / followed.allocated_bytes.expected - 1,
    )  # fmt: skip


def times_report(rows: list[Timed]) -> str:
    """Return the table of times in Markdown."""
    lines = [
        "## Time of the tracer", "",
        "One process a plan, imports included; a model of more than 48 blocks is traced at smaller depths.",
        "", "| plan | traced blocks | seconds | processor seconds | closed form against it |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row.what} | {row.blocks} | {row.wall_seconds:.1f} | {row.processor_seconds:.1f} "
        f"| {row.error:+.2%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def described(one: MemorySettings) -> str:
    """Return a setting in words."""
    return (
        f"{one.tuner} {one.objective}, {one.micro_batch} x {one.seq_len}, {one.target}, {one.precision} on "
        f"{one.weight_bits} bits, {one.loss}{', recomputed' if one.gradient_checkpointing else ''}"
    )


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
        f"IA3 and layer-norm tuning of {' and '.join(WITHOUT)} are not traced: PEFT names no layers there.",
        "",
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
        lines.append(
            f"| {row.family} | {described(row.settings)} | {row.phases} | {row.closed / 2**30:.2f} "
            f"| {row.traced / 2**30:.2f} | {row.error:+.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
