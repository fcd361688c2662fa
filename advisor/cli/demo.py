"""`ftadvisor demo`: the whole way on the embedded model, and what it changed."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson
import tomli

from advisor.chat import ChatSession
from advisor.cli import options
from advisor.cli.export import describe, prove
from advisor.cli.output import notifier, print_json, print_next, print_text
from advisor.cli.planning import require_trainable, write_plan
from advisor.cli.run import train
from advisor.errors import VerificationError
from advisor.export import export_model
from advisor.intake import gather
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.resources import starter_dir
from advisor.ui import advice, measured, render

QUANTS = ("F16", "Q8_0", "Q4_K_M")
MOST_BEFORE, LEAST_AFTER = 0.10, 0.80
"""The demo succeeds when at most / at least this share of held-out answers is in the brand voice."""
SHOWN = 6
LONGEST_ANSWER_TOKENS = 96


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt with both answers."""

    prompt: str
    before: str
    after: str


class DemoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `demo --json`; shares are between 0 and 1, all measured."""

    schema: str = "ftadvisor.demo/1"
    ok: bool
    folder: str
    gguf: str
    method: str
    rule: str
    voice_before: float
    voice_after: float
    general_before: float
    general_after: float
    verified: bool
    seconds: dict[str, float]
    answers: tuple[Answered, ...]


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(now - self._since, 1)
        self._since = now


@click.command()
@options.out
@options.as_json
def demo(out: Path | None, *, as_json: bool) -> None:
    """Go the whole way on the embedded model: plan, train, export, verify, chat before and after."""
    say = notifier(quiet=as_json)
    clock = _Clock()
    starter = starter_dir()
    inputs = options.inputs_of(
        model="starter",
        data=(f"brand_voice={starter / 'brand_voice_train.jsonl'}",),
        goal="chat in our brand's tone of voice",
        must_not_forget=True,
        deploy="offline on laptops via llama.cpp",
        offline=True,
        out=out,
    )
    scenario = gather(inputs, load(), say)
    made = make_plan(scenario, load())
    if not as_json:
        print_text(
            render.hardware(scenario.hardware), *map(render.dataset, scenario.datasets), advice.plan(made)
        )
    require_trainable(made, scenario)
    folder = write_plan(made, out, datetime.now())
    clock.lap("plan")
    report = train(folder, resume=False, offline=True, quiet=as_json)
    clock.lap("train")
    exported = export_model(folder, quants=QUANTS, offline=True, on_progress=say)
    base = export_model(starter, quants=("F16",), out=folder / "base", offline=True, on_progress=say)
    clock.lap("export")
    proofs = prove(exported, folder, offline=True, quiet=as_json)
    exported, rows = describe(exported, folder, proofs)
    clock.lap("verify")
    tuned_file = next(file.path for file in exported.files if file.quant == QUANTS[-1])
    answer = _compare(
        folder, base.files[0].path, tuned_file, made.method, verified=all(p.passed for p in proofs)
    )
    clock.lap("chat")
    answer = msgspec.structs.replace(answer, seconds=clock.seconds)
    if as_json:
        print_json(answer)
    else:
        print_text(render.report(report))
        if report.evaluation is not None:
            print_text(measured.evaluation(report.evaluation))
        print_text(render.export(exported, proofs, rows))
        _show(answer)
    if not answer.ok:
        if as_json:
            raise click.exceptions.Exit(1)
        raise VerificationError(
            "The demo did not reach what it promises; see the figures above.", "ftadvisor doctor"
        )


def in_voice(answer: str, rule: dict[str, Any]) -> bool:
    """Return whether an answer is in the brand voice, by the stated rule of kb/starter/brand_voice.toml."""
    text = answer.strip()
    return bool(re.match(rule["opening"], text)) and bool(re.search(rule["closing"], text))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def _ask(gguf: str, prompts: list[str]) -> list[str]:
    """Answer prompts one by one, each as a conversation of its own, greedily."""
    session = ChatSession(Path(gguf), temperature=0.0, max_tokens=LONGEST_ANSWER_TOKENS)
    answers = []
    for prompt in prompts:
        session.reset()
        answers.append("".join(session.reply(prompt)).strip())
    return answers


def _compare(folder: Path, base: str, tuned: str, method: str, *, verified: bool) -> DemoAnswer:
    starter = starter_dir()
    rule = tomli.loads((starter / "brand_voice.toml").read_text(encoding="utf-8"))
    heldout = [
        message["content"]
        for row in _lines(starter / "brand_voice_heldout.jsonl")
        for message in row["messages"][:2]
        if message["role"] == "user"
    ]
    general = _lines(starter / "general_prompts.jsonl")
    asked = [row["prompt"] for row in general]
    before, after = _ask(base, heldout), _ask(tuned, heldout)
    voice = [sum(in_voice(text, rule) for text in answers) / len(answers) for answers in (before, after)]
    kept = [
        sum(
            any(word.lower() in text.lower() for word in row["expect"])
            for row, text in zip(general, texts, strict=True)
        )
        / len(general)
        for texts in (_ask(base, asked), _ask(tuned, asked))
    ]
    return DemoAnswer(
        ok=verified and voice[0] <= MOST_BEFORE and voice[1] >= LEAST_AFTER,
        folder=str(folder),
        gguf=tuned,
        method=method,
        rule=rule["rule"],
        voice_before=voice[0],
        voice_after=voice[1],
        general_before=kept[0],
        general_after=kept[1],
        verified=verified,
        seconds={},
        answers=tuple(
            Answered(prompt=prompt, before=old, after=new)
            for prompt, old, new in zip(heldout, before, after, strict=True)
        ),
    )


def _show(answer: DemoAnswer) -> None:
    rows = [(item.prompt, item.before, item.after) for item in answer.answers[:SHOWN]]
    print_text(
        render.side_by_side(rows),
        f"In the brand voice ({answer.rule})",
        f"  held-out prompts: {answer.voice_before:.0%} before, {answer.voice_after:.0%} after (measured)",
        f"  general prompts: {answer.general_before:.0%} right before, {answer.general_after:.0%} after",
        "Time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in answer.seconds.items()),
    )
    print_next(f"ftadvisor chat {answer.gguf}", f"open {answer.folder}/report.html in a browser")
