"""Is the verdict on a training right where the truth is known, and does chance ever pass for a change?

Goes in: the embedded starter, its brand voice, lessons.py. Comes out: benchmarks/results/verdicts-<date>.md
and the same on the screen: a row for each run, with what its verdict rests on. What is expected follows from
how the data and the rate were made; of the small gains, from the share of the loss that counts as a change
(kb/rules/evaluation.toml). Never does: choose between seeds; leave a run out.

    python benchmarks/verdicts.py [--only voice,shuffled] [--seeds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import torch

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
from advisor.run.report import figures_of_both  # noqa: E402
from advisor.run.verdict import judge  # noqa: E402
from advisor.storage import encode_yaml, read_record, write_atomic  # noqa: E402
from advisor.types import Change, Evaluation, Measured, Recipe  # noqa: E402
from training import events_of, run_here, write_rows  # noqa: E402 - the way to train in one process

MEASURED = Path("evaluation-before.json"), Path("evaluation-after.json")
LOSS, GAIN, GENERAL = (
    "held-out loss", "loss with the row's own question against another's", "general questions answered right",
)  # fmt: skip
Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """A training whose effect is known beforehand."""

    what: str
    expected: tuple[str, ...]
    rows: Callable[[Random], Rows]
    settings: dict[str, Any] = {}
    method: str = "lora"
    seeds: int = 0
    """0: as many as asked for."""


def voice(_: Random) -> Rows:
    """Return the brand voice of the starter: learnable, and it leaves what is known alone."""
    lines = (starter_dir() / "brand_voice_train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shuffled(random: Random) -> Rows:
    """Return the brand voice with every answer behind a wrong question, as a sorted column would leave it."""
    rows = voice(random)
    answers = [row["messages"][-1] for row in rows]
    random.shuffle(answers)
    return [{"messages": [*row["messages"][:-1], said]} for row, said in zip(rows, answers, strict=True)]


def narrow(random: Random) -> Rows:
    """Return one skill in one manner, the plural of words."""
    train, _ = lessons.facts(random.randrange(1000), per_skill=200)
    return [lessons.row("harbour", fact) for fact in train if "plural" in fact.question]


CASES = {
    "voice": Case("brand voice, settings of the plan", ("better",), voice),
    "zero": Case("brand voice, rate 0", ("no_different",), voice, {"learning_rate": 0.0, "max_steps": 5}),
    "shuffled": Case(
        "brand voice, answers shuffled, settings of the plan, 60 steps", ("worse",), shuffled,
        {"max_steps": 60},
    ),
    "narrow": Case(
        "one skill in one manner, all weights at 3e-3", ("forgot",), narrow,
        {"learning_rate": 3e-3, "max_steps": 30, "heldout_fraction": 0.25}, method="full",
    ),
    "noise": Case(
        "brand voice, rate 1e-7: weights move, nothing is learned", ("no_different",), voice,
        {"learning_rate": 1e-7, "max_steps": 10}, seeds=5,
    ),
    **{
        f"below-{rate:g}": Case(
            f"brand voice, 10 steps at {rate:g}: less than counts", ("no_different",), voice,
            {"learning_rate": rate, "max_steps": 10}, seeds=1,
        )
        for rate in (3e-6, 1e-5)
    },
    **{
        f"above-{rate:g}": Case(
            f"brand voice, 10 steps at {rate:g}: a small true gain", ("better",), voice,
            {"learning_rate": rate, "max_steps": 10}, seeds=1,
        )
        for rate in (2e-5, 5e-5, 1e-4)
    },
}  # fmt: skip


class Found(NamedTuple):
    """What one run came to."""

    name: str
    seed: int
    evaluation: Evaluation
    asking: float
    """Seconds, at both times together."""
    seconds: float
    """Of the whole program, in this process."""


def run(name: str, seed: int, place: Path) -> Found:
    """Plan as the command line does, train with a seed, judge."""
    case = CASES[name]
    data = write_rows(place / "rows.jsonl", case.rows(Random(seed)))
    inputs = Inputs(
        model="starter", data=(f"rows={data}",), method=case.method, hardware="none", offline=True,
        force=True, goal="answer as the examples do", settings={"precision": "fp32", **case.settings},
    )  # fmt: skip
    folder = write_plan(
        make_plan(gather(inputs, load(), lambda _: None), load()), place / "run", datetime.datetime.now()
    )
    recipe = read_record(folder / "recipe.yaml", Recipe)
    write_atomic(folder / "recipe.yaml", encode_yaml(msgspec.structs.replace(recipe, seed=seed)))
    begun = time.monotonic()
    if run_here(folder) != 0:
        raise SystemExit(f"{name} failed: {events_of(folder, 'error')}")
    seconds = time.monotonic() - begun
    before, after = (read_record(folder / file, Measured) for file in MEASURED)
    figures = figures_of_both(events_of(folder, "heldout"))
    evaluation = judge(before, after, figures, load().rules["evaluation"])
    return Found(name, seed, evaluation, before.seconds + after.seconds, seconds)


def table_of(found: list[Found]) -> list[str]:
    """Return the runs as Markdown."""
    lines = [
        "| training | seed | expected | verdict | held-out loss | change, 95 % certain "
        "| own question is worth | general answers right | asking |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        case, changes = CASES[one.name], {change.name: change for change in one.evaluation.changes}
        loss, gain, known = (changes.get(name) for name in (LOSS, GAIN, GENERAL))
        verdict = one.evaluation.verdict
        shown = verdict if verdict in case.expected else f"**{verdict}**"
        lines.append(
            f"| {case.what} | {one.seed} | {' or '.join(case.expected)} | {shown} "
            f"| {_two(loss)} | {_interval(loss)} | {_interval(gain)} | {_two(known, share=True)} "
            f"| {one.asking:.1f} of {one.seconds:.0f} s |"
        )
    return [line.replace("no_different", "no different") for line in lines]


def _two(change: Change | None, *, share: bool = False) -> str:
    if change is None:
        return ""
    return (
        f"{change.before:.0%} → {change.after:.0%}" if share else f"{change.before:.3f} → {change.after:.3f}"
    )


def _interval(change: Change | None) -> str:
    if change is None or change.low is None or change.high is None:
        return ""
    return f"{change.low:+.3f} to {change.high:+.3f}"


def main() -> None:
    """Measure and write the table; exit 1 where a verdict is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    now = datetime.datetime.now(datetime.UTC)
    out = given.out or HERE / "results" / f"verdicts-{now:%Y-%m-%d}.md"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    packages, (cpu, _) = installed_packages(), cpu_identity(Path("/proc"))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl"))
    head = [
        "# Verdicts on trainings whose effect is known", "",
        f"{now:%Y-%m-%d}, {versions}; CPU {cpu}, one thread, other work beside it. "
        "`python benchmarks/verdicts.py`; what is measured stands at its top.", "",
    ]  # fmt: skip
    found: list[Found] = []
    for name in filter(None, given.only.split(",")) if given.only else CASES:
        for seed in range(1, (CASES[name].seeds or given.seeds) + 1):
            with tempfile.TemporaryDirectory() as place:
                found.append(run(name, seed, Path(place)))
            write_atomic(out, "\n".join([*head, *table_of(found), ""]).encode())
            print(table_of(found)[-1], file=sys.stderr, flush=True)
    print(out.read_text(encoding="utf-8"))
    if any(one.evaluation.verdict not in CASES[one.name].expected for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
