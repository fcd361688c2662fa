"""Is this a GGUF file?

Goes in: a path. Comes out: nothing, or an error that says what it is instead. Never does: read more than the
first bytes.
"""

from __future__ import annotations

from pathlib import Path

from advisor.errors import InputError

MAGIC = b"GGUF"
NORMALISER_KEY = "ftadvisor.tokenizer.normaliser"
"""Metadata of our exports: what the trained tokenizer does to text first and llama.cpp does not."""
PREFIX_KEY = "ftadvisor.prefix.file"
"""The sequence state, in the same folder, without which the model answers as it did before it was tuned."""
PREFIX_SHA256_KEY = "ftadvisor.prefix.sha256"
_REMEDY = "Make one with: ftadvisor export RUN_DIR_or_MODEL_DIR"


def check_gguf(path: Path) -> None:
    """Check that a file is there and begins as a GGUF does.

    Raises:
        InputError: it is not, with what it looks like instead.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.", _REMEDY)
    if path.is_dir():
        found = sorted(path.glob("*.gguf")) + sorted(path.glob("export/*.gguf"))
        remedy = f"In it: {found[0]}" if found else _REMEDY
        raise InputError(f"{path} is a folder; a GGUF file is needed.", remedy)
    if not path.is_file():
        raise InputError(f"{path} is no ordinary file.", "Save what it gives as a file first.")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as problem:
        raise InputError(f"Cannot read {path}: {problem.strerror or problem}.", _REMEDY) from problem
    if not start:
        raise InputError(f"{path} is empty.", _REMEDY)
    if start != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {start!r}.", _REMEDY)
