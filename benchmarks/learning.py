"""Does training teach what it should? Each method on a lesson whose rule is known, with a plan's settings.

Goes in: the embedded starter and lessons.py. Comes out: benchmarks/results/learning-<date>.md and the same on
the screen: what was measured before and after on facts that were not trained on, and the bound that decides.
Never does: choose a setting that the plan does not choose, unless the row says so; hide a row that failed.

    python benchmarks/learning.py [--only dpo,kto] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import lessons  # noqa: E402 - lies beside this file
from lessons import Fact, answer, pair, right, row, write  # noqa: E402

from advisor.adapters import AdapterChat, find_voices  # noqa: E402
from advisor.cli.planning import write_plan  # noqa: E402
from advisor.inputs import Inputs  # noqa: E402
from advisor.intake import gather  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.resources import starter_dir  # noqa: E402
from advisor.run.supervisor import run_plan  # noqa: E402
from advisor.storage import read_record  # noqa: E402
from advisor.train import bottleneck  # noqa: E402
from advisor.types import Plan  # noqa: E402
from training import events_of  # noqa: E402

SEED, ASKED, TOKENS = 7, 80, 48
Answers = dict[str, list[str]]


class Row(NamedTuple):
    """One figure with the bound that decides."""

    check: str
    figure: str
    before: float | None
    after: float
    bound: str
    passed: bool


def least(check: str, figure: str, after: float, bound: float, before: float | None = None) -> Row:
    """Return a row that passes from a bound on."""
    return Row(check, figure, before, after, f">= {bound:.3g}", after >= bound)


def most(check: str, figure: str, after: float, bound: float, before: float | None = None) -> Row:
    """Return a row that passes up to a bound."""
    return Row(check, figure, before, after, f"<= {bound:.3g}", after <= bound)


class Lesson:
    """A place to work in, and facts to train on and to ask about."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.train, asked = lessons.facts(SEED)
        self.asked = asked[:ASKED]

    def plan_and_run(
        self, name: str, data: dict[str, list[dict[str, Any]]], method: str, **settings: Any
    ) -> Path:
        """Plan as a person would, train through the supervisor, and return the run folder."""
        files = {task: write(self.place / f"{name}-{task}.jsonl", rows) for task, rows in data.items()}
        inputs = Inputs(
            model="starter", data=tuple(f"{task}={file}" for task, file in files.items()), method=method,
            goal="answer as the examples do", hardware="none", settings=settings, offline=True, force=True,
        )  # fmt: skip
        made = make_plan(gather(inputs, load(), lambda _: None), load())
        folder = write_plan(made, self.place / name, datetime.datetime.now())
        run_plan(folder, resume=False, on_event=lambda _: None, offline=True)
        return folder

    def follows(self, style: str, texts: list[str]) -> float:
        """Return which share of answers keeps a style."""
        keeps = lessons.STYLES[style].follows
        return sum(keeps(text, fact) for text, fact in zip(texts, self.asked, strict=True)) / len(texts)

    def right(self, texts: list[str]) -> float:
        """Return which share of answers holds what was asked for."""
        return sum(right(text, fact) for text, fact in zip(texts, self.asked, strict=True)) / len(texts)

    def questions(self, style: str = "plain") -> list[str]:
        """Return the held-out questions in the words of a style."""
        return [row(style, fact)["instruction"] for fact in self.asked]


def speak(folders: dict[str, Path | None], questions: list[str], *, sample: bool = False) -> Answers:
    """Return what each trained model answers; None is the starter itself."""
    return {
        name: _answers(folder or starter_dir(), questions, sample=sample) for name, folder in folders.items()
    }


