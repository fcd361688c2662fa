"""The doctor's self-test: what it makes of a stage that works, fails, crashes or hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import advisor.self_test
from advisor.cli.main import run as main
from advisor.self_test import STAGES, self_test
from advisor.ui import render
from advisor.ui.console import make_console


def _drawn(found: advisor.self_test.SelfTest, capsys: pytest.CaptureFixture[str]) -> str:
    make_console().print(render.self_test(found))
    return capsys.readouterr().out


def test_a_stage_that_works_says_what_it_showed_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command line itself is asked, in a folder that is gone afterwards."""
    monkeypatch.setattr(advisor.self_test, "STAGES", {"plan": STAGES["plan"]})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told: list[str] = []
    found = self_test(told.append)
    assert found.passed, found
    assert (told, [stage.name for stage in found.stages]) == (["plan"], ["plan"])
    assert "starter" in found.stages[0].evidence
    assert found.stages[0].seconds > 0
    assert not list(tmp_path.iterdir())
    assert "Everything works" in _drawn(found, capsys)


@pytest.mark.parametrize(
    ("code", "says", "remedy"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "ftadvisor"),
        ("raise SystemExit('libgomp.so.1: cannot open')", "libgomp.so.1", "ftadvisor"),
        ("import sys; print('{\"steps\": 0}'); sys.exit(1)", "0 steps", "ftadvisor"),
        ("import time; time.sleep(60)", "did not end", "ftadvisor"),
    ],
)  # fmt: skip
def test_a_stage_that_fails_is_the_last_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, code: str, says: str,
    remedy: str,
) -> None:  # fmt: skip
    """A crash, an end without an answer, a bad result, a hang."""
    (tmp_path / "advisor").mkdir()
    (tmp_path / "advisor" / "__init__.py").touch()
    (tmp_path / "advisor" / "__main__.py").write_text(code)
    monkeypatch.setattr(advisor, "__file__", str(tmp_path / "advisor" / "__init__.py"))
    monkeypatch.setattr(advisor.self_test, "LONGEST_SECONDS", 1.0 if "sleep" in code else 30.0)
    monkeypatch.chdir(tmp_path)
    stages = {
        "train": (lambda _: ["run", "x"], lambda answer: f"{answer['steps']} steps"),
        "export": STAGES["export"],
    }
    monkeypatch.setattr(advisor.self_test, "STAGES", stages)
    found = self_test(lambda _: None)
    assert not found.passed
    (stage,) = found.stages
    assert says in stage.evidence
    assert remedy in stage.remedy
    drawn = _drawn(found, capsys)
    assert "FAILED" in drawn
    assert "train failed" in drawn


def test_the_doctor_fails_when_its_self_test_does(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, with the stage, what went wrong and what to do in the JSON answer."""
    stages = {"train": (lambda _: ["run", "/nowhere"], STAGES["train"][1])}
    monkeypatch.setattr(advisor.self_test, "STAGES", stages)
    assert main(["doctor", "--self-test", "--json"]) == 1
    answer = json.loads(capfd.readouterr().out)
    assert answer["ok"] is False
    (stage,) = answer["self_test"]["stages"]
    assert (stage["name"], stage["passed"]) == ("train", False)
    assert "no run folder /nowhere" in stage["evidence"]
    assert "ftadvisor plan" in stage["remedy"]
