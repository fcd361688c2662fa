"""Talks to a GGUF file, offline, as an application on llama.cpp would.

Goes in: a file, what was said. Comes out: the answer, piece by piece. Never does: print; use the network; say
anything on the terminal for llama.cpp.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import importlib.util
import unicodedata
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from advisor.errors import ExportError, InputError, MissingPackageError, RefusedError
from advisor.probe.gguf_file import NORMALISER_KEY, check_gguf
from advisor.probe.host import memory
from advisor.probe.load import free_cores
from advisor.units import format_bytes

CONTEXT_TOKENS = 4096
"""Memory is set aside for so many tokens at most; a model trained on less uses less."""
_TOP_K, _TOP_P, _MIN_P = 40, 0.95, 0.05
_SCRATCH_BYTES = 256 << 20
_KEPT_LINES = 8
_ERROR_LEVEL = 4
"""ggml's GGML_LOG_LEVEL_ERROR."""


class ChatSession:
    """One conversation with one file; keeps what was said."""

    def __init__(
        self,
        gguf: Path,
        *,
        lora: Path | None = None,
        lora_scale: float = 1.0,
        system: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        context_tokens: int = CONTEXT_TOKENS,
        seed: int = 0,
    ) -> None:
        """Load the file.

        Args:
            gguf: The model.
            lora: A LoRA-GGUF to put on it.
            lora_scale: 1 is as trained, 0 is the base alone.
            system: Said before the conversation, where the template has a place for it.
            temperature: 0 takes the likeliest token each time.
            max_tokens: Longest answer.
            context_tokens: Memory for so many tokens, at most what the model was trained on.
            seed: Of the sampling.

        Raises:
            InputError: the file is missing, no GGUF, cut short, or the adapter does not fit.
            RefusedError: there is not enough memory for it.
            MissingPackageError: llama-cpp-python is not installed.
        """
        check_gguf(gguf)
        if importlib.util.find_spec("llama_cpp") is None:
            raise MissingPackageError("llama-cpp-python", "gguf")
        _check_memory(gguf)
        self._said = _Said()
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._system = system
        self._model = self._load(gguf, context_tokens, seed)
        # Freed before Python takes its modules apart: llama-cpp-python complains on the terminal afterwards.
        self._close = weakref.finalize(self, self._model.close)
        self.context_tokens = min(context_tokens, self._model._model.n_ctx_train())
        self._adapters: dict[Path, Any] = {}
        if lora is not None:
            self.use_adapters({lora: lora_scale})
        self._render = _formatter(self._model)
        self._normaliser = self._model.metadata.get(NORMALISER_KEY)
        self.messages: list[dict[str, str]] = []
        self.reset()

    def use_adapters(self, scales: dict[Path, float]) -> None:
        """Put these adapters on the model, and only these, without loading the model again.

        Args:
            scales: LoRA-GGUF -> strength; 1 is as trained. Empty: the base alone.

        Raises:
            InputError: one is no LoRA-GGUF, or belongs to another model; those before stay on.
            ExportError: llama.cpp does not take them together.
        """
        import llama_cpp

        for path in scales:
            if path not in self._adapters:
                self._adapters[path] = self._read_adapter(path)
        count = len(scales)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(self._adapters[p] for p in scales))
        strengths = (ctypes.c_float * count)(*scales.values())
        if llama_cpp.llama_set_adapters_lora(self._model._ctx.ctx, adapters, count, strengths):
            names = ", ".join(path.name for path in scales)
            raise ExportError(f"llama.cpp does not put {names} on the model.", "Export it merged: --to gguf")
        # What was computed with other adapters must not be taken for the same text's beginning.
        self._model.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def close(self) -> None:
        """Free the memory."""
        self._close()

    def reply(self, text: str) -> Iterator[str]:
        """Say something and yield the answer as it is generated; both are remembered.

        Raises:
            InputError: the text does not fit into the context, or the template refuses it.
        """
        asked = unicodedata.normalize("NFC", text) if self._normaliser == "NFC" else text
        tokens = self._prompt({"role": "user", "content": asked})
        pieces: list[str] = []
        try:
            for piece in self._generate(tokens):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self, message: dict[str, str]) -> list[int]:
        """Return the token ids of the conversation; the oldest turns make room, the system prompt stays."""
        room = self.context_tokens - min(self._max_tokens, self.context_tokens // 4)
        kept = 1 if self._system is not None else 0
        turns = [*self.messages, message]
        while len(tokens := self._tokens(turns)) > room:
            if len(turns) <= kept + 1:
                raise InputError(
                    f"The text has {len(tokens)} tokens; this model has room for {room} beside its answer.",
                    "Shorten it.",
                )
            del turns[kept : kept + 2]
        self.messages = turns
        return tokens

    def _tokens(self, turns: list[dict[str, str]]) -> list[int]:
        if self._render is None:
            found: list[int] = self._model.tokenize(turns[-1]["content"].encode())
            return found
        try:
            prompt = self._render(messages=turns).prompt
        except (ValueError, jinja2.TemplateError) as problem:
            raise InputError(
                f"The chat template refuses this conversation: {problem}", "Start again, without --system."
            ) from problem
        rendered: list[int] = self._model.tokenize(prompt.encode(), add_bos=False, special=True)
        return rendered

    def _generate(self, tokens: list[int]) -> Iterator[str]:
        import llama_cpp

        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        vocab = self._model._model.vocab
        left = min(self._max_tokens, self.context_tokens - len(tokens))
        made: list[int] = []
        stream = self._model.generate(
            tokens, temp=self._temperature, top_k=_TOP_K, top_p=_TOP_P, min_p=_MIN_P, repeat_penalty=1.0
        )
        with contextlib.closing(stream):
            for token in stream:
                if llama_cpp.llama_vocab_is_eog(vocab, token):
                    break
                data = self._model.detokenize([token], prev_tokens=tokens + made)
                made.append(token)
                if piece := decoder.decode(data):
                    yield piece
                if len(made) >= left:
                    break
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _load(self, gguf: Path, context_tokens: int, seed: int) -> Any:
        import llama_cpp

        llama_cpp.llama_log_set(self._said.callback, ctypes.c_void_p(0))
        threads = free_cores()
        try:
            return llama_cpp.Llama(
                str(gguf),
                n_ctx=context_tokens,
                n_threads=threads,
                n_threads_batch=threads,
                seed=seed,
                verbose=False,
            )
        except (ValueError, RuntimeError, MemoryError) as problem:
            raise InputError(
                f"llama.cpp cannot load {gguf}: {self._said.reason() or problem}",
                "The file may be cut short: copy it again, or check it with ftadvisor verify.",
            ) from problem

    def _read_adapter(self, lora: Path) -> Any:
        """Load an adapter beside the model.

        Raises:
            InputError: it is no LoRA-GGUF, or belongs to another model.
        """
        import llama_cpp

        _check_adapter(lora, self._model.metadata.get("general.architecture", ""))
        adapter = llama_cpp.llama_adapter_lora_init(self._model._model.model, str(lora).encode())
        if not adapter:
            raise InputError(
                f"llama.cpp does not take the adapter {lora}: {self._said.reason() or 'it does not fit'}",
                "Put it on the base model that it was trained on.",
            )
        return adapter


def answer_once(gguf: Path, prompt: str, *, system: str | None = None, max_tokens: int = 512) -> str:
    """Return one greedy answer to one question; errors as `ChatSession`."""
    session = ChatSession(gguf, system=system, max_tokens=max_tokens)
    try:
        return "".join(session.reply(prompt))
    finally:
        session.close()


def compare(first: Path, second: Path, prompt: str, *, max_tokens: int = 512) -> tuple[str, str]:
    """Return the greedy answers of two files to the same question; errors as `ChatSession`."""
    return answer_once(first, prompt, max_tokens=max_tokens), answer_once(
        second, prompt, max_tokens=max_tokens
    )


class _Said:
    """Keeps the last errors that llama.cpp reports instead of printing them."""

    def __init__(self) -> None:
        import llama_cpp

        self._lines: list[str] = []
        self.callback = llama_cpp.llama_log_callback(self._hear)
        _HEARD.append(self.callback)

    def _hear(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == _ERROR_LEVEL:
            self._lines = [*self._lines, text.decode(errors="replace").strip()][-_KEPT_LINES:]

    def reason(self) -> str:
        """Return the first error in a few words."""
        return next((line.split(": ", 1)[-1] for line in self._lines if line), "")


_HEARD: list[Any] = []
"""llama.cpp calls the last callback it was given for as long as the process lives, so none may be freed."""


def _check_memory(gguf: Path) -> None:
    _, free = memory(Path("/proc"), Path("/sys"))
    needed = gguf.stat().st_size + _SCRATCH_BYTES
    if needed > free:
        raise RefusedError(
            f"{gguf.name} needs about {format_bytes(needed)} of memory; {format_bytes(free)} is free.",
            "Close other programs, or export a smaller quantisation: --quant Q4_K_M",
        )


def _check_adapter(lora: Path, architecture: str) -> None:
    """Refuse what makes llama.cpp crash."""
    import gguf

    check_gguf(lora)
    remedy = "Make one with: ftadvisor export RUN_DIR --to lora-gguf"
    try:
        reader = gguf.GGUFReader(lora)
    except (ValueError, IndexError, KeyError) as problem:
        raise InputError(f"{lora} is cut short or damaged.", remedy) from problem
    fields = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("general", "adapter"))
    }
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise InputError(f"{lora} is a GGUF file, but no LoRA adapter.", remedy)
    if fields.get("general.architecture") != architecture:
        raise InputError(
            f"The adapter {lora} is for {fields.get('general.architecture')}, the model is {architecture}.",
            "Put it on the base model that it was trained on.",
        )
    if any(tensor.name.startswith("token_embd.") for tensor in reader.tensors):
        raise InputError(
            f"The adapter {lora} changes the embedding, on which llama.cpp aborts.", "Export it merged."
        )


def _formatter(model: Any) -> Any:
    """Return what renders the embedded template, or None where there is none."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    eos, bos = model.token_eos(), model.token_bos()
    return Jinja2ChatFormatter(
        template=template,
        eos_token=model._model.token_get_text(eos) if eos != -1 else "",
        bos_token=model._model.token_get_text(bos) if bos != -1 else "",
    )
