"""Why did a training process end? From its exit, its last words and its log to an error with a remedy.

Goes in: the exit status, the `error` event if it wrote one, the end of its log. Comes out: one AdvisorError.
Never
does: read files, guess a cause that nothing points to (it shows the last lines instead).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from advisor.errors import AdvisorError, DiskError, TrainingError

OUT_OF_MEMORY = (
    "out of memory",
    "outofmemoryerror",
    "memoryerror",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""As torch, bitsandbytes and the system word it, in lower case."""
NO_SPACE = ("no space left on device", "disk quota exceeded")
CUT_SHORT = ("pytorchstreamwriter failed", "unexpected pos ")
"""As torch words it when a file cannot be written to its end; it does not pass on why."""
READ_ONLY = "read-only file system"
SMALLER = (
    "Plan again with less memory: --set micro_batch=1, a shorter --set max_seq_len=..., or --method qlora. "
    "What was saved stays: checkpoints/"
)
LAST_LINES = 3


def classify(status: int, error: dict[str, Any] | None, log: str) -> AdvisorError:
    """Return the error to show for a training process that failed.

    Args:
        status: as subprocess gives it; negative for a signal.
        error: the process's own `error` event.
        log: the end of its log.
    """
    if error is not None and error.get("code"):
        return _rebuilt(error)
    said = f"{error.get('kind', '')} {error.get('message', '')}" if error else ""
    lower = f"{said}\n{log if error is None else ''}".lower()
    if any(words in lower for words in OUT_OF_MEMORY):
        first = next((line.strip() for line in said.splitlines() if line.strip()), "the log says so")
        return TrainingError(f"Training ran out of memory: {first}", SMALLER, code="out_of_memory")
    if any(words in lower for words in NO_SPACE):
        return DiskError(
            "The disk is full.",
            "Free some space, then go on with --resume; the last whole checkpoint is kept.",
        )
    if any(words in lower for words in CUT_SHORT):
        return DiskError(
            "A file could not be written to its end: the disk is full, or fails.",
            "Free some space, then go on with --resume; the last whole checkpoint is kept.",
        )
    if READ_ONLY in lower:
        return DiskError(
            "The disk can only be read from now; a disk that meets an error is made so.",
            "See what the system says of it (dmesg); when it can be written again, go on with --resume.",
        )
    if status == -signal.SIGKILL:
        return TrainingError(
            "The training process was killed from outside: by a person, or by the system for want of memory.",
            f"Go on with --resume. If it was memory: {SMALLER}",
            code="killed",
        )
    return TrainingError(
        f"The training program failed ({_ending(status)}): {said.strip() or _last_lines(log)}",
        "The whole text is in train.log of the run folder.",
    )


def _rebuilt(event: dict[str, Any]) -> AdvisorError:
    """Return the AdvisorError that the program met, of the same class."""
    classes = {kind.__name__: kind for kind in _family(AdvisorError)}
    kind = classes.get(str(event.get("kind")), TrainingError)
    error = kind.__new__(kind)
    # Some classes build their message from other arguments; here it is already made.
    AdvisorError.__init__(
        error, str(event.get("message", "")), str(event.get("remedy", "")), code=str(event["code"])
    )
    return error


def _family(kind: type[AdvisorError]) -> Iterator[type[AdvisorError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _family(child)


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit {status}"


def _last_lines(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:]) or "it said nothing"
