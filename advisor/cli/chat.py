"""`ftadvisor chat`: an offline conversation with a GGUF file or with trained folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from advisor.chat import ChatSession
from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.errors import UsageError
from advisor.intake import own_cache_dir
from advisor.lora_files import parse_adapter, short_names
from advisor.running import CacheType

if TYPE_CHECKING:
    from advisor.adapters import AdapterChat
    from advisor.ui.talk import Choices

ALL, BASE = "all", "base"


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `chat --prompt --json`: file -> text."""

    schema: str = "ftadvisor.chat/1"
    ok: bool = True
    prompt: str
    answers: dict[str, str]


@click.command()
@click.argument("targets", type=options.FILE, nargs=-1, required=True)
@click.option("--prompt", help="One turn, then end.")
@click.option("--compare", type=options.FILE, help="A second file to answer beside it.")
@click.option(
    "--lora", multiple=True, help="LoRA-GGUF adapter to put on the base; FILE=0.5 at half strength."
)
@click.option(
    "--prefix",
    type=options.FILE,
    help="Trained prefix for a shared base; the file that a GGUF names is taken anyway.",
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
    targets: tuple[Path, ...],
    prompt: str | None,
    compare: Path | None,
    lora: tuple[str, ...],
    prefix: Path | None,
    system: str | None,
    temperature: float,
    max_tokens: int,
    context: int | None,
    kv_cache: CacheType | None,
    *,
    as_json: bool,
) -> None:
    """Talk to a GGUF file, or to run folders as they were trained, offline.

    Adapters are changed while you talk, without loading the model again: /adapter NAME, and /adapter base for
    none. They are the run folders, or the --lora files of a GGUF, of which /adapter NAME=0.5 takes half and
    /adapter all what was given. An empty line, /quit or Ctrl-D ends; /new starts again.
    """
    if as_json and prompt is None:
        raise UsageError("--json needs --prompt.", "ftadvisor chat FILE --prompt TEXT --json")
    said: dict[str, Any] = {"system": system, "temperature": temperature, "max_tokens": max_tokens}
    if len(targets) > 1 and any(target.is_file() for target in targets):
        raise UsageError(
            "Several run folders talk together, and one GGUF file alone or with a second one.",
            f"For two files: ftadvisor chat {targets[0]} --compare {targets[1]}",
        )
    if prompt is None:
        from advisor.ui.talk import need_terminal

        need_terminal()
    if targets[0].is_dir() or len(targets) > 1:
        if lora or prefix or compare or context or kv_cache:
            raise UsageError(
                "--lora, --prefix, --compare, --context and --kv-cache belong to one GGUF file.",
                "Give several folders to compare them: ftadvisor chat RUN_A RUN_B --prompt TEXT",
            )
        _folders(targets, prompt, said, as_json=as_json)
        return
    gguf = targets[0]
    said |= {"context_tokens": context, "cache": kv_cache, "prompt_cache": own_cache_dir() / "prompts"}
    sessions = {str(gguf): ChatSession(gguf, prefix=prefix, **said)}
    if compare is not None:
        sessions[str(compare)] = ChatSession(compare, **said)
    notify = notifier(quiet=as_json)
    for note in dict.fromkeys(note for session in sessions.values() for note in session.running.notes):
        notify(note)
    adapters = dict(map(parse_adapter, lora))
    if adapters:
        sessions[str(gguf)].use_adapters(adapters)
    if prompt is not None:
        _turn(prompt, sessions, as_json=as_json)
        return
    from advisor.ui.talk import talk

    talk(sessions, _choices(sessions[str(gguf)], adapters), ALL)


def _choices(session: ChatSession, adapters: dict[Path, float]) -> Choices:
    """Return each adapter, all together and none; a strength that is named counts beside those given."""

    def put_on(scales: dict[Path, float], strength: float | None) -> None:
        session.use_adapters(
            {path: scale if strength is None else strength for path, scale in scales.items()}
        )

    alone = {name: partial(put_on, {path: adapters[path]}) for name, path in short_names(adapters).items()}
    return {**alone, ALL: partial(put_on, adapters), BASE: partial(put_on, {})} if adapters else {}


def _turn(prompt: str, sessions: dict[str, ChatSession], *, as_json: bool) -> None:
    """Let every session answer once."""
    if as_json:
        answers = {name: "".join(session.reply(prompt)) for name, session in sessions.items()}
        print_json(ChatAnswer(prompt=prompt, answers=answers))
        return
    from advisor.ui.talk import turn

    turn(sessions, prompt)
    print_text("")


def _folders(targets: tuple[Path, ...], prompt: str | None, said: dict[str, Any], *, as_json: bool) -> None:
    """Talk to trained folders; with a prompt, each answers it from the beginning."""
    from advisor.adapters import AdapterChat, find_voices
    from advisor.run.launch import require_installed
    from advisor.ui.talk import talk, turn

    require_installed(("torch", "transformers", "peft"))
    session = AdapterChat(find_voices(targets, offline=True, on_progress=lambda _: None), **said)
    if prompt is None:
        several = len(session.names) > 1
        choices = {name: partial(_choose, session, name) for name in session.names} if several else {}
        talk({session.chosen: session}, choices, session.chosen)
        return
    answers = {}
    for name in session.voices:
        session.choose(name)
        session.reset()
        if as_json:
            answers[name] = "".join(session.reply(prompt))
        else:
            turn({name: session}, prompt, named=len(session.voices) > 1)
    if as_json:
        print_json(ChatAnswer(prompt=prompt, answers=answers))
    else:
        print_text("")


def _choose(session: AdapterChat, name: str, strength: float | None) -> None:
    if strength is not None:
        raise UsageError(
            "Trained folders answer at the strength they were trained with.",
            "Export the adapter, --to lora-gguf, and put it on with --lora.",
        )
    session.choose(name)
