"""Does a run that is killed at any moment end in the same bits? Kills trainings at random and resumes them.

Goes in: nothing; the model is tiny and random. Comes out: benchmarks/results/kill-<date>.md and the same on
the screen: for each method how many SIGKILLs, how many of them while a checkpoint was being written, how many
resumed runs ended in weights that are equal to the last bit, and the greatest difference where they are not.
With `--stages`, the supervisor of a plan of two stages is killed, between the stages among other moments.
Rows of methods that were not asked for stay in the table, with their day.
Never does: count a kill that came after the end of the program.

    python benchmarks/kill.py [--kills 50] [--only sft/lora,dpo/lora] [--stages 50] [--seed 1]

The training programs are the shipped ones, each in a process of its own, forked from one that has loaded the
libraries, so that a run takes seconds and a kill costs no twelve seconds of imports. With `--stages` the
supervisor is the shipped one too, in a process of its own; half of its kills take the program along, as when
a machine goes off, the others leave the program to end by itself.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FTADVISOR_CALIBRATION"] = ""
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import numpy as np  # noqa: E402 - after the number of threads
import psutil  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.run.events import read_events  # noqa: E402
from advisor.types import Record  # noqa: E402
from forks import ended, forked, kill_supervisor, load_libraries, supervise  # noqa: E402
from tiny import make_tiny_model  # noqa: E402
from training import COLOURS, THINGS, make_run, rows, run_here, write_rows  # noqa: E402

METHODS = ("sft/full", "sft/lora", "sft/qlora", "dpo/lora", "grpo/lora")
RESULTS = ("model/model.safetensors", "adapter/adapter_model.safetensors")
MOST_KILLS_A_RUN = 4
STAGES = "sft/lora then dpo/lora"
FIRST, SECOND = "recipe-1-sft.yaml", "recipe-2-dpo.yaml"
ROW = re.compile(r"\| (?P<method>[^|]+) \|.*\| \d{4}-\d\d-\d\d, [^|]+ \|")


class Row(Record, frozen=True, kw_only=True):
    """What became of the kills of one method."""

    method: str
    seconds: float
    """Of the uninterrupted run."""
    kills: int
    in_checkpoint: int
    """Kills that left a checkpoint half-written."""
    before_first: int
    """Kills before the first checkpoint: the run begins anew."""
    runs: int
    equal: int
    greatest: float
    """Greatest difference of a weight, over all runs."""


def folder_for(method: str, place: Path, model: Path, *, max_steps: int = 12) -> Path:
    """Write a run folder of a method, with a checkpoint after every second step."""
    objective, tuner = method.split("/")
    place.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {"max_steps": max_steps, "save_every_steps": 2}
    data, kind = write_rows(place / "rows.jsonl", rows()), "instruction"
    if objective == "dpo":
        pairs = [
            {
                "prompt": f"Is the {thing} {colour}?",
                "chosen": f"Yes, please see the {colour} {thing}.",
                "rejected": f"No. Go away, {colour} {thing}.",
            }
            for colour in COLOURS
            for thing in THINGS
        ]
        data, kind, more["beta"] = write_rows(place / "pairs.jsonl", pairs), "preference", 0.1
    if objective == "grpo":
        asked = [{"prompt": f"Name a {thing}."} for thing in THINGS]
        data, kind = write_rows(place / "prompts.jsonl", asked), "prompts"
        more |= {"num_generations": 4, "kl_beta": 0.04, "max_completion_length": 12, "max_steps": 8,
                 "reward_functions": ["length"], "reward_length": 4, "heldout_fraction": 0.0}  # fmt: skip
    if tuner == "qlora":
        more["precision"] = "bf16"
    return make_run(
        place / "run", tuner=tuner, model=model, data=data, kind=kind, objective=objective,  # type: ignore[arg-type]
        **more,
    )  # fmt: skip


def start(folder: Path) -> int:
    """Train in a forked process and return its id."""
    return forked(lambda: run_here(folder), folder / "train.log")


def difference(one: Path, other: Path) -> float:
    """Return the greatest difference of a weight; 0 only when all bits are equal."""
    for name in RESULTS:
        if (one / name).is_file():
            first, second = load_file(one / name), load_file(other / name)
            assert first.keys() == second.keys()
            if all(first[key].tobytes() == second[key].tobytes() for key in first):
                return 0.0
            pairs = [(first[key].astype(np.float64), second[key].astype(np.float64)) for key in first]
            return max(float(np.abs(a - b).max()) for a, b in pairs) or float("nan")
    raise FileNotFoundError(f"no result in {one}")


def half_written(folder: Path) -> bool:
    """Tell whether a checkpoint lies there without its marker."""
    return any(not (path / "complete.json").is_file() for path in (folder / "checkpoints").glob("*-*"))


def measure(method: str, model: Path, place: Path, *, kills: int, chance: random.Random) -> Row:
    """Kill runs of one method until there are enough kills; resume each until it ends."""
    whole = folder_for(method, place / "whole", model)
    began = time.monotonic()
    assert ended(start(whole), within=None) == 0, (whole / "events.jsonl").read_text()
    seconds = time.monotonic() - began
    done = in_checkpoint = before_first = runs = equal = 0
    greatest = 0.0
    while done < kills:
        one = place / f"run-{runs}"
        folder = folder_for(method, one, model)
        for _ in range(chance.randint(1, MOST_KILLS_A_RUN)):
            pid = start(folder)
            if ended(pid, within=chance.uniform(0.02, seconds)) is not None:
                break
            os.kill(pid, signal.SIGKILL)
            ended(pid, within=None)
            done += 1
            in_checkpoint += half_written(folder)
            before_first += not any((folder / "checkpoints").glob("*/complete.json"))
        assert ended(start(folder), within=None) == 0, (folder / "events.jsonl").read_text()
        found = difference(whole, folder)
        runs, equal, greatest = runs + 1, equal + (found == 0.0), max(greatest, found)
        shutil.rmtree(one)
        print(f"{method}: {done} kills, {equal} of {runs} runs equal", file=sys.stderr, flush=True)
    return Row(
        method=method, seconds=round(seconds, 1), kills=done, in_checkpoint=in_checkpoint,
        before_first=before_first, runs=runs, equal=equal, greatest=greatest,
    )  # fmt: skip


def two_stages(model: Path, place: Path) -> Path:
    """Write a run folder of two stages, SFT and then DPO."""
    first, second = (
        folder_for(method, place / method.replace("/", "-"), model, max_steps=6)
        for method in ("sft/lora", "dpo/lora")
    )
    folder = place / "run"
    folder.mkdir(parents=True)
    shutil.copy(first / "recipe.yaml", folder / FIRST)
    text = (second / "recipe.yaml").read_text(encoding="utf-8")
    (folder / SECOND).write_text(text.replace("after: null", "after: stages/1-sft"), encoding="utf-8")
    return folder


def await_the_end_of_the_first(folder: Path, pid: int) -> None:
    """Return as soon as the first stage has said that it is done, or the supervisor has ended."""
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if any(e["event"] == "end" for e in read_events(folder / "events.jsonl")):
            return
        time.sleep(0.0005)


def measure_stages(model: Path, place: Path, *, kills: int, chance: random.Random) -> Row:
    """Kill the supervisor of a plan of two stages: at random, and just when the first stage has ended."""
    whole = two_stages(model, place / "whole")
    began = time.monotonic()
    assert ended(supervise(whole), within=None) == 0, (whole / "train.log").read_text()
    seconds = time.monotonic() - began
    done = in_checkpoint = before_first = between = runs = equal = 0
    greatest = 0.0
    while done < kills:
        folder = two_stages(model, place / f"run-{runs}")
        for number in range(chance.randint(1, MOST_KILLS_A_RUN)):
            pid = supervise(folder)
            if number == 0 and runs % 2:
                await_the_end_of_the_first(folder, pid)
                wait = chance.uniform(0, 0.02)
            else:
                wait = chance.uniform(0.02, seconds)
            if ended(pid, within=wait) is not None:
                break
            kill_supervisor(folder, pid, program_too=chance.random() < 0.5)
            done += 1
            in_checkpoint += half_written(folder)
            before_first += not any(folder.glob("checkpoints/*/complete.json"))
            between += between_stages(folder)
        assert ended(supervise(folder), within=None) == 0, (folder / "train.log").read_text()
        assert stages_in_order(folder), (folder / "events.jsonl").read_text()
        found = max(difference(whole / one, folder / one) for one in ("stages/1-sft", "."))
        runs, equal, greatest = runs + 1, equal + (found == 0.0), max(greatest, found)
        shutil.rmtree(folder.parent)
        print(f"stages: {done} kills, {between} between, {equal} of {runs} runs equal", file=sys.stderr)
    return Row(
        method=f"{STAGES} (kills between the stages: {between})", seconds=round(seconds, 1),
        kills=done, in_checkpoint=in_checkpoint, before_first=before_first, runs=runs, equal=equal,
        greatest=greatest,
    )  # fmt: skip


def between_stages(folder: Path) -> bool:
    """Tell whether the first stage has ended and the second not begun."""
    events = list(read_events(folder / "events.jsonl"))
    return any(e["event"] == "end" for e in events) and not any(e["stage"] == "2-dpo" for e in events)


def stages_in_order(folder: Path) -> bool:
    """Tell whether the first stage was never begun again after it had ended."""
    told = [(e["stage"], e["event"]) for e in read_events(folder / "events.jsonl")]
    return ("1-sft", "start") not in told[told.index(("1-sft", "end")) :]


def table(found: list[Row], kept: list[str]) -> str:
    """Return the table with what it was measured on; `kept` are lines of an earlier one."""
    versions = installed_packages()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    cpu, _ = cpu_identity(Path("/proc"))
    lines = [
        "# Killed and resumed", "",
        f"{named}; tiny random Llama, one thread.",
        "`python benchmarks/kill.py`", "",
        "| method | s a run | SIGKILLs | of them in a checkpoint | before the first checkpoint | runs "
        "| ended bit-equal | greatest difference | measured |",
        "|---|---|---|---|---|---|---|---|---|",
        *kept,
    ]  # fmt: skip
    lines += [
        f"| {row.method} | {row.seconds} | {row.kills} | {row.in_checkpoint} | {row.before_first} "
        f"| {row.runs} | {row.equal} | {row.greatest:g} | {datetime.date.today()}, {cpu} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def earlier(asked: list[str]) -> list[str]:
    """Return the lines of the newest table whose methods are not measured now."""
    files = sorted((HERE / "results").glob("kill-*.md"))
    lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
    found = [(match, line) for line in lines if (match := ROW.fullmatch(line))]
    return [line for match, line in found if match["method"].split(" (")[0] not in asked]


def main() -> None:
    """Measure what was asked for and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--stages", type=int, default=50, help="kills of a supervisor with two stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    target = given.out or HERE / "results" / f"kill-{datetime.date.today()}.md"
    load_libraries()
    methods = list(filter(None, given.only.split(",")))
    kept = earlier([*methods, *([STAGES] if given.stages else [])])
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = make_tiny_model(place / "model", hidden=128)
        for method in methods:
            here = place / method.replace("/", "-")
            found.append(measure(method, model, here, kills=given.kills, chance=chance))
            target.write_text(table(found, kept), encoding="utf-8")
        if given.stages:
            found.append(measure_stages(model, place / "stages", kills=given.stages, chance=chance))
    target.write_text(table(found, kept), encoding="utf-8")
    print(table(found, kept))


if __name__ == "__main__":
    main()
