"""How fast does this device multiply matrices and copy memory, at this moment?

    python -P -m advisor.train.bench SECONDS

Goes in: how long it may take. Comes out: a JSON line, a MatrixBench. Never does: train; run longer than asked
by more than one product. Importing torch is not counted.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable

import msgspec
import torch

from advisor.types import MatrixBench

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS_SHARE = 0.7
"""Of the time; the rest is for copies."""
SIZES = {"cuda": 8192, "mps": 4096, "cpu": 1536}
"""Rows and columns of the matrices: large enough that the product, not its start, is what is measured."""
COPIED_BYTES = {"cuda": 1 << 30, "mps": 1 << 29, "cpu": 1 << 27}
"""Beyond what caches hold."""


def measure(seconds: float) -> MatrixBench:
    """Return the rates of the device that training would use."""
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    names = [name for name in DTYPES if kind != "cpu" or name != "fp16"]  # processors train in no fp16
    begin = time.monotonic()
    flops = {
        name: _products(kind, DTYPES[name], begin + seconds * PRODUCTS_SHARE * n / len(names))
        for n, name in enumerate(names, start=1)
    }
    copied = _copies(kind, begin + seconds)
    return MatrixBench(
        device=torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or kind,
        threads=torch.get_num_threads() if kind == "cpu" else 0,
        flops=flops,
        copy_bytes_per_second=copied,
        seconds=time.monotonic() - begin,
    )


def _products(kind: str, dtype: torch.dtype, until: float) -> float:
    size = SIZES[kind]
    left, right = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3 * _times_a_second(kind, lambda: torch.mm(left, right, out=out), until)


def _copies(kind: str, until: float) -> float:
    source = torch.ones(COPIED_BYTES[kind] // 4, device=kind)
    target = torch.empty_like(source)
    return 2.0 * COPIED_BYTES[kind] * _times_a_second(kind, lambda: target.copy_(source), until)


def _times_a_second(kind: str, work: Callable[[], object], until: float) -> float:
    """Do it once to warm up, then as often as fits; the fastest time counts, others share the machine."""
    work()
    _wait(kind)
    fastest = float("inf")
    while time.monotonic() < until or fastest == float("inf"):
        since = time.monotonic()
        work()
        _wait(kind)
        fastest = min(fastest, time.monotonic() - since)
    return 1.0 / fastest


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(float(sys.argv[1]))) + b"\n")
