"""Which column holds what: from column names and a few rows to the kind of data and a mapping.

Goes in: the first rows. Comes out: (kind, canonical role -> column). Names and forms are data, in
kb/rules/columns.toml. Never does: read files; accept a set of columns with a part missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from advisor.errors import DataError
from advisor.rows.tables import names_to_role, rule_table
from advisor.types import DataKind

Row = Mapping[str, object]
_CHECKABLE = re.compile(r"####\s*[-+$]?[\d.,/ ]+\s*$|^\s*[-+$]?[\d.,/ ]*\d[\d.,/ %]*$|\\boxed\{")


def infer_mapping(rows: Sequence[Row], *, where: str = "The data") -> tuple[DataKind, dict[str, str]]:
    """Return the kind of data and the mapping from canonical roles to columns.

    Args:
        rows: the first rows, at least one.
        where: how errors call the data.

    Raises:
        DataError: no form fits; names the columns found, the one that is missing and every form accepted.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    roles = _roles(columns, rows)
    kind, needed = _kind(roles, columns, rows, where)
    return kind, {role: roles[role] for role in needed if role in roles}


def _roles(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Return role -> column, the first listed name that is there; no column has two roles."""
    by_name = {name.strip().lower(): name for name in reversed(columns)}
    roles: dict[str, str] = {}
    taken: set[str] = set()
    for role, names in rule_table("columns")["columns"].items():
        if not isinstance(names, list):
            continue
        fits = [by_name[name] for name in names if name in by_name and by_name[name] not in taken]
        if role == "messages":
            fits = [name for name in fits if any(_is_turns(row.get(name)) for row in rows)]
        if fits:
            roles[role] = fits[0]
            taken.add(fits[0])
    return roles


def _is_turns(value: object) -> bool:
    if isinstance(value, str) and value[:1] == "[":
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return False
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _kind(
    roles: dict[str, str], columns: Sequence[str], rows: Sequence[Row], where: str
) -> tuple[DataKind, tuple[str, ...]]:
    """Return the kind and the roles that it uses."""
    has = roles.__contains__
    if has("chosen") or has("rejected"):
        if not (has("chosen") and has("rejected")):
            raise _missing(roles, columns, where, "rejected" if has("chosen") else "chosen")
        return "preference", ("system", "messages", "prompt", "context", "chosen", "rejected", "tools")
    if has("messages"):
        return _kind_of_chat(roles, rows)
    if has("prompt") and has("answer"):
        if has("label") and _are_marks(rows, roles["label"]):
            return "unpaired_preference", ("system", "prompt", "context", "answer", "label")
        return _kind_of_pairs(roles, rows)
    if has("prompt") and has("reference"):
        return "prompts_with_answers", ("system", "prompt", "context", "reference")
    if has("label") and (has("text") or has("prompt")):
        if not has("text") and _are_marks(rows, roles["label"]):
            raise _missing(roles, columns, where, "answer")
        if not has("text"):
            roles["text"] = roles["prompt"]
        return "classification", ("text", "label")
    if has("answer"):
        raise _missing(roles, columns, where, "prompt")
    if has("prompt"):
        if roles["prompt"].strip().lower() == "instruction" or has("context"):
            raise _missing(roles, columns, where, "answer")
        return "prompts", ("system", "prompt")
    if has("text"):
        return "raw_text", ("text",)
    raise _unknown(columns, rows, where)


def _kind_of_chat(roles: dict[str, str], rows: Sequence[Row]) -> tuple[DataKind, tuple[str, ...]]:
    column = roles["messages"]
    if "label" in roles and _are_marks(rows, roles["label"]):
        return "unpaired_preference", ("messages", "label", "system", "tools")
    speakers = names_to_role("columns", "turns")
    turns = [turn for row in rows for turn in _turns(row.get(column))]
    spoken = {speakers.get(str(turn.get("role", turn.get("from", ""))).lower()) for turn in turns}
    calls = "function_call" in spoken or any(turn.get("tool_calls") for turn in turns)
    if calls or ("tools" in roles and any(row.get(roles["tools"]) for row in rows)):
        return "tool_calling", ("messages", "system", "tools")
    if spoken <= {"user", "system"} and "reference" in roles:
        return "prompts_with_answers", ("messages", "system", "reference")
    if _thinks([str(turn.get("content", turn.get("value", ""))) for turn in turns]) or any(
        turn.get("reasoning_content") for turn in turns
    ):
        return "reasoning_chat", ("messages", "system", "reasoning")
    return "chat", ("messages", "system", "tools")


def _turns(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str) and value[:1] == "[":
        value = orjson.loads(value)
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []


def _kind_of_pairs(roles: dict[str, str], rows: Sequence[Row]) -> tuple[DataKind, tuple[str, ...]]:
    answers = [str(row.get(roles["answer"]) or "") for row in rows]
    pairs = ("system", "history", "prompt", "context", "answer")
    if "reasoning" in roles or _thinks(answers):
        return "reasoning_chat", (*pairs, "reasoning")
    if sum(bool(_CHECKABLE.search(answer)) for answer in answers) >= 0.9 * len(answers):
        return "prompts_with_answers", (*pairs, "reference")
    name = roles["prompt"].strip().lower()
    if "context" in roles:
        return "instruction", pairs
    for kind, names in rule_table("columns")["kind_of_prompt"].items():
        if isinstance(names, list) and name in names:
            return kind, pairs
    return "prompt_completion", pairs


def _thinks(texts: Sequence[str]) -> bool:
    filled = [text for text in texts if text.strip()]
    return bool(filled) and any("<think>" in text for text in filled)


def _are_marks(rows: Sequence[Row], column: str) -> bool:
    """Tell whether a column says only wanted or unwanted."""
    marks = rule_table("columns")["marks"]
    known = {*marks["wanted"], *marks["unwanted"]}
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(str(value).strip().lower() in known for value in values)


def _missing(roles: dict[str, str], columns: Sequence[str], where: str, role: str) -> DataError:
    """One part of a form is not there."""
    understood = ", ".join(f"{column} ({name})" for name, column in roles.items())
    name = rule_table("columns")["columns"][role][0]
    return _columns_error(where, columns, f"understood: {understood}; missing: {name} (the {role})")


def _unknown(columns: Sequence[str], rows: Sequence[Row], where: str) -> DataError:
    """No column is known; the rows may lie one level deeper, or a chat may not be a list of turns."""
    if len(rows) == 1:
        for name, value in rows[0].items():
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                return DataError(
                    f"{where} is one object; the rows lie under {name!r}.",
                    f"jq -c '.{name}[]' '{where}' > rows.jsonl",
                    code="missing_column",
                )
    chats = [name for name in columns if name.strip().lower() in rule_table("columns")["columns"]["messages"]]
    if chats:
        return _columns_error(where, columns, f"{chats[0]} does not hold a list of turns")
    return _columns_error(where, columns, "none of them is known")


def _columns_error(where: str, columns: Sequence[str], lacks: str) -> DataError:
    forms = "\n".join(f"  - {form['title']}" for form in rule_table("columns")["forms"])
    return DataError(
        f"{where}: the columns are {', '.join(columns) or 'none'}; {lacks}.",
        f"Add or rename the column. Accepted forms:\n{forms}",
        code="missing_column",
    )
