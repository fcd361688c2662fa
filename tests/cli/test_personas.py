"""Six people meet the wizard at 80x24; what they see of the plan is kept as golden text and read by a person.

To accept a wanted change, set FTADVISOR_GOLDEN=write for one run of this file, then read the diff.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.terminal import DOWN, ENTER, Terminal

GOLDEN = Path(__file__).parent / "golden"
Rows = list[dict[str, object]]


def _alpaca(count: int, words: int) -> Rows:
    answer = " ".join(f"word{number % 97}" for number in range(words))
    return [
        {"instruction": f"Task number {i}", "input": "", "output": f"Answer {i}: {answer}."}
        for i in range(count)
    ]


def _chat(count: int) -> Rows:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Reply {i}. " * 9},
            ]
        }
        for i in range(count)
    ]


PERSONAS: dict[str, tuple[str, Callable[[], Rows], str, int, str, str]] = {
    "newcomer-3060": ("RTX 3060", lambda: _alpaca(600, 120), "write poems in several languages", 0, "n", "n"),
    "startup": ("RTX 4060 Laptop", lambda: _chat(900), "an internal assistant in our tone", 1, "y", "n"),
    "researcher-8xh100": (
        "8xH100",
        lambda: _alpaca(2000, 200),
        "the best quality on our benchmark",
        3,
        "n",
        "y",
    ),
    "laptop-without-gpu": ("none", lambda: _chat(400), "answer like our support team", 1, "n", "n"),
    "apple-m2": ("M2", lambda: _alpaca(500, 80), "write product texts in our style", 0, "n", "n"),
    "thirty-rows": ("RTX 4090", lambda: _chat(30), "answer in our brand voice", 0, "n", "n"),
}
"""Name -> machine, data, goal, steps down in the list of places, commercial, must not forget."""


@pytest.mark.parametrize("persona", PERSONAS)
def test_persona(tmp_path: Path, persona: str) -> None:
    """Each persona answers at most eight questions and sees this advice, within 80 columns."""
    machine, rows, goal, place, commercial, keep = PERSONAS[persona]
    (tmp_path / "data.json").write_text(json.dumps(rows()))
    terminal = Terminal(["wizard", "--offline"], tmp_path)
    try:
        unclear = [("I could not tell", ENTER)] if persona == "researcher-8xh100" else []
        for question, keys in [
            ("Which machine will train?", machine + ENTER),
            ("Where is your data?", "data.json" + ENTER),
            ("What should the model do better", goal + ENTER),
            *unclear,
            ("Where must it run", DOWN * place + ENTER),
            ("commercially?", commercial),
            ("stay as good?", keep),
            ("Which model?", ENTER),
        ]:
            terminal.wait_for(question)
            terminal.send(keys)
        screen = terminal.wait_for("What now?")
    finally:
        terminal.close()
    seen = _plan_of(screen)
    assert max(len(line) for line in screen.splitlines()) <= 80
    golden = GOLDEN / f"{persona}.txt"
    if os.environ.get("FTADVISOR_GOLDEN") == "write":
        golden.write_text(seen, encoding="utf-8")
    assert seen == golden.read_text(encoding="utf-8")


def _plan_of(screen: str) -> str:
    """Return what was shown from the advice to the question what to do."""
    lines = screen.splitlines()
    first = next(number for number, line in enumerate(lines) if "Advice:" in line)
    last = next(number for number, line in enumerate(lines) if "What now?" in line)
    return "\n".join(lines[first:last]) + "\n"
