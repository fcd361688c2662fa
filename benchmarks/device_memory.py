"""Is the memory estimate true on a card? Trains two steps of random weights and compares with the allocator.

    python benchmarks/device_memory.py [--models 0.5b,1.5b,8b] [--lengths 512,2048,8192]

Goes in: an NVIDIA card. Comes out: benchmarks/results/device-memory-<date>.md with allocated, reserved and
lost memory beside the estimate; what ran out of memory stays in the table. Never does: load real weights;
fit.

Each setting runs in a process of its own, so that nothing of the last one is left.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import msgspec  # noqa: E402 - after the path is set

from advisor import knowledge  # noqa: E402
from advisor.estimate.memory import estimate_memory  # noqa: E402
from advisor.types import MemorySettings, ModelShape, ModelSpec  # noqa: E402
from advisor.units import GIB  # noqa: E402

MODELS = {"0.5b": "Qwen/Qwen2.5-0.5B", "1.5b": "Qwen/Qwen2.5-1.5B", "8b": "meta-llama/Llama-3.1-8B"}
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner": "full", "weight_bits": 16}, "lora": {"tuner": "lora"},
    "qlora": {"tuner": "qlora", "weight_bits": 4},
}  # fmt: skip


def main() -> None:
    """Measure every setting, or one of them in a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--one", help="JSON of one setting, for the child process")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"device-memory-{today}.md")
    chosen = parser.parse_args()
    if chosen.one:
        _child(json.loads(chosen.one))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("This needs an NVIDIA GPU, and there is none here.")
    lengths = [int(text) for text in chosen.lengths.split(",")]
    rows = [
        _row(model, tuner, length, checkpointing=kept)
        for model, tuner, length, kept in itertools.product(
            chosen.models.split(","), TUNERS, lengths, (True, False)
        )
    ]
    text = report(rows, torch.cuda.get_device_name(), torch.__version__)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def spec_of(name: str) -> ModelSpec:
    """Return a model of kb/models by its size."""
    facts = knowledge.load().models[MODELS[name]]
    shape = {key: getattr(facts, key) for key in ModelShape.__struct_fields__}
    return ModelSpec(
        id=MODELS[name], architecture=facts.architecture, model_type=facts.model_type,
        parameters=facts.parameters, shape=ModelShape(**shape), context_tokens=facts.context_tokens,
        source=facts.source,
    )  # fmt: skip


def _settings(tuner: str, length: int, *, checkpointing: bool) -> MemorySettings:
    return MemorySettings(seq_len=length, gradient_checkpointing=checkpointing, **TUNERS[tuner])


def _child(given: dict[str, Any]) -> None:
    from real_step import measure

    settings = _settings(given["tuner"], given["length"], checkpointing=given["checkpointing"])
    sys.stdout.buffer.write(msgspec.json.encode(measure(spec_of(given["model"]), settings, "cuda")) + b"\n")


def _row(model: str, tuner: str, length: int, *, checkpointing: bool) -> dict[str, Any]:
    given = {"model": model, "tuner": tuner, "length": length, "checkpointing": checkpointing}
    answer = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(given)], capture_output=True, text=True, check=False
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    out_of_memory = "out of memory" in answer.stderr.lower()
    if not lines and not out_of_memory:
        raise SystemExit(f"{given}\n{answer.stderr[-2000:]}")
    print(given, lines or "out of memory", flush=True)
    return {**given, "found": json.loads(lines[-1]) if lines else None}


def report(rows: list[dict[str, Any]], device: str, version: str) -> str:
    """Return the table in Markdown."""
    lines = [
        "# Memory on a card: estimated and measured", "",
        f"{device}, torch {version}; GiB; one row a batch.", "",
        "| setting | allocated, estimated | measured | error | reserved, estimated | measured | error | high "
        "| lost by the device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        settings = _settings(row["tuner"], row["length"], checkpointing=row["checkpointing"])
        said = estimate_memory(spec_of(row["model"]), settings, knowledge.load().rules["memory"])
        what = f"{row['model']} {row['tuner']} {row['length']}{' recomputed' if row['checkpointing'] else ''}"
        allocated, reserved = said.allocated_bytes.expected, said.reserved_bytes.expected
        high = f"{said.peak_bytes.high / GIB:.2f}"
        if row["found"] is None:
            cells = (f"{allocated / GIB:.2f}", "out of memory", "", f"{reserved / GIB:.2f}", "", "", high, "")
        else:
            found = row["found"]
            cells = (
                f"{allocated / GIB:.2f}", f"{found['peak'] / GIB:.2f}",
                f"{allocated / found['peak'] - 1:+.1%}",
                f"{reserved / GIB:.2f}", f"{found['reserved'] / GIB:.2f}",
                f"{reserved / found['reserved'] - 1:+.1%}", high, f"{found['lost'] / GIB:.2f}",
            )  # fmt: skip
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
