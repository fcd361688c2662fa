"""Does a run that is killed at any moment end in the same bits? Kills trainings at random and resumes them.

Goes in: nothing; the model is tiny and random. Comes out: benchmarks/results/kill-<date>.md and the same on
the screen: for each method how many SIGKILLs, how many of them while a checkpoint was being written, how many
resumed runs ended in weights that are equal to the last bit, and the greatest difference where they are not.
With `--stages`, the supervisor of a plan of two stages is killed too, between the stages among other moments.
Never does: count a kill that came after the end of the program.

    python benchmarks/kill.py [--kills 50] [--only sft/lora,dpo/lora] [--stages 6] [--seed 1]

The training programs are the shipped ones, each in a process of its own, forked from one that has loaded the
libraries, so that a run takes seconds and a kill costs no twelve seconds of imports. With `--stages`
everything is started as a person does, through the command line.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import numpy as np  # noqa: E402 - after the number of threads
from safetensors.numpy import load_file  # noqa: E402

from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.run.events import read_events  # noqa: E402
from advisor.types import Record  # noqa: E402
from tiny import make_tiny_model  # noqa: E402
from training import COLOURS, THINGS, make_run, rows, run_here, write_rows  # noqa: E402

METHODS = ("sft/full", "sft/lora", "sft/qlora", "dpo/lora", "grpo/lora")
RESULTS = ("model/model.safetensors", "adapter/adapter_model.safetensors")
MOST_KILLS_A_RUN = 4


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


def folder_for(method: str, place: Path, model: Path) -> Path:
    """Write a run folder of a method: 12 steps, a checkpoint after every second one."""
    objective, tuner = method.split("/")
    place.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {"max_steps": 12, "save_every_steps": 2}
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
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    log = os.open(folder / "train.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(run_here(folder))


def ended(pid: int, *, within: float | None) -> int | None:
    """Wait for a process and return its status, None when it still runs after `within` seconds."""
    deadline = None if within is None else time.monotonic() + within
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


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
    first, second = folder_for("sft/lora", place / "one", model), folder_for("dpo/lora", place / "two", model)
    folder = place / "run"
    folder.mkdir(parents=True)
    shutil.copy(first / "recipe.yaml", folder / "recipe-1-sft.yaml")
    text = (second / "recipe.yaml").read_text(encoding="utf-8")
    text = text.replace("after: null", "after: stages/1-sft")
    (folder / "recipe-2-dpo.yaml").write_text(text, encoding="utf-8")
    return folder


def supervise(folder: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    """Start the command line on a folder."""
    command = [sys.executable, "-m", "advisor", "run", str(folder), "--offline", "--json"]
    return subprocess.Popen(
        [*command, *(["--resume"] if resume else [])], stdout=subprocess.DEVNULL, cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip


def unlocked(folder: Path) -> None:
    """Wait until the program of a killed supervisor has ended too."""
    import fcntl

    with (folder / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def measure_stages(model: Path, place: Path, *, kills: int, chance: random.Random) -> Row:
    """Kill the supervisor of a plan of two stages: at random, and just when the first stage has ended."""
    whole = two_stages(model, place / "whole")
    began = time.monotonic()
    assert supervise(whole, resume=False).wait() == 0
    seconds = time.monotonic() - began
    runs = equal = between = 0
    greatest = 0.0
    for number in range(kills):
        folder = two_stages(model, place / f"run-{number}")
        process = supervise(folder, resume=False)
        if number % 2:
            while not any(e["event"] == "end" for e in read_events(folder / "events.jsonl")):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.02))
        else:
            time.sleep(chance.uniform(0.5, seconds))
        process.kill()
        process.wait()
        between += number % 2 and not (folder / "stages" / "1-sft" / "report.json").is_file()
        unlocked(folder)
        again = supervise(folder, resume=(folder / "events.jsonl").is_file())
        assert again.wait() == 0
        found = difference(whole, folder)
        runs, equal, greatest = runs + 1, equal + (found == 0.0), max(greatest, found)
        print(f"stages: {equal} of {runs} runs equal", file=sys.stderr, flush=True)
    return Row(
        method=f"sft then dpo, supervisor killed ({between} while the first stage was put away)",
        seconds=round(seconds, 1), kills=runs, in_checkpoint=0, before_first=0, runs=runs, equal=equal,
        greatest=greatest,
    )  # fmt: skip


def table(found: list[Row]) -> str:
    """Return the table with what it was measured on."""
    versions = installed_packages()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    cpu, _ = cpu_identity(Path("/proc"))
    lines = [
        "# Killed and resumed", "",
        f"{datetime.date.today()}, {named}; {cpu}; tiny random Llama, one thread.",
        "`python benchmarks/kill.py`", "",
        "| method | s a run | SIGKILLs | of them in a checkpoint | before the first checkpoint | runs "
        "| ended bit-equal | greatest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row.method} | {row.seconds} | {row.kills} | {row.in_checkpoint} | {row.before_first} "
        f"| {row.runs} | {row.equal} | {row.greatest:g} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--stages", type=int, default=6, help="kills of a supervisor with two stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    target = given.out or HERE / "results" / f"kill-{datetime.date.today()}.md"
    import torch  # noqa: F401 - loaded once, then forked
    import trl  # noqa: F401

    import advisor.train.reinforcement
    import advisor.train.trainer  # noqa: F401

    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = make_tiny_model(place / "model", hidden=128)
        for method in filter(None, given.only.split(",")):
            here = place / method.replace("/", "-")
            found.append(measure(method, model, here, kills=given.kills, chance=chance))
            target.write_text(table(found), encoding="utf-8")
        if given.stages:
            found.append(measure_stages(model, place / "stages", kills=given.stages, chance=chance))
    target.write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
