"""How much memory did this process need at its peak?

Goes in: nothing. Comes out: bytes. Never does: guess what the device lost beyond what torch knows.
"""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process in bytes.

    On a CUDA device `memory_bytes` is what torch's allocator held at its peak (the device's context comes on
    top) and `allocated_bytes` what it handed out; elsewhere it is the peak resident size of the process."""
    if torch.cuda.is_available():
        return {
            "memory_bytes": torch.cuda.max_memory_reserved(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
