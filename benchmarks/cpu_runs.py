"""Are memory and time of training on a processor true? Plans, probes and trains ten small cases for real.

    python benchmarks/cpu_runs.py measure    # trains; keeps the figures in benchmarks/data/cpu_runs.json
    python benchmarks/cpu_runs.py            # plans again and compares with what is kept

Goes in: the starter and a random model of 34 million parameters, made-up data. Comes out:
benchmarks/results/cpu-runs-<date>.md. Never does: fit a constant.

All run on one core with one thread (the first that this process may use, so that two can run side by side).
CPU-seconds are compared: on a machine that does other work too they are what the wall clock would show on an
idle one, unless it is so busy that the questions before and after meet their limit of 60 seconds of the wall
clock. The plan's prediction is for that one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from advisor.probe.host import cpu_identity  # noqa: E402 - after the path is set
from advisor.run.events import read_events  # noqa: E402
from advisor.units import format_bytes, format_seconds  # noqa: E402
from tiny import make_tiny_model  # noqa: E402

KEPT = HERE / "data" / "cpu_runs.json"
WORDS = (
    "the", "a", "small", "blue", "river", "runs", "from", "hills", "and", "town", "where", "people", "sell",
    "bread", "apples", "tea", "we", "sing", "old", "songs", "about", "rain", "light", "work", "play", "night",
)  # fmt: skip
CASES: dict[str, tuple[str, str, str, int]] = {
    "starter-sft-lora": ("starter", "sft", "lora", 50),
    "starter-dpo-full": ("starter", "dpo", "full", 5),
    "34m-sft-lora": ("34m", "sft", "lora", 8),
    "34m-sft-full": ("34m", "sft", "full", 8),
    "starter-kto-lora": ("starter", "kto", "lora", 8),
    "34m-sft-qlora": ("34m", "sft", "qlora", 5),
    "starter-sft-full": ("starter", "sft", "full", 50),
    "34m-dpo-lora": ("34m", "dpo", "lora", 3),
    "starter-dpo-lora": ("starter", "dpo", "lora", 5),
    "34m-kto-full": ("34m", "kto", "full", 3),
}
"""Name -> model, data, method, optimizer steps."""
GOALS = {
    "sft": "answer in our tone", "dpo": "prefer the better answers", "kto": "prefer the better answers",
}  # fmt: skip


def main() -> None:
    """Measure where asked, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=["measure", "compare"], default="compare")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"cpu-runs-{today}.md")
    chosen = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="cpu-runs-"))
    try:
        _inputs(place)
        for name in chosen.only:
            folder = _plan(place, name)
            if chosen.what == "measure":
                found = _measure(folder)
                KEPT.write_text(json.dumps({**_kept(), name: found}, indent=1) + "\n")
            print(name, _kept().get(name), flush=True)
        kept = _kept()
        text = report({name: (_predicted(place / name), kept[name]) for name in chosen.only if name in kept})
    finally:
        shutil.rmtree(place)
    chosen.out.write_text(text, encoding="utf-8")
    print(text)


def _kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    return content


def _inputs(place: Path) -> None:
    """Write the random model and one file of made-up rows for each objective."""
    make_tiny_model(
        place / "34m", hidden=512, layers=8, vocab=16384, config={"max_position_embeddings": 1024}
    )
    dice = random.Random(1)

    def text(mean: int) -> str:
        count = max(4, int(dice.lognormvariate(0, 0.6) * mean))
        return " ".join(dice.choice(WORDS) for _ in range(count)).capitalize() + "."

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"instruction": text(20), "output": text(50)} for _ in range(700)],
        "dpo": [{"prompt": text(20), "chosen": text(40), "rejected": text(40)} for _ in range(300)],
        "kto": [{"prompt": text(20), "completion": text(40), "label": n % 2 == 0} for n in range(300)],
    }
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (place / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _command(*words: str) -> None:
    """Run ftadvisor on one core."""
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        ["taskset", "-c", core, sys.executable, "-m", "advisor", *words], capture_output=True, text=True,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "FTADVISOR_CALIBRATION": ""},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout}{done.stderr}")


def _plan(place: Path, name: str) -> Path:
    model, data, method, steps = CASES[name]
    _command(
        "plan", "--model", model if model == "starter" else str(place / model), "--data",
        str(place / f"{data}.jsonl"), "--goal", GOALS[data], "--method", method, "--force", "--offline",
        "--set", f"max_steps={steps}", "--out", str(place / name),
    )  # fmt: skip
    return place / name


def _predicted(folder: Path) -> dict[str, Any]:
    (stage,) = json.loads((folder / "plan.json").read_text())["stages"]
    estimate: dict[str, Any] = stage["estimate"]
    return estimate


def _measure(folder: Path) -> dict[str, Any]:
    _command("run", str(folder), "--probe", "--offline")
    events = {event["event"]: event for event in read_events(folder / "events.jsonl")}
    peaks = [e["memory_bytes"] for e in read_events(folder / "events.jsonl") if e.get("memory_bytes")]
    return {
        "objective": events["start"]["stage"],
        "steps": events["step"]["total"],
        "probed_peak_bytes": events["probe"]["measured_peak_bytes"],
        "probed_cpu_seconds": events["probe"]["cpu_seconds"],
        "peak_bytes": max(peaks),
        "cpu_seconds": events["done"]["cpu_seconds"],
    }


def report(rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "# Training on a processor: predicted and measured", "",
        f"{len(rows)} of {len(CASES)} cases. One core of {cpu_identity(Path('/proc'))[0]}, one thread; "
        "CPU-seconds, memory as the process's peak resident size.", "",
        "| case | time, predicted | measured | error | probe | error | memory, predicted | high | measured "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    before, after, memory, above = [], [], [], 0
    for name, (said, found) in rows.items():
        seconds, peak = said["seconds"], said["peak_bytes"]
        errors = (
            seconds["expected"] / found["cpu_seconds"] - 1,
            found["probed_cpu_seconds"] / found["cpu_seconds"] - 1,
            peak["expected"] / found["peak_bytes"] - 1,
        )
        for kept, error in zip((before, after, memory), errors, strict=True):
            kept.append(abs(error))
        above += found["peak_bytes"] > peak["high"]
        cells = (
            name, format_seconds(seconds["expected"]), format_seconds(found["cpu_seconds"]),
            f"{errors[0]:+.0%}", format_seconds(found["probed_cpu_seconds"]), f"{errors[1]:+.0%}",
            format_bytes(round(peak["expected"])), format_bytes(round(peak["high"])),
            format_bytes(found["peak_bytes"]), f"{errors[2]:+.1%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "", f"Median error of the time before the probe {statistics.median(before):.0%} (worst "
        f"{max(before):.0%}), after it {statistics.median(after):.0%} (worst {max(after):.0%}); of the "
        f"memory {statistics.median(memory):.1%} (worst {max(memory):.1%}), {above} above high.", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
