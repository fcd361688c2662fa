"""Keeps what a model computed of a long system prompt, so that the next start need not compute it again.

Goes in: a loaded model and the token ids that every conversation begins with. Comes out: the model with them
evaluated, read from a file or computed and written. Never does: grow without end; trust another model's file.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from pathlib import Path
from typing import Any

from advisor.knowledge import load
from advisor.running import Running


def start_with(
    model: Any, gguf: Path, tokens: list[int], *, running: Running, adapters: str, folder: Path
) -> bool:
    """Evaluate the tokens, or read back what came of them at an earlier start.

    Args:
        model: llama-cpp-python's model, reset.
        gguf: Its file.
        tokens: The beginning that all conversations share.
        running: How the file was loaded.
        adapters: What is on the model, in words.
        folder: Where such files are kept.

    Returns:
        Whether they were read back.
    """
    rules = load().rules["running"]["prompt_cache"]
    if len(tokens) < rules["from_tokens"]:
        return False
    path = folder / f"{_key(gguf, tokens, running, adapters)}.state"
    if path.is_file() and _read(model, path, tokens):
        with contextlib.suppress(OSError):  # a cache that cannot be written is read all the same
            path.touch()
        return True
    model.eval(tokens)
    # Where nothing can be kept, the next start computes it again, and this one goes on.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _write(model, path, tokens)
        for old in sorted(folder.glob("*.state"), key=lambda file: -file.stat().st_mtime)[rules["files"] :]:
            old.unlink(missing_ok=True)
    return False


def _key(gguf: Path, tokens: list[int], running: Running, adapters: str) -> str:
    """Return a name that changes with everything that the numbers depend on."""
    import llama_cpp

    facts = gguf.stat()
    parts = (
        llama_cpp.__version__, str(gguf.resolve()), facts.st_size, facts.st_mtime_ns, running.cache,
        running.flash_attention, adapters, tokens,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _read(model: Any, path: Path, tokens: list[int]) -> bool:
    import llama_cpp

    stored = (llama_cpp.llama_token * len(tokens))()
    count = ctypes.c_size_t(0)
    used = llama_cpp.llama_state_seq_load_file(
        model._ctx.ctx, str(path).encode(), 0, stored, len(tokens), ctypes.byref(count)
    )
    if not used or list(stored[: count.value]) != tokens:
        model.reset()
        model._ctx.kv_cache_clear()
        return False
    model.input_ids[: len(tokens)] = tokens
    model.n_tokens = len(tokens)
    return True


def _write(model: Any, path: Path, tokens: list[int]) -> None:
    """Write the file under a name of its own first: a half one must never be read."""
    import llama_cpp

    aside = path.with_suffix(".part")
    stored = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_state_seq_save_file(model._ctx.ctx, str(aside).encode(), 0, stored, len(tokens)):
        aside.replace(path)
    aside.unlink(missing_ok=True)
