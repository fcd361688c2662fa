"""The sentences of kb/rules/reasons.toml, with the figures of a case filled in.

Goes in: group, key and figures. Comes out: Why (sentence and source). Never does: hold a sentence itself.
"""

from __future__ import annotations

from advisor.errors import KnowledgeError
from advisor.knowledge import Knowledge
from advisor.types import Why


def because(knowledge: Knowledge, group: str, key: str, /, **figures: object) -> Why:
    """Return one sentence with its source.

    Args:
        knowledge: holds the sentences.
        group: setting, objective, instead, chain, objection, score or alternative.
        key: which sentence of the group.
        figures: what fills its placeholders.

    Raises:
        KnowledgeError: the sentence is missing, or has a placeholder that the case does not fill.
    """
    try:
        entry = knowledge.rules["reasons"][group][key]
        return Why(reason=str(entry["text"]).format_map(figures), source=str(entry["source"]))
    except KeyError as missing:
        raise KnowledgeError(
            f"kb/rules/reasons.toml [{group}.{key}]: {missing.args[0]!r} is missing.",
            "Restore it from the distribution.",
        ) from missing
