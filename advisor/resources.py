"""Finds kb/ and recipes/, whether ftadvisor runs from a wheel, editable, or from a checkout.

Goes in: nothing (or the environment variable FTADVISOR_KB for an overlay). Comes out: paths.
Never does: read what lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

from advisor.errors import KnowledgeError

_PACKAGE = Path(__file__).resolve().parent


def _data_root() -> Path:
    inside_wheel = _PACKAGE / "_data"
    return inside_wheel if inside_wheel.is_dir() else _PACKAGE.parent


def kb_dir() -> Path:
    """Return the folder with the knowledge base shipped with this version."""
    return _data_root() / "kb"


def kb_overlay_dir() -> Path | None:
    """Return the person's own kb folder (environment variable FTADVISOR_KB), if set.

    Raises:
        KnowledgeError: it is no folder.
    """
    value = os.environ.get("FTADVISOR_KB")
    if value and not Path(value).is_dir():
        raise KnowledgeError(
            f"FTADVISOR_KB names no folder: {value}", "Mend the path, or unset FTADVISOR_KB."
        )
    return Path(value) if value else None


def base_chat_template() -> str:
    """Return the chat template that a model without one is given; it adds no tokens."""
    return (kb_dir() / "base_chat_template.jinja").read_text(encoding="utf-8")


def recipes_dir() -> Path:
    """Return the folder with the training programs."""
    return _data_root() / "recipes"


def starter_dir() -> Path:
    """Return the folder of the embedded starter model and its data."""
    return kb_dir() / "starter"
