"""A conversation on the terminal: reads what is said, streams the answers.

Goes in: chat sessions by name, and what can be chosen meanwhile. Comes out: text as it is generated. Never
does: load a model; keep what was said; send lines that were pasted together one by one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console
from rich.text import Text

from advisor.errors import AdvisorError, UnknownNameError, UsageError
from advisor.lora_files import parse_strength
from advisor.ui.console import make_console

ENDINGS = {"", "/quit", "/exit", "quit", "exit"}
ADAPTER = "/adapter"
COMMAND = re.compile("/[a-z]+")
"""A slip of the pen, or /help; a path or a sentence is more than that."""


class Talks(Protocol):
    """What can be talked to."""

    def reply(self, text: str) -> Iterator[str]:
        """Say something and yield the answer."""

    def reset(self) -> None:
        """Forget what was said."""


Choices: TypeAlias = Mapping[str, Callable[[float | None], None]]
"""Name of an adapter -> puts it on, with a strength where one is named."""


def need_terminal() -> None:
    """Refuse a conversation before anything is loaded for it.

    Raises:
        UsageError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "A conversation needs a terminal.", "One turn without one: ftadvisor chat FILE --prompt TEXT"
        )


def talk(sessions: Mapping[str, Talks], choices: Choices | None = None, chosen: str = "") -> None:
    """Converse until an empty line, /quit, Ctrl-D or Ctrl-C; /new forgets what was said.

    Args:
        sessions: who answers, by name.
        choices: what `/adapter NAME` may choose.
        chosen: which of them is on.
    """
    console = make_console()
    more = f" {ADAPTER} NAME changes the adapter: {', '.join(choices)}." if choices else ""
    commands = Text(f"An empty line or /quit ends; /new starts again.{more}", style="quiet")
    console.print(commands)
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
        if COMMAND.fullmatch(text):
            console.print(commands)
            continue
        try:
            turn(sessions, text)
        except AdvisorError as problem:
            _warn(console, problem)


def choose(choices: Choices, asked: str, chosen: str) -> str:
    """Put another adapter on (`NAME` or `NAME=STRENGTH`), or with no name say which there are.

    Returns:
        The one that is on now.
    """
    console = make_console()
    name, strength = asked, None
    try:
        if "=" in asked and asked not in choices:
            name, _, number = asked.rpartition("=")
            strength = parse_strength(number)
        if name and name not in choices:
            raise UnknownNameError("adapter", name, choices)
        if name:
            choices[name](strength)
    except AdvisorError as problem:
        _warn(console, problem)
        return chosen
    chosen = name or chosen
    on = f"[{chosen}]" if strength is None else f"[{chosen}={strength:g}]"
    listed = ", ".join(on if one == chosen else one for one in choices)
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


def _warn(console: Console, problem: AdvisorError) -> None:
    console.print(Text(f"{problem.message} {problem.remedy}".strip(), style="warn"))
