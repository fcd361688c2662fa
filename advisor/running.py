"""How will a GGUF file run on this machine: context, key-value cache, flash attention, layers on the GPU?

Goes in: the file, what was asked for, free memory. Comes out: `Running`. Never does: load the weights; choose
cache types that llama.cpp computes slowly or not at all.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import msgspec

from advisor.errors import InputError, MissingPackageError, RefusedError, UsageError
from advisor.knowledge import Knowledge, load
from advisor.probe.gguf_file import PREFIX_KEY, PREFIX_SHA256_KEY, check_gguf
from advisor.probe.hardware import probe_hardware
from advisor.probe.host import memory
from advisor.probe.load import free_cores
from advisor.storage import file_sha256
from advisor.types import Record
from advisor.units import format_bytes, from_gib

CacheType = Literal["f32", "f16", "q8_0"]
CACHE_TYPES: tuple[CacheType, ...] = ("f16", "q8_0")
"""Those to choose from; 32 bits are for a trained prefix, which llama.cpp loads into no other cache."""
_SMALLER = "Close other programs, or export a smaller quantisation: --quant Q4_K_M"


class FileFacts(Record, frozen=True, kw_only=True):
    """What a file says about the model in it."""

    architecture: str
    file_bytes: int
    layers: int
    cache_width: int
    """Numbers in the key-value cache for one token and layer."""
    trained_tokens: int
    prefix: str = ""
    """File name of the trained prefix that belongs to it."""
    prefix_sha256: str = ""


class Memory(Record, frozen=True, kw_only=True):
    """What is free, in bytes."""

    ram_bytes: int
    gpu_bytes: int | None = None
    """None: llama.cpp was built without a GPU, or there is none."""


class Running(Record, frozen=True, kw_only=True):
    """How the file is loaded."""

    context_tokens: int
    cache: CacheType
    flash_attention: bool
    gpu_layers: int
    """-1: all."""
    threads: int
    prefix: str | None = None
    """Sequence state to begin with."""
    notes: tuple[str, ...] = ()


def plan_running(
    gguf: Path, *, context_tokens: int | None, cache: CacheType | None, prefix: Path | None = None
) -> Running:
    """Look at file and machine and decide how the file is run.

    Args:
        gguf: The file.
        context_tokens: Memory for so many tokens; None takes the usual number, or what fits.
        cache: Type of the key-value cache; None takes 16 bits where they fit.
        prefix: Sequence state to begin with; None takes the one that the file names.

    Raises:
        InputError: the file is missing, no GGUF, or damaged, or the prefix that it names is not beside it.
        RefusedError: it does not fit into the memory.
        MissingPackageError: llama-cpp-python is not installed.
    """
    facts = read_facts(gguf)
    state = prefix or named_prefix(gguf, facts)
    if state is not None and cache not in (None, "f32"):
        raise UsageError(
            f"A trained prefix is kept in 32 bits; the key-value cache cannot be {cache}.",
            "Leave --kv-cache out.",
        )
    made = decide(
        facts, _free_memory(), context_tokens=context_tokens, cache="f32" if state else cache,
        threads=free_cores(), knowledge=load(),
    )  # fmt: skip
    return made if state is None else msgspec.structs.replace(made, prefix=str(state))


def named_prefix(gguf: Path, facts: FileFacts) -> Path | None:
    """Return the trained prefix that a file names.

    Raises:
        InputError: it is not beside the file, or is another one.
    """
    if not facts.prefix:
        return None
    # A name, never a path that leads elsewhere: files come from anyone.
    path = gguf.parent / Path(facts.prefix).name
    remedy = "Copy the two files of one export into one folder."
    if not path.is_file():
        raise InputError(
            f"{gguf} belongs with the trained prefix {path.name}, which is not beside it.", remedy
        )
    if file_sha256(path) != facts.prefix_sha256:
        raise InputError(f"{path} is not the trained prefix that {gguf.name} was exported with.", remedy)
    return path


def decide(
    facts: FileFacts,
    free: Memory,
    *,
    context_tokens: int | None,
    cache: CacheType | None,
    threads: int,
    knowledge: Knowledge,
) -> Running:
    """Decide how a file is run, given what is free.

    Raises:
        RefusedError: it does not fit, with the figures.
    """
    rules = knowledge.rules["running"]
    asked = context_tokens or min(rules["context"]["usual"], facts.trained_tokens)
    notes = []
    if asked > facts.trained_tokens:
        notes.append(f"the model was trained on {facts.trained_tokens} tokens; more are not set aside")
        asked = facts.trained_tokens
    tokens, kind = _fitting(facts, free, asked, cache, knowledge, exact=context_tokens is not None)
    if tokens < asked:
        notes.append(f"memory is set aside for {tokens} tokens instead of {asked}")
    if kind == "q8_0" and cache is None:
        notes.append("the key-value cache is kept in eight bits, so that it fits")
    layers = _gpu_layers(facts, free, tokens, kind, knowledge)
    if layers > 0:
        notes.append(f"{layers} of {facts.layers} layers fit on the GPU")
    flash = kind == "q8_0" or (kind == "f16" and layers != 0)
    return Running(
        context_tokens=tokens, cache=kind, flash_attention=flash, gpu_layers=layers, threads=threads,
        notes=tuple(notes),
    )  # fmt: skip


def _fitting(
    facts: FileFacts,
    free: Memory,
    asked: int,
    cache: CacheType | None,
    knowledge: Knowledge,
    *,
    exact: bool,
) -> tuple[int, CacheType]:
    """Return tokens and type of the cache that the memory holds; 16 bits before fewer tokens."""
    rules = knowledge.rules["running"]
    most = max(free.ram_bytes, free.gpu_bytes or 0)
    room = most - facts.file_bytes - (rules["memory"]["scratch_mib"] << 20)
    kinds = CACHE_TYPES if cache is None else (cache,)
    for kind in kinds:
        if asked * _token_bytes(facts, kind, knowledge) <= room:
            return asked, kind
    step, least = rules["context"]["step"], rules["context"]["least"]
    tokens = int(room / _token_bytes(facts, kinds[-1], knowledge)) // step * step if room > 0 else 0
    if exact or tokens < min(least, asked):
        needed = most - room + int(asked * _token_bytes(facts, kinds[-1], knowledge))
        raise RefusedError(
            f"The file with {asked} tokens of context needs about {format_bytes(needed)} of memory; "
            f"{format_bytes(most)} is free.",
            f"Ask for fewer tokens: --context {tokens}" if tokens >= least else _SMALLER,
        )
    return tokens, kinds[-1]


def _token_bytes(facts: FileFacts, kind: CacheType, knowledge: Knowledge) -> float:
    bytes_each: float = knowledge.rules["running"]["cache_bytes"][kind]
    return facts.layers * facts.cache_width * bytes_each


def _gpu_layers(facts: FileFacts, free: Memory, tokens: int, kind: CacheType, knowledge: Knowledge) -> int:
    """Return how many layers go to the GPU: all where everything fits, else as many as fit."""
    if free.gpu_bytes is None:
        return 0
    room = free.gpu_bytes - from_gib(knowledge.rules["running"]["memory"]["gpu_gib"])
    cache = tokens * _token_bytes(facts, kind, knowledge)
    if facts.file_bytes + cache <= room:
        return -1
    # Each layer takes its share of the weights and of the cache along.
    return max(0, int(room / ((facts.file_bytes + cache) / facts.layers)))


def _free_memory() -> Memory:
    import llama_cpp

    _, free = memory(Path("/proc"), Path("/sys"))
    if not llama_cpp.llama_supports_gpu_offload():
        return Memory(ram_bytes=free)
    found = probe_hardware(output=Path.cwd(), cache=Path.cwd()).accelerators
    return Memory(ram_bytes=free, gpu_bytes=max((one.free_bytes for one in found), default=None))


def read_facts(gguf: Path) -> FileFacts:
    """Read what a file says about its model; llama.cpp reads it, without the weights.

    Raises:
        InputError: the file is missing, no GGUF, or damaged.
        MissingPackageError: llama-cpp-python is not installed.
    """
    check_gguf(gguf)
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingPackageError("llama-cpp-python", "gguf")
    import llama_cpp

    said = Said()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        reason = said.reason() or "it does not say why"
        if _NO_VOCABULARY in reason:
            raise InputError(
                f"{gguf} holds no whole model: it is an adapter, or a part of one.",
                f"Put an adapter on its base: ftadvisor chat BASE.gguf --lora {gguf}",
            )
        raise InputError(
            f"llama.cpp cannot load {gguf}: {reason}",
            "The file may be cut short: copy it again, or check it with ftadvisor verify.",
        )
    try:
        return _facts(model, gguf.stat().st_size)
    finally:
        llama_cpp.llama_model_free(model)


def _facts(model: object, file_bytes: int) -> FileFacts:
    architecture = _value(model, "general.architecture")

    def number(key: str, otherwise: int) -> int:
        text = _value(model, f"{architecture}.{key}")
        return int(text) if text.isdigit() else otherwise

    heads = number("attention.head_count", 1)
    usual = number("embedding_length", 1) // heads
    width = number("attention.key_length", usual) + number("attention.value_length", usual)
    return FileFacts(
        architecture=architecture, file_bytes=file_bytes, layers=number("block_count", 1),
        cache_width=number("attention.head_count_kv", heads) * width,
        trained_tokens=number("context_length", load().rules["running"]["context"]["usual"]),
        prefix=_value(model, PREFIX_KEY), prefix_sha256=_value(model, PREFIX_SHA256_KEY),
    )  # fmt: skip


def _value(model: object, key: str) -> str:
    import llama_cpp

    room = ctypes.create_string_buffer(256)
    found = llama_cpp.llama_model_meta_val_str(model, key.encode(), room, len(room))
    return room.value.decode(errors="replace") if found >= 0 else ""


def avoid_amx() -> None:
    """Let models that are loaded from now on do without AMX where llama.cpp was compiled for it.

    gcc up to 12 throws away most of the tile configuration that llama.cpp prepares: its intrinsic names
    eight bytes of it as read. The first product with an 8-bit or K-quant matrix then ends the process.
    llama-cpp-python has no argument for the buffers in which llama.cpp lays out weights for AMX.
    """
    from llama_cpp import llama_cpp as library

    usual = library.llama_model_default_params
    if b"AMX_INT8 = 1" not in library.llama_print_system_info() or usual.__name__ == _WITHOUT_AMX:
        return

    def plain() -> Any:
        params = usual()
        params.use_extra_bufts = False
        return params

    plain.__name__ = _WITHOUT_AMX
    library.llama_model_default_params = plain


_NO_VOCABULARY = "key not found in model: tokenizer.ggml.model"
"""llama.cpp's words for a file that holds no tokenizer."""
_WITHOUT_AMX = "llama_model_default_params_without_amx"


class Said:
    """Keeps the last errors that llama.cpp reports instead of printing them."""

    def __init__(self) -> None:
        import llama_cpp

        self._lines: list[str] = []
        sys.unraisablehook = _raise_later
        self.callback = llama_cpp.llama_log_callback(self._hear)
        _HEARD.append(self.callback)
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _hear(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == _ERROR_LEVEL:
            self._lines = [*self._lines, text.decode(errors="replace").strip()][-_KEPT_LINES:]

    def reason(self) -> str:
        """Return the first error in a few words."""
        return next((line.split(": ", 1)[-1] for line in self._lines if line), "")


def _raise_later(found: sys.UnraisableHookArgs) -> None:
    """Raise a Ctrl-C again that came while llama.cpp was calling, where Python can only drop it."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        again = threading.Timer(_LATER_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True  # a program that ends meanwhile needs none
        again.start()
    else:
        sys.__unraisablehook__(found)


_LATER_SECONDS = 0.05
_HEARD: list[object] = []
"""llama.cpp calls the last callback it was given for as long as the process lives, so none may be freed."""
_KEPT_LINES = 8
_ERROR_LEVEL = 4
"""ggml's GGML_LOG_LEVEL_ERROR."""
