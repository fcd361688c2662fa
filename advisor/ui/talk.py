"""A conversation on the terminal: reads what is said, streams the answers.

Goes in: chat sessions by name, and what can be chosen meanwhile. Comes out: text as it is generated. Never
does: load a model; keep what was said; send lines that were pasted together one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.text import Text

from advisor.errors import AdvisorError, UnknownNameError, UsageError
from advisor.ui.console import make_console

ENDINGS = {"", "/quit", "/exit", "quit", "exit"}
ADAPTER = "/adapter"


class Talks(Protocol):
    """What can be talked to."""

    def reply(self, text: str) -> Iterator[str]:
        """Say something and yield the answer."""

    def reset(self) -> None:
        """Forget what was said."""


Choices = Mapping[str, Callable[[], None]]
"""Name of an adapter -> puts it on."""


def talk(sessions: Mapping[str, Talks], choices: Choices | None = None, chosen: str = "") -> None:
    """Converse until an empty line, /quit, Ctrl-D or Ctrl-C; /new forgets what was said.

    Args:
        sessions: who answers, by name.
        choices: what `/adapter NAME` may choose.
        chosen: which of them is on.

    Raises:
        UsageError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "A conversation needs a terminal.", "One turn without one: ftadvisor chat FILE --prompt TEXT"
        )
    console = make_console()
    more = f" {ADAPTER} NAME changes the adapter: {', '.join(choices)}." if choices else ""
    console.print(Text(f"An empty line or /quit ends; /new starts again.{more}"), style="quiet")
    asking = PromptSession[str](FormattedText([("ansicyan", "you> ")]))
    while True:
        try:
            # What is no UTF-8 reaches us as surrogates, which no tokenizer takes.
            text = asking.prompt().encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text.lower() in ENDINGS:
            return
        if text == "/new":
            for session in sessions.values():
                session.reset()
            continue
        if choices and text.split()[0] == ADAPTER:
            chosen = choose(choices, text.removeprefix(ADAPTER).strip(), chosen)
            continue
        try:
            turn(sessions, text)
        except AdvisorError as problem:
            console.print(Text(" ".join(filter(None, (problem.message, problem.remedy)))), style="warn")


def choose(choices: Choices, name: str, chosen: str) -> str:
    """Put another adapter on, or with no name say which there are; return the one that is on now."""
    console = make_console()
    try:
        if name and name not in choices:
            raise UnknownNameError("adapter", name, choices)
        if name:
            choices[name]()
    except AdvisorError as problem:
        console.print(Text(problem.message), style="warn")
        return chosen
    chosen = name or chosen
    listed = ", ".join(f"[{one}]" if one == chosen else one for one in choices)
    console.print(Text(f"adapter: {listed}"), style="quiet")
    return chosen


def turn(sessions: Mapping[str, Talks], text: str, *, named: bool = False) -> None:
    """Let every session answer, streaming; with several (or `named`), each is named first."""
    console = make_console()
    for name, session in sessions.items():
        if named or len(sessions) > 1:
            console.print(Path(name).name, style="head")
        try:
            for piece in session.reply(text):
                console.print(piece, end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="quiet", end="")
        console.print()