def _answers(folder: Path, questions: list[str], *, sample: bool) -> list[str]:
    (voice,) = find_voices([folder], offline=True, on_progress=lambda _: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(voice.tokenizer)
    tokenizer.padding_side = "left"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(voice.base, dtype=torch.float32)
    if voice.kind == bottleneck.KIND:
        bottleneck.load(model, Path(str(voice.adapter)))
    elif voice.adapter is not None:
        model = PeftModel.from_pretrained(model, voice.adapter)
    model.eval()
    turns = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    found: list[str] = []
    torch.manual_seed(SEED)
    with torch.no_grad():
        # Virtual tokens and padding before a row do not go together, so these are asked one by one.
        size = 1 if voice.kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE") else 40
        for start in range(0, len(texts), size):
            batch = tokenizer(
                texts[start : start + size], return_tensors="pt", padding=True, add_special_tokens=False
            )
            made = model.generate(
                **{name: batch[name] for name in ("input_ids", "attention_mask")}, do_sample=sample,
                max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id, use_cache=size > 1,
                eos_token_id=tokenizer.eos_token_id, **({"top_k": 0} if sample else {}),
            )  # fmt: skip
            found += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def heldout(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Return what training measured on rows that it did not train on, by time."""
    return {event["when"]: event for event in events_of(folder, "heldout") if event["stage"] == stage}


# --- the checks ----------------------------------------------------------------------------------


def instruction(lesson: Lesson) -> list[Row]:
    """Four instructions that the starter does not know, in one dataset."""
    styles = ("word", "twice", "stars", "quote")
    rows = [row(style, fact) for fact in lesson.train for style in styles]
    run = lesson.plan_and_run("instruction", {"data": rows}, "lora+sft")
    found = []
    for style in styles:
        told = speak({"before": None, "after": run}, lesson.questions(style))
        shares = {when: lesson.follows(style, texts) for when, texts in told.items()}
        found.append(least("instructions", f"follows '{style}'", shares["after"], 0.8, shares["before"]))
        if style != "word":
            found.append(_still_right("instructions", f"right under '{style}'", lesson, told))
    return found


def _still_right(check: str, figure: str, lesson: Lesson, told: Answers) -> Row:
    before, after = (lesson.right(told[when]) for when in ("before", "after"))
    return least(check, figure, after, before - 0.1, before)


def dpo(lesson: Lesson) -> list[Row]:
    """Pairs that prefer one manner; the start knows both."""
    return _preference(lesson, "dpo", {"pairs": [pair("harbour", "plain", fact) for fact in lesson.train]})


def kto(lesson: Lesson) -> list[Row]:
    """The same answers one by one, with thumbs; no question has both."""
    marked = [
        {"prompt": fact.question, "completion": answer(style, fact), "label": style == "harbour"}
        for style, fact in both_manners(lesson)
    ]
    return _preference(lesson, "kto", {"thumbs": marked})


def both_manners(lesson: Lesson) -> list[tuple[str, Fact]]:
    """Return every fact with one of the two manners, by turns."""
    return [("harbour" if n % 2 else "plain", fact) for n, fact in enumerate(lesson.train)]


def _preference(lesson: Lesson, objective: str, data: dict[str, list[dict[str, Any]]]) -> list[Row]:
    chats = [row(style, fact) for style, fact in both_manners(lesson)]
    run = lesson.plan_and_run(objective, {"chats": chats, **data}, f"lora+{objective}")
    figures = heldout(run, f"2-{objective}")
    before, after = figures["before"], figures["after"]
    found = [least(objective, "held-out margin", after["margin"], 0.1, before["margin"])]
    if "preferred" in after:
        name = "held-out pairs whose better answer is likelier"
        found.append(least(objective, name, after["preferred"], 0.8, before["preferred"]))
    told = speak({"before": run / "stages" / "1-sft", "after": run}, lesson.questions(), sample=True)
    shares = {when: lesson.follows("harbour", texts) for when, texts in told.items()}
    name = "preferred manner in sampled answers"
    found.append(least(objective, name, shares["after"], shares["before"] + 0.1, shares["before"]))
    return [*found, _still_right(objective, "right", lesson, told)]


def rlhf(lesson: Lesson) -> list[Row]:
    """SFT on both manners, a reward model from pairs, RLOO against its marks; the rule behind the pairs is
    known, and is never shown to the third stage."""
    half = len(lesson.train) // 2
    data: dict[str, list[dict[str, Any]]] = {
        "chats": [row(style, fact) for style, fact in both_manners(lesson)],
        "pairs": [pair("harbour", "plain", fact) for fact in lesson.train[:half]],
        "prompts": [{"prompt": fact.question} for fact in lesson.train[half:]],
    }
    run = lesson.plan_and_run("rlhf", data, "lora+rloo", **{"rloo.max_completion_length": TOKENS})
    told = speak({"before": run / "stages" / "1-sft", "after": run}, lesson.questions(), sample=True)
    rules = {when: lesson.follows("harbour", texts) for when, texts in told.items()}
    kinds = {when: len(set(texts)) / len(texts) for when, texts in told.items()}
    drift = max(float(event.get("kl") or 0) for event in events_of(run, "step") if event["stage"] == "3-rloo")
    accuracy = heldout(run, "2-reward")["after"]["accuracy"]
    keeps = "RLOO: answers that keep the true rule"
    return [
        least("rlhf", "reward model: held-out pairs ranked right", accuracy, 0.8),
        least("rlhf", keeps, rules["after"], rules["before"] + 0.15, rules["before"]),
        _still_right("rlhf", "RLOO: right", lesson, told),
        least("rlhf", "RLOO: different answers", kinds["after"], kinds["before"] - 0.1, kinds["before"]),
        most("rlhf", "RLOO: highest KL of a step", drift, 10.0, 0.0),
    ]


def multi_task(lesson: Lesson) -> list[Row]:
    """Three tasks of very unequal size in one adapter, against an adapter each."""
    sizes = {"stars": 300, "twice": 100, "word": 40}
    tasks = {style: [row(style, fact) for fact in lesson.train[:size]] for style, size in sizes.items()}
    mixed = lesson.plan_and_run("multi_task", tasks, "lora")
    alone, together, found = {}, {}, []
    for style, rows in tasks.items():
        own = lesson.plan_and_run(f"only_{style}", {style: rows}, "lora")
        told = speak({"alone": own, "together": mixed}, lesson.questions(style))
        alone[style], together[style] = (lesson.follows(style, told[who]) for who in ("alone", "together"))
        name = f"'{style}' ({sizes[style]} rows): an adapter of its own, then one for all"
        found.append(least("multi-task", name, together[style], 0.0, alone[style]))
    worst, mean = min(alone.values()), sum(alone.values()) / len(alone)
    shared = sum(together.values()) / len(together)
    found.append(least("multi-task", "mean of the tasks", shared, mean + 0.05, mean))
    name = "the worst of the tasks"
    return [*found, least("multi-task", name, min(together.values()), worst + 0.05, worst)]


def adapters(lesson: Lesson) -> list[Row]:
    """Two bottleneck adapters on one base in memory, each in its own domain."""
    for style in ("harbour", "stars"):
        lesson.plan_and_run(style, {"data": [row(style, fact) for fact in lesson.train]}, "adapter")
    places = [lesson.place / style for style in ("harbour", "stars")]
    session = AdapterChat(find_voices(places, offline=True, on_progress=lambda _: None), max_tokens=TOKENS)
    found, asked = [], lesson.asked[:40]
    for chosen, other in (("harbour", "stars"), ("stars", "harbour"), ("base", "harbour")):
        session.choose(chosen)
        shares = {}
        for style in {chosen, other} - {"base"}:
            keeps = lessons.STYLES[style].follows
            texts = [_alone(session, row(style, fact)["instruction"]) for fact in asked]
            shares[style] = sum(map(keeps, texts, asked)) / len(asked)
        if chosen != "base":
            found.append(least("two adapters", f"'{chosen}' on: its own domain", shares[chosen], 0.8))
        found.append(most("two adapters", f"'{chosen}' on: the manner of '{other}'", shares[other], 0.1))
    return [*found, most("two adapters", "copies of the base in memory", session.loaded_bases, 1)]


def _alone(session: AdapterChat, question: str) -> str:
    session.reset()
    return "".join(session.reply(question)).strip()


def prompt_tuning(lesson: Lesson) -> list[Row]:
    """At the plan's rate, and at LoRA's for large models, which fails silently."""
    data = {"data": [row("harbour", fact) for fact in lesson.train]}
    good = lesson.plan_and_run("prompt_tuning", data, "prompt_tuning")
    low = lesson.plan_and_run("prompt_tuning_low", data, "prompt_tuning", learning_rate=1e-4)
    told = speak({"before": None, "good": good, "low": low}, lesson.questions())
    shares = {name: lesson.follows("harbour", texts) for name, texts in told.items()}
    warnings = read_record(low / "plan.json", Plan).warnings
    warned = any(one.code == "override_out_of_range" and "learning_rate" in one.message for one in warnings)
    check, manner = "prompt tuning", "keeps the manner"
    return [
        least(check, f"{manner}, at the plan's rate", shares["good"], 0.5, shares["before"]),
        most(check, f"{manner}, at 1e-4", shares["low"], 0.1, shares["before"]),
        least(check, "the plan warns at 1e-4", float(warned), 1),
    ]


CHECKS: dict[str, Callable[[Lesson], list[Row]]] = {
    "instruction": instruction, "dpo": dpo, "kto": kto, "rlhf": rlhf, "multi-task": multi_task,
    "adapters": adapters, "prompt-tuning": prompt_tuning,
}  # fmt: skip


def table_of(found: list[Row], seconds: float) -> str:
    """Return the rows as Markdown below what they were measured with."""
    packages, (cpu, _) = installed_packages(), cpu_identity(Path("/proc"))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl"))
    lines = [
        "# What training teaches the starter",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {versions}; CPU {cpu}; settings of the plan, "
        f"{ASKED} facts that were not trained on; {seconds:.0f} s. `python benchmarks/learning.py`",
        "",
        "| check | figure | before | after | bound | |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        before = "" if one.before is None else f"{one.before:.3f}"
        lines.append(
            f"| {one.check} | {one.figure} | {before} | {one.after:.3f} | {one.bound} | "
            f"{'yes' if one.passed else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table; exit 1 where a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="names of checks with commas between")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    only = set(filter(None, given.only.split(","))) or set(CHECKS)
    out = given.out or HERE / "results" / f"learning-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.md"
    found: list[Row] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for name, check in CHECKS.items():
            if name in only:
                place = Path(scratch) / name
                place.mkdir()
                found += check(Lesson(place))
                out.write_text(table_of(found, time.monotonic() - begun), encoding="utf-8")
                print(f"{name}: {sum(not one.passed for one in found)} missed so far", flush=True)
    print(out.read_text(encoding="utf-8"))
    if not all(one.passed for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
