"""Makes the console that everything is printed on: colour only where it is wanted, plain when piped.

Goes in: which stream. Comes out: a rich console. Never does: print; let what stands in a name, in
data or in an answer command the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.theme import Theme

from advisor.units import printable

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


class _SafeConsole(Console):
    """Lets rich's own control codes through, and none that stand in a text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; rich honours NO_COLOR, TERM=dumb and pipes. Piped text has at least 100 columns.

    Square brackets are text: names and goals of people are printed as they are.
    """
    console = _SafeConsole(stderr=stderr, theme=THEME, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console
