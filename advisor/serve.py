"""Offers a GGUF file to programs that speak OpenAI's interface, on this machine alone.

Goes in: a file, how it runs, a port. Comes out: llama-cpp-python's own server, until it is stopped. Never
does: listen beyond loopback; answer a web page of another site; print what is said.
"""

from __future__ import annotations

import importlib.util
import json
import os
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
_PAGES = {"/docs", "/redoc"}
"""The library's pages for browsers, which load scripts from elsewhere."""
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
    os.environ.pop("CONFIG_FILE", None)  # of another program: the library would serve what it names
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
    loaded = server._llama_proxy(None)
    if adapters:
        Adapters(loaded, said).use(adapters)
    app.add_middleware(_Requests, compose=loaded.metadata.get(NORMALISER_KEY) == "NFC")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)
    return app, loaded


class _Requests:
    """Reads what a client sends before the library does, which knows text in one piece alone and answers
    anything else with status 500 and a traceback on the terminal."""

    def __init__(self, app: Any, *, compose: bool) -> None:
        self._app = app
        self._compose = compose

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response

        if scope["type"] == "http" and scope["path"] in _PAGES:
            await Response(status_code=404)(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            sent = _understood(await Request(scope, receive).body(), scope["path"], compose=self._compose)
        except ValueError as problem:
            told = {"message": str(problem), "type": "invalid_request_error", "param": None, "code": None}
            await JSONResponse({"error": told}, status_code=400)(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        parts = [{"type": "http.request", "body": sent, "more_body": False}]

        async def again() -> Any:
            return parts.pop() if parts else await receive()

        await self._app(
            {**scope, "headers": [*headers, (b"content-length", str(len(sent)).encode())]}, again, send
        )


def _understood(body: bytes, path: str, *, compose: bool) -> bytes:
    """Return a request as the library takes it: texts in one piece, accents composed where the trained
    tokenizer does so.

    Raises:
        ValueError: it is none, with what is wrong in it.
    """
    from llama_cpp.server import types
    from pydantic import ValidationError

    kinds = {
        "/v1/chat/completions": types.CreateChatCompletionRequest,
        "/v1/completions": types.CreateCompletionRequest,
    }
    try:
        asked = json.loads(body)
    except ValueError:
        raise ValueError("The request is no JSON.") from None
    if path not in kinds or not isinstance(asked, dict):
        return body
    messages = asked.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            text = _in_one_piece(message.get("content"))
            composed = compose and isinstance(text, str)
            message["content"] = unicodedata.normalize("NFC", text) if composed else text
    try:
        kinds[path].model_validate(asked)
    except ValidationError as problem:
        first = problem.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    return json.dumps(asked).encode()


def _in_one_piece(content: Any) -> Any:
    """Join text that a client sends in parts, as OpenAI's interface allows."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
    if wrong := [kind for kind in kinds if kind != "text"]:
        raise ValueError(f"This model reads text alone; the message has a part of type {wrong[0]!r}.")
    return "".join(str(part.get("text", "")) for part in content)
