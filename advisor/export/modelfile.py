"""Writes the text of an Ollama Modelfile.

Goes in: the name of a GGUF file and its vocabulary. Comes out: text. Never does: guess a template: it is
given only where it renders exactly as the trained one; otherwise Ollama takes the one inside the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advisor.export.chat_template import is_chatml
from advisor.export.tokenizer import Vocabulary
from advisor.storage import write_atomic

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(gguf_name: str, vocabulary: Vocabulary, settings: dict[str, Any]) -> str:
    """Return a Modelfile: FROM, a stop parameter for each end token, TEMPLATE for ChatML.

    Args:
        gguf_name: File name, in the same folder.
        vocabulary: Of the exported model.
        settings: tokenizer_config.json.
    """
    lines = [_from(gguf_name)]
    lines += [f'PARAMETER stop "{text}"' for text in vocabulary.end_texts]
    if has_template(vocabulary, settings):
        lines.append(f'TEMPLATE """{_CHATML}"""')
    return "\n".join(lines) + "\n"


def has_template(vocabulary: Vocabulary, settings: dict[str, Any]) -> bool:
    """Whether a Modelfile gives the template itself."""
    return vocabulary.chat_template is not None and is_chatml(vocabulary.chat_template, settings)


def name_file(path: Path, gguf_name: str) -> None:
    """Let a Modelfile name another file of the same model; what a person added to it stays."""
    first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    if first.startswith(_from("")):
        write_atomic(path, (_from(gguf_name) + "\n" + "".join(lines)).encode())


def _from(gguf_name: str) -> str:
    return f"FROM ./{gguf_name}"
