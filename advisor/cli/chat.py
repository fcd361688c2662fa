"""`ftadvisor chat GGUF`: an offline conversation, one turn, or two files side by side."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.chat import ChatSession
from advisor.cli import options
from advisor.cli.output import print_json, print_text
from advisor.errors import UsageError
from advisor.intake import own_cache_dir
from advisor.lora_files import parse_adapter
from advisor.running import CacheType


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `chat --prompt --json`: file -> text."""

    schema: str = "ftadvisor.chat/1"
    ok: bool = True
    prompt: str
    answers: dict[str, str]


@click.command()
@click.argument("gguf", type=options.FILE)
@click.option("--prompt", help="One turn, then end.")
@click.option("--compare", type=options.FILE, help="A second file to answer beside it.")
@click.option(
    "--lora", multiple=True, help="LoRA-GGUF adapter to put on the base; FILE=0.5 at half strength."
)
@click.option("--system", help="System prompt.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer."
)
@options.context
@options.kv_cache
@options.as_json
def chat(
    gguf: Path,
    prompt: str | None,
    compare: Path | None,
    lora: tuple[str, ...],
    system: str | None,
    temperature: float,
    max_tokens: int,
    context: int | None,
    kv_cache: CacheType | None,
    *,
    as_json: bool,
) -> None:
    """Talk to a GGUF file, offline. An empty line, /quit or Ctrl-D ends; /new starts again."""
    if as_json and prompt is None:
        raise UsageError("--json needs --prompt.", "ftadvisor chat FILE --prompt TEXT --json")
    files = [gguf, *([compare] if compare else [])]
    sessions = {
        str(file): ChatSession(
            file,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            context_tokens=context,
            cache=kv_cache,
            prompt_cache=own_cache_dir() / "prompts",
        )
        for file in files
    }
    if lora:
        sessions[str(gguf)].use_adapters(dict(map(parse_adapter, lora)))
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
