"""Makes the console that everything is printed on: colour only where it is wanted, plain when piped.

Goes in: which stream. Comes out: a rich console. Never does: print.
"""

from __future__ import annotations

from rich.console import Console
from rich.theme import Theme

THEME = Theme(
    {
        "good": "green",
        "warn": "yellow",
        "bad": "bold red",
        "head": "bold cyan",
        "key": "cyan",
        "quiet": "dim",
    }
)
"""Base colours only, so that dark and light terminals show them in their own shades."""


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; rich honours NO_COLOR, TERM=dumb and pipes. Piped text has at least 100 columns.

    Square brackets are text: names and goals of people are printed as they are.
    """
    console = Console(stderr=stderr, theme=THEME, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console
