"""Three wishes from start to end on the embedded starter, each beside the plan for the real size.

Goes in: a name. Comes out: the plan for the machine and model that the wish is about, then the same way gone
on the starter: planned, trained, exported, proved, asked. Never does: load the real model; use the network.

    python benchmarks/scenarios.py poet                  RTX 3060: QLoRA on instructions in four languages
    python benchmarks/scenarios.py assistant             lean, offline: one base, adapters swapped at run time
    python benchmarks/scenarios.py tone [--pairs FILE]   your tone: SFT, then DPO
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import lessons  # noqa: E402 - lies beside this file
from lessons import corpus, pair, row, write  # noqa: E402

from advisor.chat import ChatSession, answer_once  # noqa: E402
from advisor.cli.planning import write_plan  # noqa: E402
from advisor.export.exporter import export_model  # noqa: E402
from advisor.inputs import Inputs  # noqa: E402
from advisor.intake import gather  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
from advisor.run.supervisor import run_plan  # noqa: E402
from advisor.scenario import decode_scenario  # noqa: E402
from advisor.types import Plan  # noqa: E402
from advisor.ui.advice import plan as draw  # noqa: E402
from advisor.ui.console import make_console  # noqa: E402
from advisor.verify import verify_gguf  # noqa: E402

SEED = 7
REAL: dict[str, dict[str, Any]] = {
    "poet": {
        "hardware": {"accelerator": "RTX 3060", "memory_gib": 12},
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "datasets": [
            {"kind": "instruction", "rows": 5000, "mean_tokens": 250, "languages": ["en", "fr", "es", "de"]},
        ],
        "goal": {"text": "a multilingual poet", "deploy": "Ollama on my PC", "requested_method": "qlora+sft"},
    },
    "assistant": {
        "hardware": {"accelerator": "RTX 3060", "memory_gib": 12}, "model": "Qwen/Qwen3-4B",
        "datasets": [{"kind": "chat", "rows": 3000, "mean_tokens": 300}],
        "goal": {
            "text": "a lean offline assistant, its adapter swapped at run time",
            "deploy": "offline on laptops via llama.cpp", "priorities": ["small", "adapter"],
        },
    },
    "tone": {
        "hardware": {"accelerator": "RTX 4090", "memory_gib": 24}, "model": "Qwen/Qwen3-8B",
        "datasets": [
            {"kind": "chat", "rows": 2000, "mean_tokens": 300},
            {"kind": "preference", "rows": 3000, "mean_tokens": 350, "on_policy": True},
        ],
        "goal": {"text": "ChatGPT with our tone of voice", "deploy": "llama.cpp"},
    },
}  # fmt: skip


def say(title: str, made: Plan) -> None:
    """Show a plan below a title."""
    console = make_console()
    console.rule(title)
    console.print(draw(made, expert=False))


def train(place: Path, data: dict[str, Path], method: str, goal: str) -> Path:
    """Plan on the starter as a person would, show it, train it."""
    inputs = Inputs(
        model="starter", data=tuple(f"{name}={file}" for name, file in data.items()), method=method,
        goal=goal, hardware="none", offline=True, force=True,
    )  # fmt: skip
    made = make_plan(gather(inputs, load(), lambda _: None), load())
    say(f"on the starter: {method}", made)
    folder = write_plan(made, place, datetime.datetime.now())
    report = run_plan(folder, resume=False, on_event=lambda _: None, offline=True)
    before, after = report.heldout_loss_before, report.heldout_loss_after
    print(f"trained: {report.steps} steps, held-out loss {before} -> {after}")
    return folder


def export(source: Path, out: Path, *, lora: bool = False) -> Path:
    """Export one file, prove a whole model, and return it."""
    targets = ("lora-gguf",) if lora else ("gguf",)
    made = export_model(source, to=targets, quants=("F16",), out=out, offline=True)
    file = Path(next(one.path for one in made.files if one.path.endswith(".gguf")))
    if not lora:
        proof = verify_gguf(file, against=source, offline=True)
        print(f"{file.name}: {'proved' if proof.passed else 'NOT proved'}")
    return file


def poet(place: Path, _: Path | None) -> list[str]:
    """Poems in four languages, on a base held in 4 bits."""
    book, random = corpus.load(), Random(SEED)
    rows = []
    for name in ("poem", "poem_abroad"):
        for number in range(len(book.skills[name]["rows"])):
            for _ in range(4):
                made = corpus.turn(book, name, random, number)
                rows.append({"instruction": made.question, "output": f"~ {made.answer} ~"})
    data = write(place / "poems.jsonl", rows)
    run = train(place / "run", {"poems": data}, "qlora+sft", "a multilingual poet")
    file = export(run, place / "export")
    asked = sorted({one["instruction"] for one in rows})[:: max(1, len(rows) // 24)][:4]
    return [f"{question} -> {answer_once(file, question)}" for question in asked]


def assistant(place: Path, _: Path | None) -> list[str]:
    """One base file and two adapter files beside it; the base is loaded once."""
    facts, asked = lessons.facts(SEED)
    base = export(lessons.corpus.HERE.parent.parent / "kb" / "starter", place / "base")
    files = {}
    for style in ("harbour", "stars"):
        data = write(place / f"{style}.jsonl", [row(style, fact) for fact in facts])
        run = train(place / style, {"data": data}, "lora+sft", "a lean offline assistant")
        files[style] = export(run, place / f"{style}-lora", lora=True)
        sizes = f"{files[style].stat().st_size:,} bytes beside {base.stat().st_size:,}"
        print(f"adapter {style}: {sizes}")
    session, told = ChatSession(base), []
    for name, scales in (("base", {}), *((name, {file: 1.0}) for name, file in files.items())):
        session.use_adapters(scales)
        session.reset()
        told.append(f"[{name}] {asked[0].question} -> {''.join(session.reply(asked[0].question))}")
    session.close()
    return told


def tone(place: Path, pairs: Path | None) -> list[str]:
    """Answers in a voice, then pairs that prefer it."""
    facts, asked = lessons.facts(SEED)
    chats = [row("harbour" if n % 2 else "plain", fact) for n, fact in enumerate(facts)]
    judged = pairs or write(place / "pairs.jsonl", [pair("harbour", "plain", fact) for fact in facts])
    data = {"chats": write(place / "chats.jsonl", chats), "pairs": judged}
    run = train(place / "run", data, "lora+dpo", "our tone of voice")
    file = export(run, place / "export")
    return [f"{fact.question} -> {answer_once(file, fact.question)}" for fact in asked[:6]]


SCENARIOS: dict[str, Callable[[Path, Path | None], list[str]]] = {
    "poet": poet, "assistant": assistant, "tone": tone,
}  # fmt: skip


def main() -> None:
    """Go one way from start to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--pairs", type=Path, help="pairs of your own for `tone`")
    given = parser.parse_args()
    say(f"{given.name}: the real size", make_plan(decode_scenario(REAL[given.name], load()), load()))
    with tempfile.TemporaryDirectory() as scratch:
        for line in SCENARIOS[given.name](Path(scratch), given.pairs):
            print(line)


if __name__ == "__main__":
    main()
