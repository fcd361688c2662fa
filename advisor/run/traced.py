"""What would a training step hold by the libraries that are installed here?

Goes in: a ModelSpec and MemorySettings. Comes out: a MemoryEstimate of the engine `trace`, kept in the cache
folder by model, settings and versions. Never does: import torch; read weights; use the network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec

import advisor
from advisor.errors import AdvisorError, InputError
from advisor.estimate.memory import traced_estimate
from advisor.knowledge import Knowledge
from advisor.probe.software import installed_packages
from advisor.run.launch import QUIET_AND_OFFLINE, require_installed
from advisor.storage import write_atomic
from advisor.types import MemoryEstimate, MemorySettings, ModelSpec, TracedPeaks

TRACERS = ("advisor.train.trace_alone", "advisor.train.trace")
"""Without what it can do without, and with everything."""
REFUSAL = "advisor.errors.RefusedError: "


def trace(spec: ModelSpec, settings: MemorySettings, knowledge: Knowledge, cache: Path) -> MemoryEstimate:
    """Return the estimate that the tracer's peaks make.

    Args:
        spec: the model; its shape is enough.
        settings: what is trained and how.
        knowledge: for the device layer and the band.
        cache: folder below which answers are kept.

    Raises:
        MissingPackageError: the libraries are not installed.
        InputError: the tracer cannot trace this, or failed; says why.
    """
    require_installed(("torch", "transformers", "peft", "trl"))
    question = msgspec.json.encode({"spec": spec, "settings": settings})
    versions = msgspec.json.encode(installed_packages(), order="sorted")
    kept = cache / "traces" / f"{hashlib.sha256(question + versions + _tracer()).hexdigest()[:32]}.json"
    if not kept.is_file():
        write_atomic(kept, _ask(question))
    peaks = msgspec.json.decode(kept.read_bytes(), type=TracedPeaks)
    return traced_estimate(spec, settings, knowledge.rules["memory"], peaks)


def _tracer() -> bytes:
    """What the tracer itself is: an answer of an older one is not taken from the cache."""
    return b"".join(
        path.read_bytes() for path in sorted((Path(advisor.__file__).parent / "train").glob("trace*.py"))
    )


def _ask(question: bytes) -> bytes:
    """Run the tracer in a process of its own: it replaces functions of torch. Where the light one fails by
    something else than a refusal, the whole one is asked."""
    said = ""
    for module in TRACERS:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", module], input=question + b"\n", capture_output=True, check=False,
            env={**os.environ, **QUIET_AND_OFFLINE},
        )  # fmt: skip
        lines = [line for line in answer.stdout.splitlines() if line.startswith(b"{")]
        if lines and not answer.returncode:
            return lines[-1]
        said = answer.stderr.decode(errors="replace")
        if REFUSAL in said:
            break
    raise _failure(said)


def _failure(said: str) -> AdvisorError:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "no output")
    return InputError(
        f"The tracer cannot answer: {last.removeprefix(REFUSAL)}",
        "Take the closed form: --engine closed_form",
    )
