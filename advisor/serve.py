"""Offers a GGUF file to programs that speak OpenAI's interface, on this machine alone.

Goes in: a file, how it runs, a port. Comes out: llama-cpp-python's own server, until it is stopped. Never
does: listen beyond loopback; answer a web page of another site; print what is said.
"""

from __future__ import annotations

import importlib.util
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advisor.errors import InputError, MissingPackageError, RefusedError, UsageError
from advisor.lora_files import Adapters
from advisor.probe.gguf_file import NORMALISER_KEY
from advisor.running import Running, Said, avoid_amx

HOST = "127.0.0.1"
_NAMES = [HOST, "localhost", "[::1]", "testserver"]


def serve(
    gguf: Path,
    *,
    running: Running,
    port: int,
    adapters: dict[Path, float],
    api_key: str | None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve a file until SIGINT or SIGTERM.

    Args:
        gguf: The file.
        running: How it is loaded.
        port: 0 takes any free one.
        adapters: LoRA-GGUF -> strength.
        api_key: Which a caller must send; None: any or none.
        on_ready: Told the address, ending in /v1, once the model is loaded.

    Raises:
        InputError: llama.cpp cannot load the file or an adapter.
        UsageError: the port is taken.
        RefusedError: the file belongs with a trained prefix.
        MissingPackageError: the extra `serve` is not installed.
    """
    if running.prefix is not None:
        raise RefusedError(
            f"{gguf.name} belongs with a trained prefix, which llama-cpp-python's server does not load: "
            "it would answer as before the training.",
            f"Talk to it with: ftadvisor chat {gguf}; to serve, train with lora instead.",
        )
    for module in ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(module, "serve")
    import uvicorn

    with _listen(port) as listening:
        app, model = _app(gguf, running, adapters, api_key)
        try:
            on_ready(f"http://{HOST}:{listening.getsockname()[1]}/v1")
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            server.run(sockets=[listening])
        finally:
            # llama.cpp must not be freed after Python has freed what it reports to.
            model.close()


def _listen(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except OSError as problem:
        found.close()
        raise UsageError(
            f"Port {port} cannot be used: {problem.strerror or problem}.",
            "Name another one: --port 8081; 0 takes any that is free.",
        ) from problem
    return found


def _app(gguf: Path, running: Running, adapters: dict[Path, float], api_key: str | None) -> tuple[Any, Any]:
    """Return the server's application, and the model that it loaded."""
    import llama_cpp
    from fastapi.middleware.cors import CORSMiddleware
    from llama_cpp.server import app as server
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    avoid_amx()
    said = Said()
    kind = getattr(llama_cpp, f"GGML_TYPE_{running.cache.upper()}")
    model = ModelSettings(
        model=str(gguf), model_alias=gguf.stem, n_ctx=running.context_tokens,
        n_gpu_layers=running.gpu_layers, n_threads=running.threads, n_threads_batch=running.threads,
        type_k=kind, type_v=kind, flash_attn=running.flash_attention, logits_all=False, use_mlock=False,
        verbose=False,
    )  # fmt: skip
    settings = ServerSettings(api_key=api_key, interrupt_requests=False)
    try:
        app = server.create_app(server_settings=settings, model_settings=[model])
    except (ValueError, RuntimeError, MemoryError) as problem:
        raise InputError(
            f"llama.cpp cannot load {gguf}: {said.reason() or problem}",
            "The file may be cut short: copy it again, or check it with ftadvisor verify.",
        ) from problem
    # The library lets any web page that is open in a browser ask; nobody needs that here.
    app.user_middleware = [one for one in app.user_middleware if one.cls is not CORSMiddleware]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)
    loaded = server._llama_proxy(None)
    if adapters:
        Adapters(loaded, said).use(adapters)
    if loaded.metadata.get(NORMALISER_KEY) == "NFC":
        _compose(loaded)
    return app, loaded


def _compose(model: Any) -> None:
    """Compose accents in what is said before the model sees it, as its trained tokenizer does."""
    from llama_cpp.llama_chat_format import get_chat_completion_handler

    inner = model._chat_handlers.get(model.chat_format) or get_chat_completion_handler(model.chat_format)

    def handler(*, messages: list[dict[str, Any]], **more: Any) -> Any:
        composed = [
            {
                key: unicodedata.normalize("NFC", text) if isinstance(text, str) else text
                for key, text in m.items()
            }
            for m in messages
        ]
        return inner(messages=composed, **more)

    model.chat_handler = handler
