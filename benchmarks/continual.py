"""Does replay keep what an earlier run had learned, where naive tuning loses it, and is the new task learned?

Goes in: the embedded starter, its brand voice (task A), a task B that is answered otherwise. Comes out:
benchmarks/results/continual-<date>.md and the same on the screen. A is learned by one run; each row goes on
from it with `plan --continue` and other settings. Measured by what the model writes, greedily, on held-out
prompts: the share of A's answers in A's voice, of B's in B's form, and of B's that are right too; beside them
the share that the report says is kept, and its verdict. The starter cannot spell: of that task it learns the
form alone.
Never does: measure on rows that were trained on; choose between several seeds.

    python benchmarks/continual.py [--task stars] [--why] [--steps -1] [--prompts 40] [--tuners lora,full]
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import lessons  # noqa: E402 - lies beside this file

from advisor.cli.planning import write_plan  # noqa: E402
from advisor.inputs import Inputs  # noqa: E402
from advisor.intake import gather  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.resources import starter_dir  # noqa: E402
from advisor.types import RunReport  # noqa: E402
from training import events_of, report_here, run_here, write_rows  # noqa: E402 - tests/ holds the way to train in one process

SAVE_EVERY = 500
FACTS = 60
"""Of each skill in lessons.py, of which a quarter is held out."""
SPELLED = 40
SPELT = re.compile(r"^(\w-)+\w\.$")
VOICE = re.compile(r"^Ahoy( there)?!\s.*\sFair winds!$", re.DOTALL)
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no replay", {"replay_fraction": 0}),
    ("replay of 5 per cent", {"replay_fraction": 0.05}),
    ("replay of 25 per cent (the plan's)", {}),
)
PACKED = {"packing": True, "effective_batch": 1}
WHY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("packed", PACKED),
    ("packed, twice the rate", {**PACKED, "learning_rate": 3e-3}),
    ("packed, two passes", {**PACKED, "max_steps": -1, "epochs": 2}),
    ("not packed", {}),
)
"""Of orthogonal subspaces, whose planned rate on the starter is 1.5e-3."""


class Question(NamedTuple):
    """One held-out prompt of task B."""

    prompt: str
    follows: Callable[[str], bool]
    right: Callable[[str], bool]


def conversations(name: str) -> list[tuple[str, str]]:
    """Return questions and answers of a brand-voice file."""
    lines = (starter_dir() / name).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(one[-2]["content"], one[-1]["content"]) for one in turns]


def run(folder: Path, data: Path, *, steps: int, settings: dict[str, Any], **given: Any) -> RunReport:
    """Plan as the command line does, train in this process, and write the report."""
    fixed = {"max_steps": steps, "save_every_steps": SAVE_EVERY, "precision": "fp32"}
    inputs = Inputs(
        data=(f"{folder.name}={data}",), hardware="none", force=True, settings={**fixed, **settings}, **given
    )
    made = make_plan(gather(inputs, load(), lambda _: None), load())
    write_plan(made, folder, datetime.datetime.now(datetime.UTC))
    if run_here(folder) != 0:
        raise SystemExit(f"{folder} failed: {events_of(folder, 'error')}")
    return report_here(folder)


def answers(folder: Path, prompts: list[str]) -> list[str]:
    """Return what a result answers greedily."""
    result = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(result, padding_side="left")
    base = starter_dir() if result.name == "adapter" else result
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, str(result)) if result.name == "adapter" else model).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}], add_generation_prompt=True, tokenize=False
        )
        for one in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        made = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
            max_new_tokens=64, pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def share(found: Iterable[bool]) -> float:
    """Return how many of some answers are as wanted."""
    counted = list(found)
    return sum(counted) / len(counted)


class Shares(NamedTuple):
    """What a result writes on held-out prompts."""

    voice: float
    """Of A's answers in A's voice."""
    form: float
    """Of B's answers in B's form, right or not."""
    right: float

    def cells(self) -> str:
        """Return them as cells of a table."""
        return " | ".join(f"{one:.2f}" for one in self)


def shares(folder: Path, prompts: list[str], asked: list[Question]) -> Shares:
    """Ask a result both tasks' held-out prompts."""
    said = answers(folder, prompts)
    told = list(zip(answers(folder, [one.prompt for one in asked]), asked, strict=True))
    return Shares(
        voice=share(VOICE.match(text) is not None for text in said),
        form=share(one.follows(text) for text, one in told),
        right=share(one.follows(text) and one.right(text) for text, one in told),
    )


