"""Starts llama.cpp in a child process and brings back its answer, or its last words.

Goes in: a request. Comes out: the answer, and arrays. Never does: die with the child; leave a child behind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advisor.errors import ExportError, MissingPackageError
from advisor.probe.load import free_cores

_CHILD = Path(__file__).with_name("llama_child.py")
Arrays = dict[str, npt.NDArray[np.float32]]


def run_llama(request: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Do one thing with llama.cpp, `choose` or `inspect`.

    Raises:
        ExportError: llama.cpp refused or crashed; the message holds its last lines.
        MissingPackageError: llama-cpp-python is not installed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingPackageError("llama-cpp-python", "gguf")
    with tempfile.TemporaryDirectory(prefix="ftadvisor-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(
            json.dumps({"threads": free_cores(), "parent": os.getpid(), **request}), encoding="utf-8"
        )
        command = [sys.executable, "-P", str(_CHILD), str(asked), str(answered)]
        with Path(folder, "log.txt").open("w+b") as log, _child(command, log.fileno()) as child:
            code = child.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")
        if code != 0 or not answered.is_file():
            raise ExportError(_last_words(request["do"], code, said), "See the lines above for the reason.")
        arrays: Arrays = {}
        file = answered.with_suffix(".npz")
        if file.is_file():
            with np.load(file) as stored:
                arrays = {key: stored[key] for key in stored.files}
        return json.loads(answered.read_text(encoding="utf-8")), arrays


@contextlib.contextmanager
def _child(command: list[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child that ends with this block, whatever happens; Ctrl-C reaches us and not the child."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _last_words(what: str, code: int, said: str) -> str:
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return f"llama.cpp ({what}) {ended}: {' | '.join((telling or lines)[-4:]) or 'it said nothing'}"
