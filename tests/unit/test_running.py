"""How a file is run: context, cache type, flash attention and layers by the memory that is free."""

from __future__ import annotations

import subprocess
import sys

import pytest

from advisor.errors import RefusedError
from advisor.knowledge import load
from advisor.running import CacheType, FileFacts, Memory, Running, decide

GIB = 1 << 30
EIGHT = FileFacts(
    architecture="llama", file_bytes=5 * GIB, layers=32, cache_width=2 * 8 * 128, trained_tokens=131072
)


def _decide(
    ram_gib: float,
    gpu_gib: float | None = None,
    *,
    tokens: int | None = None,
    cache: CacheType | None = None,
) -> Running:
    free = Memory(
        ram_bytes=int(ram_gib * GIB), gpu_bytes=None if gpu_gib is None else int(gpu_gib * GIB)
    )  # fmt: skip
    return decide(EIGHT, free, context_tokens=tokens, cache=cache, threads=4, knowledge=load())


def test_enough_memory_takes_the_usual_context_in_16_bits() -> None:
    """Nothing is squeezed where nothing needs to be."""
    found = _decide(16)
    assert (found.context_tokens, found.cache, found.flash_attention) == (4096, "f16", False)
    assert (found.gpu_layers, found.notes) == (0, ())


def test_tight_memory_takes_eight_bits_and_then_fewer_tokens() -> None:
    """Eight bits come with flash attention, without which llama.cpp makes no context; both are said."""
    eight = _decide(5.25 + 0.35)
    assert (eight.context_tokens, eight.cache, eight.flash_attention) == (4096, "q8_0", True)
    assert "eight bits" in eight.notes[0]
    fewer = _decide(5.25 + 0.1)
    assert fewer.cache == "q8_0"
    assert 256 <= fewer.context_tokens < 4096
    assert "instead of 4096" in fewer.notes[0]


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    """A context that was asked for is never shortened in silence."""
    with pytest.raises(RefusedError, match="131072 tokens") as caught:
        _decide(16, tokens=131072, cache="f16")
    assert "--context" in caught.value.remedy
    with pytest.raises(RefusedError) as caught:
        _decide(4)
    assert "quantisation" in caught.value.remedy


def test_layers_go_to_the_gpu_as_far_as_they_fit() -> None:
    """All of them, or as many as there is room for; the rest stays on the processor."""
    assert _decide(32, 24).gpu_layers == -1
    some = _decide(32, 4)
    assert 0 < some.gpu_layers < 32
    assert some.flash_attention
    assert _decide(32, 0.4).gpu_layers == 0


def test_more_tokens_than_were_trained_are_not_set_aside() -> None:
    """Beyond its training a model only babbles."""
    found = _decide(64, tokens=200_000)
    assert found.context_tokens == 131072
    assert "trained on 131072" in found.notes[0]


IN_A_CALL = """
import ctypes, signal, time
from advisor.running import Said
said = Said()
called = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))
try:
    called()
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_llama_cpp_calls_is_not_lost() -> None:
    """Python drops what is raised in a function that C calls; it is raised again right after."""
    pytest.importorskip("llama_cpp")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALL], capture_output=True, text=True, check=False, timeout=15
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
