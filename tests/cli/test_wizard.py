"""The wizard as a person meets it: in a terminal of 80x24, and replayed without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cli.terminal import CTRL_C, DOWN, ENTER, ESCAPE, Terminal

ANSWERS = {
    "hardware": "RTX 3060",
    "goal": "write poems in several languages",
    "deploy": "offline on laptops via llama.cpp",
    "commercial": False,
    "must_not_forget": False,
    "model": "auto",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small Alpaca file."""
    file = tmp_path / "poems.json"
    rows = [
        {"instruction": f"Write poem {i}", "input": "", "output": f"Roses are red, number {i}. " * 8}
        for i in range(400)
    ]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[list[Terminal]]:
    """Terminals that are closed after the test."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def _run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "advisor", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_the_usual_way(tmp_path: Path, data: Path, open_terminal: list[Terminal]) -> None:
    """Hardware first, then data, then the goal; the plan with reasons; the command; nothing wider than 80."""
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    open_terminal.append(terminal)
    terminal.wait_for("Which machine will train?")
    assert terminal.text().index("Machine (probed)") < terminal.text().index("Which machine")
    terminal.send("RTX 3060" + ENTER)
    terminal.wait_for("Where is your data?")
    terminal.send("poems.json" + ENTER)
    terminal.wait_for("What should the model do better")
    assert "400 rows" in terminal.text()
    terminal.send("write poems in several languages" + ENTER)
    terminal.wait_for("Where must it run")
    terminal.send(DOWN + ENTER)
    terminal.wait_for("commercially?")
    terminal.send("n")
    terminal.wait_for("stay as good?")
    terminal.send("n")
    terminal.wait_for("Which model?")
    terminal.send(ENTER)
    screen = terminal.wait_for("What now?")
    assert "RTX 3060" in screen
    assert "learning_rate" in screen
    assert "rejected" in screen
    assert "ftadvisor plan" in screen
    terminal.send(DOWN + ENTER)
    assert terminal.wait_end() == 0
    (folder,) = tmp_path.glob("ftadvisor-*/")
    assert (folder / "plan.json").is_file()
    assert (folder / "recipe.yaml").is_file()


def test_an_unclear_goal_is_asked_once_more(
    tmp_path: Path, data: Path, open_terminal: list[Terminal]
) -> None:
    """A goal that names no kind of task is questioned once and then taken as it is; a clear one is echoed."""
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    open_terminal.append(terminal)
    for question, keys in (
        ("Which machine will train?", "RTX 3060" + ENTER),
        ("Where is your data?", "poems.json" + ENTER),
        ("What should the model do better", "be good" + ENTER),
        ("I could not tell", ENTER),
    ):
        terminal.wait_for(question)
        terminal.send(keys)
    terminal.wait_for("Where must it run")
    terminal.send(ESCAPE)
    terminal.wait_for("What should the model do better", times=3)
    terminal.send(" at our style" + ENTER)
    assert "Understood: style (from 'style')" in terminal.wait_for("Where must it run", times=2)


def test_ctrl_c_keeps_the_answers(tmp_path: Path, data: Path, open_terminal: list[Terminal]) -> None:
    """Ctrl-C ends with 130 and a file from which the wizard goes on where it was."""
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    open_terminal.append(terminal)
    terminal.wait_for("Which machine will train?")
    terminal.send("RTX 3060" + ENTER)
    terminal.wait_for("Where is your data?")
    terminal.send(CTRL_C)
    assert terminal.wait_end() == 130
    assert "Traceback" not in terminal.text()
    assert yaml.safe_load((tmp_path / "ftadvisor-answers.yaml").read_text()) == {"hardware": "RTX 3060"}
    again = Terminal(["wizard", "--offline", "--answers", "ftadvisor-answers.yaml"], tmp_path)
    open_terminal.append(again)
    screen = again.wait_for("Where is your data?")
    assert "Which machine" not in screen


def test_escape_goes_back_and_loses_nothing(
    tmp_path: Path, data: Path, open_terminal: list[Terminal]
) -> None:
    """Esc asks the question before again, with the answer that was given."""
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    open_terminal.append(terminal)
    terminal.wait_for("Which machine will train?")
    terminal.send("RTX 3060" + ENTER)
    terminal.wait_for("Where is your data?")
    terminal.send(ESCAPE)
    terminal.wait_for("Which machine will train?", times=2)
    terminal.send(ENTER)
    terminal.wait_for("Where is your data?")
    terminal.send(CTRL_C)
    assert terminal.wait_end() == 130
    assert yaml.safe_load((tmp_path / "ftadvisor-answers.yaml").read_text()) == {"hardware": "RTX 3060"}


def test_wrong_path_is_asked_again(tmp_path: Path, open_terminal: list[Terminal]) -> None:
    """A file that is not there is said at once, and the question comes again."""
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    open_terminal.append(terminal)
    terminal.wait_for("Which machine will train?")
    terminal.send("RTX 3060" + ENTER)
    terminal.wait_for("Where is your data?")
    terminal.send("nothing.json" + ENTER)
    screen = terminal.wait_for("nothing.json")
    terminal.send(CTRL_C)
    assert terminal.wait_end() == 130
    assert "Traceback" not in screen


def test_replay_makes_the_same_plan(tmp_path: Path, data: Path) -> None:
    """`--answers` without a terminal writes the plan that the flags give."""
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump({**ANSWERS, "data": "poems.json"}))
    replayed = _run(["wizard", "--answers", "answers.yaml", "--json", "--out", "a"], tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    wish = ["--goal", str(ANSWERS["goal"]), "--deploy", str(ANSWERS["deploy"]), "--no-commercial"]
    where = ["--hardware", "RTX 3060", "--data", "poems.json", "--out", "b"]
    planned = _run(["plan", *where, *wish, "--json"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(replayed.stdout)["plan"] == json.loads(planned.stdout)
    assert (tmp_path / "a" / "recipe.yaml").read_bytes() == (tmp_path / "b" / "recipe.yaml").read_bytes()


def test_without_a_terminal_the_error_names_the_flags(tmp_path: Path) -> None:
    """No terminal and no answers: exit 2, and the flags that say the same."""
    answer = _run(["wizard"], tmp_path)
    assert answer.returncode == 2
    assert "--data" in answer.stderr
    assert "--answers" in answer.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("gaol: poems\n", "goal"),
        ("data: x.json\ncommercial: perhaps\n", "commercial"),
        ("[1, 2]\n", "no answers"),
        ("data: [unclosed\n", "YAML"),
        ("goal: poems\n", "data"),
    ],
)
def test_wrong_answers_file(tmp_path: Path, content: str, words: str) -> None:
    """An extra, missing or wrong key is a usage error that names it."""
    (tmp_path / "answers.yaml").write_text(content)
    answer = _run(["wizard", "--answers", "answers.yaml"], tmp_path)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
