"""Talks to a GGUF file, offline, as an application on llama.cpp would.

Goes in: a file, what was said. Comes out: the answer, piece by piece. Never does: print; use the network; say
anything on the terminal for llama.cpp.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import unicodedata
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from advisor.errors import InputError, UsageError
from advisor.lora_files import Adapters
from advisor.prefix_state import put_on
from advisor.probe.gguf_file import NORMALISER_KEY
from advisor.prompt_cache import start_with
from advisor.running import CacheType, Said, avoid_amx, plan_running
from advisor.templates import newest_turns

_TOP_K, _TOP_P, _MIN_P = 40, 0.95, 0.05


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
        context_tokens: int | None = None,
        cache: CacheType | None = None,
        prompt_cache: Path | None = None,
        prefix: Path | None = None,
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
            context_tokens: Memory for so many tokens, at most what the model was trained on; None takes the
                usual number, or what fits.
            cache: Type of the key-value cache; None takes 16 bits where they fit.
            prompt_cache: Folder for what was computed of long system prompts.
            prefix: A sequence state to begin with; None takes the one that the file names.
            seed: Of the sampling.

        Raises:
            InputError: the file is missing, no GGUF, cut short, or the adapter or prefix does not fit.
            RefusedError: there is not enough memory for it.
            MissingPackageError: llama-cpp-python is not installed.
        """
        self.running = plan_running(gguf, context_tokens=context_tokens, cache=cache, prefix=prefix)
        self._gguf = gguf
        self._said = Said()
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._system = system
        self._prompt_cache = prompt_cache
        self._model = self._load(seed)
        # Freed before Python takes its modules apart: llama-cpp-python complains on the terminal afterwards.
        self._close = weakref.finalize(self, self._model.close)
        self.context_tokens = self.running.context_tokens
        self._virtual: list[int] = []
        if self.running.prefix is not None:
            self._virtual = put_on(self._model, Path(self.running.prefix), self._said)
        self._adapters = Adapters(self._model, self._said)
        self._on = ""
        self._started = False
        if lora is not None:
            self.use_adapters({lora: lora_scale})
        self._render = _formatter(self._model)
        self._normaliser = self._model.metadata.get(NORMALISER_KEY)
        self.messages: list[dict[str, str]] = []
        self.reused_prompt = False
        """Whether a long system prompt was read back instead of computed."""
        self.reset()

    def use_adapters(self, scales: dict[Path, float]) -> None:
        """Put these adapters on the model, and only these, without loading the model again.

        Args:
            scales: LoRA-GGUF -> strength; 1 is as trained. Empty: the base alone.

        Raises:
            InputError: one is no LoRA-GGUF, or belongs to another model; those before stay on.
            ExportError: llama.cpp does not take them together.
            UsageError: there is a trained prefix, whose keys belong to the base alone.
        """
        if self._virtual:
            raise UsageError(
                "A trained prefix belongs to the base alone; a LoRA beside it was never trained.",
                "Use one of them.",
            )
        self._adapters.use(scales)
        self._on = repr(sorted((str(path.resolve()), scale) for path, scale in scales.items()))
        self._started = False

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
        self._start(tokens)
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
        self.messages, ids = newest_turns([*self.messages, message], self._tokens, room=room)
        return ids

    def _tokens(self, turns: list[dict[str, str]]) -> list[int]:
        if self._render is None:
            found: list[int] = self._model.tokenize(turns[-1]["content"].encode())
            return self._virtual + found
        try:
            prompt = self._render(messages=turns).prompt
        except (ValueError, jinja2.TemplateError) as problem:
            raise InputError(
                f"The chat template refuses this conversation: {problem}", "Start again, without --system."
            ) from problem
        rendered: list[int] = self._model.tokenize(prompt.encode(), add_bos=False, special=True)
        return self._virtual + rendered

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

    def _start(self, tokens: list[int]) -> None:
        """Take what was computed of a long system prompt from an earlier start."""
        if self._started or self._prompt_cache is None or self._system is None or self._virtual:
            return
        self._started = True
        other = self._tokens([{"role": "system", "content": self._system}, {"role": "user", "content": ""}])
        pairs = zip(tokens, other, strict=False)
        shared = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        self.reused_prompt = start_with(
            self._model,
            self._gguf,
            shared,
            running=self.running,
            adapters=self._on,
            folder=self._prompt_cache,
        )

    def _load(self, seed: int) -> Any:
        import llama_cpp

        avoid_amx()
        how = self.running
        kind = getattr(llama_cpp, f"GGML_TYPE_{how.cache.upper()}")
        try:
            return llama_cpp.Llama(
                str(self._gguf),
                n_ctx=how.context_tokens,
                n_gpu_layers=how.gpu_layers,
                n_threads=how.threads,
                n_threads_batch=how.threads,
                type_k=kind,
                type_v=kind,
                flash_attn=how.flash_attention,
                seed=seed,
                verbose=False,
            )
        except (ValueError, RuntimeError, MemoryError) as problem:
            raise InputError(
                f"llama.cpp cannot load {self._gguf}: {self._said.reason() or problem}",
                "The file may be cut short: copy it again, or check it with ftadvisor verify.",
            ) from problem


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
