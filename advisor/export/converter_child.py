"""Runs llama.cpp's own converter in a process of its own, with the tokenizer that was read here.

Started by path, alone, with one argument: a request (JSON). Goes in: the converter's folder, the model
folder, the file to write, its type, calls that write the vocabulary. Comes out: the file, and of which
parameter each of its tensors was made. Never does: import ftadvisor; let the converter read the tokenizer,
which it knows by checksums of a few published ones.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the request and convert."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # The converter brings its own, newer gguf library, under the name of the installed one.
    sys.path[:0] = [request["converter"], str(Path(request["converter"]) / "gguf-py")]
    conversion = importlib.import_module("conversion")
    program = importlib.import_module("convert_hf_to_gguf")
    hparams = conversion.ModelBase.load_hparams(Path(request["model"]), is_mistral_format=False)
    name = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    found = conversion.get_model_class(name)

    def set_vocab(self: Any) -> None:
        for method, value in request["vocabulary"]:
            getattr(self.gguf_writer, method)(*value)

    origins: dict[str, str] = {}
    usual = found.modify_tensors

    def modify_tensors(self: Any, data: Any, origin: str, block: int | None) -> Iterator[tuple[str, Any]]:
        for tensor, values in usual(self, data, origin, block):
            origins[tensor] = origin
            yield tensor, values

    found.set_vocab, found.modify_tensors = set_vocab, modify_tensors
    sys.argv = [
        "convert_hf_to_gguf.py", request["model"], "--outfile", request["file"], "--outtype", request["type"],
        "--model-name", request["name"],
    ]  # fmt: skip
    program.main()
    Path(request["origins"]).write_text(json.dumps(origins), encoding="utf-8")


if __name__ == "__main__":
    main()
