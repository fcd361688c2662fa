"""The versioned answers: what version 1 says is still said, under the same name and with the same type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from advisor.types import Export, RunReport, Verification

GOLDEN = Path(__file__).parent / "contract"
RECORDS: dict[str, Any] = {"report": RunReport, "export": Export, "verification": Verification}


def said(record: Any) -> dict[str, Any]:
    """Every field of a record and of those inside it -> its type, as in a JSON schema."""
    _, parts = msgspec.json.schema_components([record])
    return {
        f"{name}.{field}": {key: value for key, value in kind.items() if key != "default"}
        for name, part in sorted(parts.items())
        for field, kind in sorted(part.get("properties", {}).items())
    }


def keeps(then: dict[str, Any], now: dict[str, Any] | None) -> bool:
    """Whether a field still says what it said; where it is one of some words, there may be more of them."""
    if now is None or "enum" not in then:
        return then == now
    return set(then["enum"]) <= set(now.get("enum", ()))


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_version_keeps_what_it_says(name: str) -> None:
    """Fields may be added; one that is renamed, gone or of another type needs a new version of the schema.

    FTADVISOR_GOLDEN=write keeps what is said now: for a new version, or for a field that was added.
    """
    file, now = GOLDEN / f"{name}.json", said(RECORDS[name])
    assert msgspec.structs.fields(RECORDS[name])[0].default == f"ftadvisor.{name}/1"
    if os.environ.get("FTADVISOR_GOLDEN") == "write":
        file.write_text(
            "{\n" + ",\n".join(f'"{field}": {json.dumps(kind)}' for field, kind in now.items()) + "\n}\n",
            encoding="utf-8",
        )
    then = json.loads(file.read_text(encoding="utf-8"))
    assert {field: kind for field, kind in then.items() if not keeps(kind, now.get(field))} == {}
