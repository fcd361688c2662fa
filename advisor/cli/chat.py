"""`ftadvisor chat GGUF`: an offline conversation, one turn, or two files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from advisor.chat import ChatSession
from advisor.cli.options import Json
from advisor.cli.output import print_json, print_text
from advisor.errors import UsageError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `chat --prompt --json`: file -> text."""

    schema: str = "ftadvisor.chat/1"
    ok: bool = True
    prompt: str
    answers: dict[str, str]


@app.command()
def chat(
    gguf: Annotated[Path, typer.Argument(help="The GGUF file.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="One turn, then end.", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="A second file to answer beside it.", show_default=False)
    ] = None,
    lora: Annotated[
        Path | None, typer.Option("--lora", help="LoRA-GGUF adapter to put on the base.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 512,
    as_json: Json = False,
) -> None:
    """Talk to a GGUF file, offline. An empty line, /quit or Ctrl-D ends; /new starts again."""
    if as_json and prompt is None:
        raise UsageError("--json needs --prompt.", "ftadvisor chat FILE --prompt TEXT --json")
    files = [gguf, *([compare] if compare else [])]
    sessions = {
        str(file): ChatSession(
            file,
            lora=lora if file == gguf else None,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        for file in files
    }
    if as_json:
        answers = {name: "".join(session.reply(str(prompt))) for name, session in sessions.items()}
        print_json(ChatAnswer(prompt=str(prompt), answers=answers))
        return
    from advisor.ui.talk import talk, turn

    if prompt is None:
        talk(sessions)
    else:
        turn(sessions, prompt)
        print_text("")