def lesson(style: str) -> tuple[list[dict[str, str]], list[Question]]:
    """Return facts in a style of lessons.py to train on, and others to ask for."""
    train, asked = lessons.facts(1, per_skill=FACTS)
    questions = [
        Question(
            prompt=lessons.row(style, fact)["instruction"],
            follows=lambda text, fact=fact: lessons.STYLES[style].follows(text, fact),
            right=lambda text, fact=fact: lessons.right(text, fact),
        )
        for fact in asked
    ]
    return [lessons.row(style, fact) for fact in train], questions


def spelling(rows: list[tuple[str, str]]) -> tuple[list[dict[str, str]], list[Question]]:
    """Return words to spell, those of the voice's rows: the first are asked for, the rest trained on."""
    plain = (re.sub(r"^Ahoy( there)?!\s|\sFair winds!$", "", said) for _, said in rows)
    words = list(dict.fromkeys(word.lower() for said in plain for word in re.findall(r"[A-Za-z]{4,9}", said)))
    made = [{"instruction": f"Spell the word {word}.", "output": f"{'-'.join(word)}."} for word in words]
    questions = [
        Question(
            prompt=row["instruction"],
            follows=lambda text: SPELT.match(text) is not None,
            right=lambda text, row=row: text == row["output"],
        )
        for row in made[:SPELLED]
    ]
    return made[SPELLED:], questions


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", default="stars", help="a style of lessons.py, or spell")
    parser.add_argument("--why", action="store_true", help="rows that tell packing, rate and steps apart")
    parser.add_argument("--steps", type=int, default=-1, help="of each run; -1: the plan's")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tuners", default="lora,full")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    now = datetime.datetime.now(datetime.UTC)
    out = given.out or HERE / "results" / f"continual-{now:%Y-%m-%d}.md"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begun = time.monotonic()
    held = conversations("brand_voice_heldout.jsonl")[: given.prompts]
    prompts_a = [ask for ask, _ in held]
    packages, (cpu, _) = installed_packages(), cpu_identity(Path("/proc"))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl"))
    lines = [
        "# Continual learning on the starter", "",
        f"{now:%Y-%m-%d}, {versions}; CPU {cpu}, one thread; task B {given.task!r}, "
        f"{len(held)} held-out prompts a task, one seed. `python benchmarks/continual.py`; what is measured "
        "stands at its top.", "",
        "| tuner | run | A in its voice | B in its form | B right | A kept | kept, says the report "
        "| verdict | success |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        place, rows = Path(scratch), conversations("brand_voice_train.jsonl")
        old = write_rows(place / "old.jsonl", [{"instruction": ask, "output": said} for ask, said in rows])
        train, asked = spelling(rows) if given.task == "spell" else lesson(given.task)
        new, asked = write_rows(place / "new.jsonl", train), asked[: given.prompts]
        for tuner in given.tuners.split(","):
            first = place / tuner / "a"
            run(first, old, steps=given.steps, settings={}, model="starter", method=tuner)
            start = shares(first, prompts_a, asked)
            lines.append(f"| {tuner} | A alone | {start.cells()} | | | | |")
            for number, (what, settings) in enumerate(WHY if given.why else ROWS):
                folder = place / tuner / f"b{number}"
                made = run(
                    folder, new, steps=given.steps, settings=settings, continue_from=str(first), method=tuner
                )
                found = shares(folder, prompts_a, asked)
                told = next(iter(made.kept.values()), float("nan"))
                verdict = made.evaluation.verdict.replace("_", " ") if made.evaluation else ""
                lines.append(
                    f"| {tuner} | then B, {what}, {made.steps} steps | {found.cells()} | "
                    f"{found.voice / max(start.voice, 1e-9):.0%} | {told:.0%} | {verdict} | "
                    f"{'yes' if made.ok else 'no'} |"
                )
                minutes = (time.monotonic() - begun) / 60
                out.write_text("\n".join([*lines, "", f"{minutes:.0f} minutes."]) + "\n", encoding="utf-8")
                print(lines[-1], file=sys.stderr, flush=True)
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
