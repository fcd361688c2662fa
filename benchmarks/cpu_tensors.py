"""Is the tracer true? Compares it with the allocations of real training steps on this processor.

    python benchmarks/cpu_tensors.py

Goes in: nothing. Comes out: benchmarks/results/cpu-tensors-<date>.md. Never does: use stand-ins for the
real steps: kernels, autocast, loss and optimizer are the installed ones, and torch's profiler counts what
they allocate.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from advisor.types import MemorySettings, ModelSpec  # noqa: E402 - after the path is set
from unit.estimate_cases import spec  # noqa: E402
from unit.test_trace import REAL, ask, real_peaks  # noqa: E402

WIDE = {"layers": 4, "hidden": 512, "intermediate": 1536, "head_dim": 64, "vocab": 8000}
FULL32: dict[str, Any] = {"tuner": "full", "weight_bits": 32, "precision": "fp32"}
HALF: dict[str, Any] = {"tuner": "lora", "weight_bits": 16}
MORE: tuple[tuple[ModelSpec, dict[str, Any]], ...] = (
    (spec("llama", heads=8, kv_heads=4, **WIDE), {**FULL32, "gradient_checkpointing": False}),
    (spec("llama", heads=8, kv_heads=4, **WIDE), {"tuner": "full", "weight_bits": 32}),
    (spec("llama", heads=8, kv_heads=4, **WIDE), {**HALF, "loss": "full_logits"}),
    (spec("qwen3", heads=8, kv_heads=4, **WIDE), {**HALF, "gradient_checkpointing": False}),
    (spec("qwen3", heads=8, kv_heads=4, **WIDE), FULL32),
    (spec("gemma3_text", heads=8, kv_heads=1, **WIDE), {**FULL32, "gradient_checkpointing": False}),
    (spec("phi3", heads=8, kv_heads=8, tied=False, **WIDE), HALF),
    (spec("olmo2", heads=8, kv_heads=8, tied=False, **WIDE), {**FULL32, "loss": "full_logits"}),
)


def main() -> None:
    """Trace, train, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"cpu-tensors-{today}.md")
    chosen = parser.parse_args()
    common = {"device": "cpu", "seq_len": 256, "micro_batch": 2}
    cases = (*REAL, *((model, {**common, **given}) for model, given in MORE))
    lines = ["| family | setting | traced MB | real MB | error |", "|---|---|---|---|---|"]
    errors = []
    for (model, given), traced, real in zip(cases, ask(cases), real_peaks(cases), strict=True):
        peak = traced.fullest[1]
        errors.append(peak / real - 1)
        settings = MemorySettings(**given)
        what = (
            f"{settings.tuner}, {settings.precision} on {settings.weight_bits} bits, {settings.loss}"
            f"{', recomputed' if settings.gradient_checkpointing else ''}"
        )
        lines.append(
            f"| {model.model_type} | {what} | {peak / 1e6:.1f} | {real / 1e6:.1f} | {errors[-1]:+.2%} |"
        )
    median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
    head = ["# Tracer against real steps on a processor", "", f"Median {median:.2%}, worst {worst:+.2%}.", ""]
    text = "\n".join([*head, *lines]) + "\n"
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
