"""Does replay keep what an earlier run had learned, where naive tuning loses it?

Goes in: the embedded starter, its brand voice (task A), words to spell (task B). Comes out:
benchmarks/results/continual-<date>.md and the same on the screen. A is learned by one run; each row goes on
from it with `plan --continue` and other settings. Measured by what the model writes, greedily, on held-out
prompts: the share of A's answers in A's voice and of B's in B's form; beside them the share that the report
says is kept, and whether the gate calls the run a success.
Never does: measure on rows that were trained on; choose between several seeds.

    python benchmarks/continual.py [--steps 60] [--prompts 40] [--tuners lora,full] [--out FILE]
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
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from advisor.cli.planning import write_plan  # noqa: E402
from advisor.inputs import Inputs  # noqa: E402
from advisor.intake import gather  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.resources import starter_dir  # noqa: E402
from advisor.run.events import read_events  # noqa: E402
from advisor.run.report import build_report  # noqa: E402
from advisor.run.thresholds import thresholds_of  # noqa: E402
from advisor.storage import read_record, write_json  # noqa: E402
from advisor.types import Recipe, RunReport  # noqa: E402
from training import run_here, write_rows  # noqa: E402 - tests/ holds the way to train in one process

VOICE = re.compile(r"^Ahoy( there)?!\s.*\sFair winds!$", re.DOTALL)
SPELT = re.compile(r"^(\w-)+\w\.$")
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no replay", {"replay_fraction": 0}),
    ("replay of 5 per cent", {"replay_fraction": 0.05}),
    ("replay of 25 per cent (the plan's)", {}),
)


def conversations(name: str) -> list[tuple[str, str]]:
    """Return questions and answers of a brand-voice file."""
    lines = (starter_dir() / name).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(one[-2]["content"], one[-1]["content"]) for one in turns]


def plain(answer: str) -> str:
    """Return an answer without the voice."""
    return re.sub(r"^Ahoy( there)?!\s|\sFair winds!$", "", answer)


def task_b(rows: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return words to spell, those of the voice's rows: each once."""
    words = dict.fromkeys(
        word.lower() for _, said in rows for word in re.findall(r"[A-Za-z]{4,9}", plain(said))
    )
    return [{"instruction": f"Spell the word {word}.", "output": f"{'-'.join(word)}."} for word in words]


def run(folder: Path, data: Path, *, steps: int, settings: dict[str, Any], **given: Any) -> RunReport:
    """Plan as the command line does, train in this process, and write the report."""
    fixed = {"max_steps": steps, "save_every_steps": steps, "precision": "fp32"}
    inputs = Inputs(
        data=(f"{folder.name}={data}",), hardware="none", force=True, settings={**fixed, **settings}, **given
    )
    made = make_plan(gather(inputs, load(), lambda _: None), load())
    write_plan(made, folder, datetime.datetime.now(datetime.UTC))
    if run_here(folder) != 0:
        raise SystemExit(f"{folder} failed: {list(read_events(folder / 'events.jsonl'))[-1]}")
    report = build_report(
        read_events(folder / "events.jsonl"), read_record(folder / "recipe.yaml", Recipe), recipe_sha256="",
        status="done", estimate=None, artefacts={}, packages={}, error=None,
        limits=thresholds_of(load().rules["policy"]).forgetting,
    )  # fmt: skip
    write_json(folder / "report.json", report)
    return report


def share(folder: Path, prompts: list[str], wanted: re.Pattern[str]) -> float:
    """Return the share of greedy answers of a result that have the wanted form."""
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
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    return sum(bool(wanted.match(answer.strip())) for answer in answers) / len(answers)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
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
        f"{now:%Y-%m-%d}, {versions}; CPU {cpu}, one thread; {given.steps} steps a run, {len(held)} held-out "
        "prompts a task, one seed. `python benchmarks/continual.py`; what is measured stands at its top.", "",
        "| tuner | run | A | B | A kept | kept, says the report | success |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        place, rows = Path(scratch), conversations("brand_voice_train.jsonl")
        old = write_rows(place / "old.jsonl", [{"instruction": ask, "output": said} for ask, said in rows])
        spelling = task_b(rows)
        new = write_rows(place / "new.jsonl", spelling[given.prompts :])
        prompts_b = [row["instruction"] for row in spelling[: given.prompts]]
        for tuner in given.tuners.split(","):
            first = place / tuner / "a"
            run(first, old, steps=given.steps, settings={}, model="starter", method=tuner)
            start = share(first, prompts_a, VOICE)
            lines.append(f"| {tuner} | A alone | {start:.2f} | {share(first, prompts_b, SPELT):.2f} | | | |")
            for number, (what, settings) in enumerate(ROWS):
                folder = place / tuner / f"b{number}"
                made = run(
                    folder, new, steps=given.steps, settings=settings, continue_from=str(first), method=tuner
                )
                kept, learned = share(folder, prompts_a, VOICE), share(folder, prompts_b, SPELT)
                told = next(iter(made.kept.values()), float("nan"))
                lines.append(
                    f"| {tuner} | then B, {what} | {kept:.2f} | {learned:.2f} | "
                    f"{kept / max(start, 1e-9):.0%} | {told:.0%} | {'yes' if made.ok else 'no'} |"
                )
                minutes = (time.monotonic() - begun) / 60
                out.write_text("\n".join([*lines, "", f"{minutes:.0f} minutes."]) + "\n", encoding="utf-8")
                print(lines[-1], file=sys.stderr, flush=True)
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
