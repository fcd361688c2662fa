"""A conversation on the terminal: reads a line, streams the answers.

Goes in: chat sessions by name. Comes out: text as it is generated. Never does: load a model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.text import Text

from advisor.chat import ChatSession
from advisor.errors import UsageError
from advisor.ui.console import make_console

ENDINGS = {"", "/quit", "/exit", "quit", "exit"}


def talk(sessions: dict[str, ChatSession]) -> None:
    """Converse until an empty line, /quit, Ctrl-D or Ctrl-C; /new forgets what was said.

    Raises:
        UsageError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "A conversation needs a terminal.", "One turn without one: ftadvisor chat FILE --prompt TEXT"
        )
    console = make_console()
    console.print("An empty line or /quit ends; /new starts again.", style="quiet")
    while True:
        try:
            text = console.input(Text("you> ", style="key")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text.lower() in ENDINGS:
            return
        if text == "/new":
            for session in sessions.values():
                session.reset()
            continue
        turn(sessions, text)


def turn(sessions: dict[str, ChatSession], text: str) -> None:
    """Let every session answer, streaming; with several, each is named first."""
    console = make_console()
    for name, session in sessions.items():
        if len(sessions) > 1:
            console.print(Path(name).name, style="head")
        try:
            for piece in session.reply(text):
                console.print(piece, end="", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="quiet", end="")
        console.print()
