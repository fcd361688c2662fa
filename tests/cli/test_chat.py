"""Conversations with a tiny file on a real terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import ENTER, Terminal

from advisor.export import export_model
from tiny import make_tiny_model

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("talked") / "model")
    return Path(export_model(folder, quants=("F32",)).files[0].path)


@pytest.fixture
def terminal(gguf: Path, tmp_path: Path) -> Iterator[Terminal]:
    arguments = ["chat", str(gguf), "--max-tokens", "24", "--context", "256"]
    found = Terminal(arguments, tmp_path, columns=40)
    found.wait_for("you>")
    yield found
    found.close()


def test_pasted_lines_are_one_question(terminal: Terminal) -> None:
    """Lines that are pasted together, an empty one among them, are asked together; nothing is left over."""
    terminal.send("\x1b[200~first line\n\nthird line 👩‍🚀\x1b[201~")
    terminal.wait_for("third line")
    assert terminal.text().count("you>") == 1
    terminal.send(ENTER)
    terminal.wait_for("you>", times=2)
    terminal.send("and more" + ENTER)
    terminal.wait_for("you> and more")
    terminal.send("/quit" + ENTER)
    assert terminal.wait_end() == 0


def test_too_long_a_question_does_not_end_the_conversation(terminal: Terminal) -> None:
    """It is refused in words, whatever its length, and the next one is answered."""
    terminal.send("many words " * 400)
    time.sleep(0.3)
    terminal.send(ENTER)
    told = " ".join(terminal.wait_for("Shorten").split())
    assert "this model has room for" in told
    terminal.send("Hello" + ENTER)
    terminal.wait_for("you> Hello")
    terminal.send("/quit" + ENTER)
    assert terminal.wait_end() == 0
