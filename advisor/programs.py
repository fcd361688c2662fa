"""Which settings do the training programs accept, and is a value one of them?

Goes in: recipes/*/program.toml, a value. Comes out: Program records, or the reason why a value is refused.
Never does: choose a value; load a program.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import tomli

from advisor.errors import KnowledgeError, UnknownNameError, UsageError
from advisor.types import Program, ProgramKey, Value

KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "list": (list,), "table": (dict,),
}  # fmt: skip


def read_programs(folder: Path) -> dict[str, Program]:
    """Return the programs of a folder by name.

    Raises:
        KnowledgeError: a program.toml is not TOML or has an unknown field.
    """
    return {file.parent.name: read_program(file) for file in sorted(folder.glob("*/program.toml"))}


def read_program(file: Path) -> Program:
    """Return what a program.toml says.

    Raises:
        KnowledgeError: it is not TOML or has an unknown field.
    """
    try:
        return msgspec.convert(tomli.loads(file.read_text(encoding="utf-8")), Program)
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError, msgspec.ValidationError) as problem:
        raise KnowledgeError(f"{file}: {problem}", "Mend the file or install anew.") from problem


def check_value(key: str, value: Value, facts: ProgramKey, see: str) -> None:
    """Refuse a value that a program does not accept.

    Args:
        key: its name.
        value: None stands for a key that is left out.
        facts: what the program accepts.
        see: the remedy of a refusal.

    Raises:
        UsageError: the value is of another type, no choice (the nearest is named), or out of its range.
    """
    if value is None and not facts.required:
        return
    is_bool = isinstance(value, bool)
    if not isinstance(value, KINDS[facts.type]) or is_bool != (facts.type == "bool"):
        raise UsageError(f"{key} = {value!r} must be of type {facts.type}.", see)
    for one in value if isinstance(value, list) else [value]:
        if facts.choices and one not in facts.choices:
            raise UnknownNameError(f"value of {key}", str(one), facts.choices, see)
    if not isinstance(value, int | float):
        return
    if not ((facts.low is None or value >= facts.low) and (facts.high is None or value <= facts.high)):
        if facts.low is None or facts.high is None:
            bound = f"at most {facts.high:g}" if facts.low is None else f"at least {facts.low:g}"
            raise UsageError(f"{key} = {value} must be {bound}.", see)
        raise UsageError(f"{key} = {value} must lie between {facts.low:g} and {facts.high:g}.", see)
