"""Reads the few rule tables that data needs, without the rest of the knowledge base.

Goes in: the name of a file under kb/rules/. Comes out: its tables, a person's overlay on top. Never does:
check sources (advisor.knowledge does); load anything else, because training programs import this too.
"""

from __future__ import annotations

import functools
from typing import Any

import tomli

from advisor.errors import KnowledgeError
from advisor.resources import kb_dir, kb_overlay_dir


@functools.cache
def rule_table(name: str) -> dict[str, Any]:
    """Return the tables of kb/rules/<name>.toml; a file of the same name in the overlay replaces it.

    Raises:
        KnowledgeError: the file is missing or is not TOML.
    """
    folders = [folder for folder in (kb_overlay_dir(), kb_dir()) if folder is not None]
    paths = [folder / "rules" / f"{name}.toml" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[-1])
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as problem:
        raise KnowledgeError(f"{path} cannot be read: {problem}", "Mend the file or remove it.") from problem


@functools.cache
def names_to_role(name: str, table: str) -> dict[str, str]:
    """Return lower-case name -> role for one table of lists; the first role that lists a name keeps it."""
    found: dict[str, str] = {}
    for role, names in rule_table(name)[table].items():
        if isinstance(names, list):
            for alias in names:
                found.setdefault(alias, role)
    return found
