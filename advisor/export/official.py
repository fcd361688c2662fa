"""Exports what is not known here through llama.cpp's own converter; the tokenizer is still read here.

Goes in: a model folder (merged by peft first where there is an adapter), the importance of its columns. Comes
out: GGUF files. Never does: believe them: they are verified as all others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from advisor.errors import DiskError, ExportError, MissingPackageError
from advisor.export.checkpoint import open_checkpoint
from advisor.export.encode import Type
from advisor.export.files import complete_file, need_space
from advisor.export.gguf_file import Contents, add_vocabulary, contents
from advisor.export.importance import Importance
from advisor.export.native import run_llama
from advisor.export.source import Trained
from advisor.export.tokenizer import Vocabulary
from advisor.gguf_rules import rules

_CHILD = Path(__file__).with_name("converter_child.py")
_MERGE = """
import sys, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", local_files_only=True)
model = peft.PeftModel.from_pretrained(model, sys.argv[2])
base = model.get_base_model()
ends = base.get_input_embeddings(), base.get_output_embeddings()
apart = peft.tuners.lora.LoraLayer, peft.utils.ModulesToSaveWrapper
if base.config.tie_word_embeddings and any(isinstance(end, apart) for end in ends):
    sys.exit("it changes the embedding or the output layer, which are one matrix in the base")
model.merge_and_unload(safe_merge=True).save_pretrained(sys.argv[3])
"""
_STORED = {"BF16": "BF16", "F16": "F16"}


class _Recorder:
    """Notes the calls that would write a vocabulary, so that the converter's process can make them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *values: self.calls.append((method, list(values)))


def needs_converter(config: dict[str, Any]) -> bool:
    """Whether config.json names an architecture, and none that is written here."""
    named = config.get("architectures") or []
    return bool(named) and named[0] not in rules().architectures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """One model on its way through the converter."""

    trained: Trained
    vocabulary: Vocabulary
    converter: Path
    out: Path
    importance: Importance | None
    on_progress: Callable[[str], None]

    def write(self, quants: tuple[str, ...], path_of: Callable[[str], Path]) -> list[tuple[str, Contents]]:
        """Write a file for each quantisation.

        Raises:
            ExportError: the converter or the quantiser refuses; the message holds its last lines.
            DiskError: the disk is full.
        """
        need_space(self.out, 2 * self._stored_bytes() * (1 + len(quants)))
        found = []
        with _folder(self.trained, self.out, self.on_progress) as model:
            for quant in quants:
                with complete_file(path_of(quant)) as aside:
                    self._one(model, quant, aside)
                    found.append((quant, file_contents(aside)))
        return found

    def _stored_bytes(self) -> int:
        return sum(Path(path).stat().st_size for path in {t.path for t in self._tensors()})

    def _tensors(self) -> list[Any]:
        return list(open_checkpoint(Path(self.trained.base)).tensors.values())

    def _one(self, model: Path, quant: str, file: Path) -> None:
        self.on_progress(f"converting to {quant}")
        if quant in rules().quantisations.direct:
            self._convert(model, quant, file)
            return
        kinds = {tensor.dtype for tensor in self._tensors()}
        start = _STORED.get(kinds.pop(), "F32") if len(kinds) == 1 else "F32"
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".convert-") as place:
            first = Path(place) / "first.gguf"
            origins = self._convert(model, start, first)
            request: dict[str, Any] = {
                "do": "quantise", "source": str(first), "target": str(file), "quant": quant,
            }  # fmt: skip
            if self.importance is not None:
                columns = Path(place) / "importance.npz"
                np.savez(columns, **self._columns(self.importance, origins))
                request |= {"importance": str(columns), "notes": self.importance.metadata()}
            run_llama(request)

    def _columns(self, importance: Importance, origins: dict[str, str]) -> dict[str, Any]:
        """Return the measured columns by the names of the file's tensors.

        Raises:
            ExportError: nothing that was measured is in the file.
        """
        found = {
            tensor: importance.columns[origin]
            for tensor, origin in origins.items()
            if origin in importance.columns and tensor.endswith(".weight")
        }
        if not found:
            raise ExportError(
                "llama.cpp's converter names no parameter whose importance was measured.",
                "Leave --imatrix out.",
            )
        used = {origins[tensor] for tensor in found}
        if used < set(importance.columns):
            missing = len(set(importance.columns) - used)
            self.on_progress(f"the importance of {missing} of {len(importance.columns)} matrices is not used")
        return found

    def _convert(self, model: Path, quant: str, file: Path) -> dict[str, str]:
        """Write a file without mixtures; return tensor -> the parameter that it was made of."""
        written = _Recorder()
        add_vocabulary(written, self.vocabulary)
        with tempfile.TemporaryDirectory(prefix="ftadvisor-") as place:
            request, origins = Path(place, "request.json"), Path(place, "origins.json")
            request.write_text(
                json.dumps(
                    {
                        "converter": str(self.converter), "model": str(model), "file": str(file),
                        "type": quant.lower(), "name": self.trained.name, "vocabulary": written.calls,
                        "origins": str(origins),
                    }
                ),
                encoding="utf-8",
            )  # fmt: skip
            _run([str(_CHILD), str(request)], "llama.cpp's converter")
            named: dict[str, str] = json.loads(origins.read_text(encoding="utf-8"))
            return named


def file_contents(path: Path) -> Contents:
    """Return what a GGUF file holds, in numbers."""
    read = gguf.GGUFReader(path).tensors
    return contents(
        (tuple(int(n) for n in reversed(tensor.shape)), Type(tensor.tensor_type)) for tensor in read
    )


@contextmanager
def _folder(trained: Trained, out: Path, on_progress: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder to convert: the base, or one that peft merged for the while."""
    if trained.adapter is None:
        yield Path(trained.base)
        return
    on_progress("merging the adapter with peft")
    with tempfile.TemporaryDirectory(dir=out, prefix=".merged-") as place:
        _run(["-c", _MERGE, trained.base, trained.adapter, place], "peft")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(trained.tokenizer) / name, Path(place) / name)
        yield Path(place)


def _run(arguments: list[str], what: str) -> None:
    """Run a program of Python's in a process of its own, without the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen(
        [sys.executable, *(["-P"] if arguments[0] != "-c" else []), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = (child.communicate()[0] or b"").decode(errors="replace")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended with status {child.returncode}"
    if "No space left on device" in last or "File too large" in last:
        raise DiskError(
            f"{what} cannot write: {last}.", "Free some space or choose another folder with --out."
        )
    if last.startswith("ModuleNotFoundError"):
        missing = last.rpartition("'")[0].rpartition("'")[2]
        raise MissingPackageError(missing, "train")
    raise ExportError(
        f"{what} does not take this model: {last}",
        "Keep it for transformers and peft, which run it as it was trained: ftadvisor chat FOLDER",
    )
