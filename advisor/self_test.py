"""Does the whole way work on this computer? One minute of it, on the embedded starter model.

Goes in: nothing. Comes out: a SelfTest: each stage with its seconds and what it showed, or why it failed.
Never does: use the network; leave anything behind; go on after a stage that failed.

Each stage is a command line of its own, so that a library that crashes fails its stage and not the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import advisor
from advisor.resources import starter_dir
from advisor.units import format_bytes

LONGEST_SECONDS = 300
"""A stage that takes longer hangs."""
PROMPT = "Hello!"
Answer = dict[str, Any]


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the self-test."""

    name: str
    passed: bool
    seconds: float
    evidence: str
    """What it showed, or what went wrong."""
    remedy: str = ""


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """The stages up to the first that failed."""

    passed: bool
    seconds: float
    stages: tuple[StageResult, ...]


def self_test(say: Callable[[str], None]) -> SelfTest:
    """Go the whole way in a temporary folder.

    Args:
        say: told the name of each stage as it begins.
    """
    began = time.monotonic()
    done: list[StageResult] = []
    with tempfile.TemporaryDirectory(prefix="ftadvisor-self-test-") as scratch:
        for name, (arguments, shown) in STAGES.items():
            say(name)
            done.append(_stage(name, arguments(Path(scratch) / "run"), shown))
            if not done[-1].passed:
                break
    seconds = round(time.monotonic() - began, 1)
    return SelfTest(passed=all(stage.passed for stage in done), seconds=seconds, stages=tuple(done))


def _stage(name: str, arguments: list[str], shown: Callable[[Answer], str]) -> StageResult:
    began = time.monotonic()
    # Four steps are no measurement to learn from.
    environment = {**os.environ, "FTADVISOR_CALIBRATION": ""}
    root = str(Path(advisor.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "advisor", *arguments, "--json"]
    try:
        child = subprocess.run(
            command, capture_output=True, env=environment, stdin=subprocess.DEVNULL, timeout=LONGEST_SECONDS,
            check=False,
        )  # fmt: skip
        passed, evidence, remedy = _judged(child, shown)
    except subprocess.TimeoutExpired:
        passed, evidence, remedy = False, f"It did not end within {LONGEST_SECONDS} s.", _again(arguments)
    seconds = round(time.monotonic() - began, 1)
    return StageResult(name=name, passed=passed, seconds=seconds, evidence=evidence, remedy=remedy)


def _judged(
    child: subprocess.CompletedProcess[bytes], shown: Callable[[Answer], str]
) -> tuple[bool, str, str]:
    """Return whether a stage passed, what it showed, what to do."""
    again = _again(child.args[3:-1])
    if child.returncode < 0:
        return False, f"It was ended by {signal.Signals(-child.returncode).name}.", again
    try:
        answer = msgspec.json.decode(child.stdout, type=Answer)
    except msgspec.DecodeError:
        last = (child.stderr.decode(errors="replace").splitlines() or ["It said nothing."])[-1]
        return False, last, again
    if answer.get("schema") == "ftadvisor.error/1":
        return False, str(answer["message"]), str(answer["remedy"])
    return child.returncode == 0, shown(answer), "" if child.returncode == 0 else again


def _again(arguments: list[str]) -> str:
    return f"Its command was: ftadvisor {' '.join(arguments)}"


def _plan(folder: Path) -> list[str]:
    data = starter_dir() / "brand_voice_train.jsonl"
    settings = ("max_steps=4", "save_every_steps=2", "evaluate=false")
    return [
        "plan", "--model", "starter", "--data", f"voice={data}", "--goal", "chat in our tone of voice",
        "--out", str(folder), "--offline", "--force", *(word for one in settings for word in ("--set", one)),
    ]  # fmt: skip


def _planned(answer: Answer) -> str:
    return f"{answer['method']} of {answer['model']['id']}"


def _trained(answer: Answer) -> str:
    return f"{answer['steps']} steps, loss {answer['first_loss']:.2f} to {answer['last_loss']:.2f}"


def _exported(answer: Answer) -> str:
    file = answer["export"]["files"][0]
    return f"{Path(file['path']).name}, {format_bytes(file['bytes'])}"


def _verified(answer: Answer) -> str:
    failed = [check["name"] for check in answer["checks"] if not check["passed"]]
    return f"not passed: {', '.join(failed)}" if failed else f"all {len(answer['checks'])} checks passed"


def _said(answer: Answer) -> str:
    return f"{PROMPT} -> {' '.join(' '.join(answer['answers'].values()).split())}"


def _gguf(folder: Path) -> str:
    return str(next((folder / "export").glob("*.gguf"), folder / "export"))


STAGES: dict[str, tuple[Callable[[Path], list[str]], Callable[[Answer], str]]] = {
    "plan": (_plan, _planned),
    "train": (lambda folder: ["run", str(folder), "--no-probe", "--offline"], _trained),
    "export": (
        lambda folder: ["export", str(folder), "--quant", "F16", "--no-verify", "--offline"],
        _exported,
    ),
    "verify": (lambda folder: ["verify", _gguf(folder), "--against", str(folder), "--offline"], _verified),
    "chat": (lambda folder: ["chat", _gguf(folder), "--prompt", PROMPT], _said),
}
