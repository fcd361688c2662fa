"""Chooses what both sides are asked, and finds held-out rows.

Goes in: files of rows, the probe texts. Comes out: `Questions`. Never does: fail on a row that it does not
understand; it takes the next.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from advisor import rows
from advisor.export.chat_template import Conversation
from advisor.export.tokenizer import CONTROL, Vocabulary
from advisor.rows import RowProblem, infer_mapping, read_rows, to_messages
from advisor.storage import read_record
from advisor.types import Recipe
from advisor.verify.bounds import VerifyRules

MOST_ROWS = 24


def heldout_rows(source: Path) -> tuple[Path, ...]:
    """Return files with rows to verify on: held-out ones of the run, else the data it trained on."""
    found = sorted(path for pattern in ("heldout*.json", "heldout*.jsonl") for path in source.glob(pattern))
    if found or not source.is_dir():
        return tuple(found)
    recipes = sorted(source.glob("recipe*.yaml"))
    if not recipes:
        return ()
    recipe = read_record(recipes[-1], Recipe, remedy=f"See {recipes[-1].name} for the wrong field.")
    paths = [Path(dataset.path) for dataset in recipe.datasets]
    return tuple(path for path in paths if path.exists())


def read_conversations(paths: Sequence[Path], *, most: int = MOST_ROWS) -> Iterator[Conversation | str]:
    """Yield the first conversations and texts of some files of rows; unusable rows are passed over."""
    for path in paths:
        numbered = itertools.islice(read_rows(path), most)
        read = [row for _, row in numbered]
        kind, mapping = infer_mapping(read, where=str(path))
        for row in read:
            with contextlib.suppress(RowProblem):
                found = _understood(to_messages(row, kind, mapping))
                if found is not None:
                    yield found


def _understood(said: rows.Conversation) -> Conversation | str | None:
    if said.text is not None:
        return said.text
    turns = said.messages or [*said.prompt, *(said.completion or said.chosen)]
    if not turns or any(set(turn) - {"role", "content"} for turn in turns):
        return None
    messages = tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)
    return Conversation(messages=messages, generation_prompt=messages[-1]["role"] == "user")


def probe_texts(rules: VerifyRules, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the texts whose token ids are compared, those with this model's special tokens included."""
    special = [
        vocabulary.tokens[i]
        for i, kind in enumerate(vocabulary.types[: len(vocabulary.types) - vocabulary.virtual])
        if kind == CONTROL
    ][:12]
    around = [
        text
        for token in special
        for text in (token, f"a{token}b", f"{token}\nHi {token} there", f" {token} ")
    ]
    texts = dict.fromkeys([*rules.probe.texts, *around, *(f" {text}" for text in rules.probe.texts[10:40])])
    if not vocabulary.plain_only:
        return tuple(texts)
    return tuple(t for t in texts if t[:1] != " " and not any(token in t for token in special))
