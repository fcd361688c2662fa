"""`ftadvisor serve GGUF`: an OpenAI-compatible server on this machine alone."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from advisor.cli import options
from advisor.cli.output import notifier, print_json, print_text
from advisor.lora_files import parse_adapter
from advisor.running import CacheType, Running, plan_running
from advisor.serve import serve as serve_file


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What `serve --json` prints once the model is loaded."""

    schema: str = "ftadvisor.serve/1"
    ok: bool = True
    url: str
    model: str
    running: Running


@click.command()
@click.argument("gguf", type=options.FILE)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free.")
@click.option(
    "--lora", multiple=True, help="LoRA-GGUF adapter to put on the base; FILE=0.5 at half strength."
)
@click.option("--api-key", envvar="FTADVISOR_API_KEY", help="Callers must send this key.")
@options.context
@options.kv_cache
@options.as_json
def serve(
    gguf: Path,
    port: int,
    lora: tuple[str, ...],
    api_key: str | None,
    context: int | None,
    kv_cache: CacheType | None,
    *,
    as_json: bool,
) -> None:
    """Answer programs that speak OpenAI's interface, on this machine alone; Ctrl-C ends."""
    running = plan_running(gguf, context_tokens=context, cache=kv_cache)
    notify = notifier(quiet=as_json)
    for note in running.notes:
        notify(note)

    def ready(url: str) -> None:
        if as_json:
            print_json(Serving(url=url, model=gguf.stem, running=running))
        else:
            print_text(
                f"{gguf.stem} answers at {url} ({running.context_tokens} tokens of context). Ctrl-C ends."
            )

    serve_file(
        gguf,
        running=running,
        port=port,
        adapters=dict(map(parse_adapter, lora)),
        api_key=api_key,
        on_ready=ready,
    )
