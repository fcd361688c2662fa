"""From what are the processor's constants in kb/rules/time.toml? Times steps of small cases, and fits them.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/cpu_steps.py measure
    python benchmarks/cpu_steps.py          # fits what is kept in benchmarks/data/cpu_steps.json

Goes in: random models and made-up rows of one length. Comes out: constants of one core, by least squares of
the relative error, and the error of each case, in benchmarks/results/cpu-steps-<date>.md. Never does: look at
the cases of cpu_runs.py, which test them.

The steps are those of the shipped programs, by their own probe; CPU-seconds of one thread.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from advisor import knowledge  # noqa: E402 - after the path is set
from advisor.estimate import rates  # noqa: E402
from advisor.estimate.activations import PAIRED, in_tiles, saved_per_token  # noqa: E402
from advisor.estimate.activations import rows as sequences_of  # noqa: E402
from advisor.estimate.layers import layout  # noqa: E402
from advisor.estimate.tunable import LOW_RANK, count  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.types import Hardware, MemorySettings, ModelShape, ModelSpec  # noqa: E402
from tiny import make_tiny_model  # noqa: E402
from training import events_of, make_run, run_here, write_rows  # noqa: E402

KEPT = HERE / "data" / "cpu_steps.json"
ROWS, STEPS = 80, 3
WORDS = (
    "the", "a", "small", "blue", "river", "runs", "from", "hills", "and", "town", "where", "people", "sell",
    "bread", "apples", "tea",
)  # fmt: skip
KINDS = {"sft": "instruction", "kto": "unpaired_preference"}
FIELDS = ("tuner", "objective", "hidden", "layers", "vocab", "words", "micro_batch", "accumulated")
CASES: tuple[tuple[str, str, int, int, int, int, int, int], ...] = (
    ("lora", "sft", 128, 4, 4096, 40, 8, 2), ("lora", "sft", 256, 8, 8192, 40, 4, 2),
    ("lora", "sft", 768, 8, 16384, 40, 4, 2), ("lora", "sft", 384, 12, 8192, 200, 2, 1),
    ("lora", "sft", 256, 4, 4096, 40, 1, 2), ("lora", "sft", 1024, 4, 32000, 60, 4, 1),
    ("full", "sft", 128, 4, 4096, 40, 8, 2), ("full", "sft", 256, 8, 8192, 40, 4, 2),
    ("full", "sft", 768, 8, 16384, 40, 4, 2), ("full", "sft", 384, 12, 8192, 200, 2, 1),
    ("full", "sft", 256, 4, 4096, 40, 1, 2), ("full", "sft", 1024, 4, 32000, 60, 4, 1),
    ("qlora", "sft", 256, 8, 8192, 40, 4, 2), ("qlora", "sft", 768, 8, 16384, 40, 4, 2),
    ("lora", "dpo", 256, 8, 8192, 40, 4, 2), ("full", "dpo", 384, 6, 8192, 60, 4, 2),
    ("lora", "kto", 256, 8, 8192, 40, 4, 2), ("full", "kto", 384, 6, 8192, 60, 4, 2),
    ("lora", "kto", 768, 6, 16384, 40, 4, 2), ("lora", "orpo", 256, 8, 8192, 40, 4, 2),
    ("full", "reward", 256, 8, 8192, 40, 4, 2), ("ia3", "sft", 256, 8, 8192, 40, 4, 2),
    ("bitfit", "sft", 256, 8, 8192, 40, 4, 2),
)  # fmt: skip
CONSTANTS = (
    "seconds of an operation", "kept_byte_seconds, low_rank", "kept_byte_seconds, other",
    "block_seconds, low_rank", "block_seconds, other", "logit_seconds", "plain_logit_seconds",
)  # fmt: skip


def main() -> None:
    """Measure where asked, then fit."""
    if "measure" in sys.argv:
        measure()
    text = report(json.loads(KEPT.read_text()))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    (HERE / "results" / f"cpu-steps-{today}.md").write_text(text, encoding="utf-8")
    print(text)


def measure() -> None:
    """Train a few steps of each case in this process."""
    os.environ["FTADVISOR_PROBE"] = json.dumps({"steps": STEPS, "seconds": 60})
    place, dice, kept = Path(tempfile.mkdtemp(prefix="cpu-steps-")), random.Random(3), []
    for number, case in enumerate(CASES):
        tuner, objective, hidden, layers, vocab, words, micro_batch, accumulated = case
        config = {"max_position_embeddings": 2048, "intermediate_size": 4 * hidden}
        model = make_tiny_model(
            place / f"model-{number}", hidden=hidden, layers=layers, vocab=vocab, config=config
        )
        data = write_rows(place / f"{number}.jsonl", [_row(objective, words, n, dice) for n in range(ROWS)])
        folder = make_run(
            place / f"run-{number}", tuner=tuner, model=model, data=data,
            kind=KINDS.get(objective, "preference"), objective=objective, weight_bits=_bits(tuner),
            micro_batch=micro_batch, effective_batch=micro_batch * accumulated, max_seq_len=1024,
            precision="bf16", max_steps=20, loss="chunked" if objective in ("dpo", "kto") else "full_logits",
        )  # fmt: skip
        if run_here(folder):
            raise SystemExit(str(events_of(folder, "error")))
        (probe,), (told,) = events_of(folder, "probe"), events_of(folder, "data")
        micro = probe["cpu_seconds_per_step"] / accumulated
        kept.append({
            **dict(zip(FIELDS, case, strict=True)), "tokens": told["tokens"] / told["rows"],
            "cpu_seconds": round(micro, 4),
        })  # fmt: skip
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def _row(objective: str, words: int, number: int, dice: random.Random) -> dict[str, Any]:
    def text(count: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(count))

    question, answer = text(words // 3), text(words - words // 3)
    if objective == "sft":
        return {"instruction": question, "output": answer}
    if objective == "kto":
        return {"prompt": question, "completion": answer, "label": number % 2 == 0}
    return {"prompt": question, "chosen": answer, "rejected": text(words - words // 3)}


def _bits(tuner: str) -> Any:
    return {"full": 32, "qlora": 4}.get(tuner, 16)


def _features(case: dict[str, Any], rules: dict[str, Any]) -> list[float]:
    """What each constant is multiplied by in a micro batch; last, the seconds of the optimizer."""
    hidden, objective = case["hidden"], case["objective"]
    shape = ModelShape(
        layers=case["layers"], hidden=hidden, intermediate=4 * hidden, heads=hidden // 64,
        kv_heads=max(1, hidden // 128), head_dim=64, vocab=case["vocab"], tied=True,
    )  # fmt: skip
    spec = ModelSpec(
        id="", architecture="", model_type="llama", shape=shape, parameters=0, context_tokens=0, source=""
    )
    length = case["tokens"] / (2 if objective in PAIRED else 1)
    multiple = rules["cpu"]["pad_multiple"]
    length = -(-length // multiple) * multiple
    settings = MemorySettings(
        tuner=case["tuner"].replace("qlora", "lora"), objective=objective, weight_bits=_bits(case["tuner"]),
        micro_batch=case["micro_batch"], seq_len=int(length), gradient_checkpointing=False, lora_r=8,
        device="cpu", loss="chunked" if objective in ("dpo", "kto") else "full_logits",
    )  # fmt: skip
    plan, tokens = layout(spec), sequences_of(settings) * length
    kept, low = saved_per_token(spec, plan, settings) * plan.blocks * tokens, settings.tuner in LOW_RANK
    logits = 0 if objective == "reward" else tokens * shape.vocab
    every = in_tiles(settings) or objective in PAIRED
    found = [
        rates.flops(spec, plan, settings, rules, tokens=tokens, length=length), kept * low, kept * (not low),
        plan.blocks * low, plan.blocks * (not low), logits * every, logits * (not every),
    ]  # fmt: skip
    scored = 1 + rules["run"]["step_passes"].get(objective, 0) * rules["run"]["forward_share"]
    device = rates.rate(plan, settings, None, Hardware(ram_bytes=0, ram_free_bytes=0, cpu_cores=1), rules)
    optimizer = rates.optimizer_seconds(settings, device, rules, count(spec, plan, settings))
    return [*(value * scored for value in found), optimizer / case["accumulated"]]


def report(cases: list[dict[str, Any]]) -> str:
    """Return the constants and the error of each case."""
    rules = dict(knowledge.load().rules["time"])
    found = np.array([_features(case, rules) for case in cases])
    features, optimizer = found[:, :-1], found[:, -1]
    measured = np.array([case["cpu_seconds"] for case in cases])
    relative = features / measured[:, None]
    scale = relative.max(axis=0)
    constants = np.linalg.lstsq(relative / scale, 1 - optimizer / measured, rcond=None)[0] / scale
    errors = (features @ constants + optimizer) / measured - 1
    lines = [
        "# Steps on a processor: constants of one core", "",
        f"{len(cases)} cases on one core of {cpu_identity(Path('/proc'))[0]}, CPU-seconds of a micro batch, "
        "the optimizer's share included.", "", "| constant | value |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {value:.2g} |" for name, value in zip(CONSTANTS, constants, strict=True)]
    lines += ["", f"| {' | '.join((*FIELDS, 'tokens a row', 'seconds', 'error'))} |"]
    lines.append("|---" * (len(FIELDS) + 3) + "|")
    for case, error in zip(cases, errors, strict=True):
        cells = [*(case[name] for name in FIELDS), f"{case['tokens']:.0f}", f"{case['cpu_seconds']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {error:+.0%} |")
    lines += ["", f"Median error {statistics.median(abs(errors)):.0%}, worst {max(abs(errors)):.0%}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
