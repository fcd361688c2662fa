"""Turns plain text into rows to read on: documents in pieces of the row length, every one with its end.

Goes in: datasets of text. Comes out: tokens with all of them as labels. Never does: put two documents into
one row (the trainer packs them, and keeps them apart); drop the rest of a long document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from advisor.errors import DataError
from advisor.train.data import Row, Tally, by_dataset, conversations, replay, split, table, told
from advisor.train.settings import CptSettings
from advisor.types import RecipeDataset, Record

LEAST_TOKENS = 2
"""The first token of a row has nothing before it to be predicted from."""


class TextData(Record, frozen=True, kw_only=True):
    """Rows ready for the trainer."""

    train: Any
    """datasets.Dataset with input_ids and labels."""
    heldout: dict[str, Any]
    account: dict[str, Any]
    """The fields of the `data` event."""
    left_out: str


def prepare_text(
    datasets: tuple[RecipeDataset, ...], tokenizer: PreTrainedTokenizerBase, settings: CptSettings
) -> TextData:
    """Read, tokenise, cut into rows and split by document.

    Args:
        datasets: text, one document a row; those of the role earlier_task are replayed.
        tokenizer: its end token closes every document.
        settings: max_seq_len, heldout_fraction and replay_fraction are read.

    Raises:
        DataError: no text is left.
    """
    tally = Tally()
    rows = list(_rows(datasets, tokenizer, settings, tally))
    heldout, rest = split(rows, settings.heldout_fraction)
    earlier = {one.name for one in datasets if one.role == "earlier_task"}
    old = [row for row in rest if row.dataset in earlier]
    new = [row for row in rest if row.dataset not in earlier]
    if not new:
        reasons = told(tally.left_out, tally.examples) or "there is no text"
        raise DataError(f"Nothing is left to read: {reasons}.", "Look at the data: ftadvisor inspect FILE")
    replayed = replay(old, share=settings.replay_fraction, new_rows=len(new))
    tally.leave_out_many("replay", len(old) - len(replayed))
    train = [*new, *replayed]
    tokens = sum(len(row.tokens) for row in train)
    account = {
        "rows": len(train), "heldout_rows": len(heldout), "rows_read": tally.read, "tokens": tokens,
        "longest": max(len(row.tokens) for row in train), "supervised_tokens": tokens - len(train),
        "replayed_rows": len(replayed), "left_out": dict(tally.left_out), "examples": tally.examples,
        "sample": [{"text": tokenizer.decode(train[0].tokens[:200]), "trained": True}],
    }  # fmt: skip
    return TextData(
        train=table(train), heldout=by_dataset(heldout), account=account,
        left_out=told(tally.left_out, tally.examples),
    )  # fmt: skip


def _rows(
    datasets: tuple[RecipeDataset, ...],
    tokenizer: PreTrainedTokenizerBase,
    settings: CptSettings,
    tally: Tally,
) -> Iterator[Row]:
    for where, one, said in conversations(datasets, tally):
        text = said.text if said.text is not None else "\n".join(m["content"] for m in said.messages)
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        key = hashlib.sha256(text.encode()).hexdigest()
        for start in range(0, len(ids), settings.max_seq_len):
            piece = np.array(ids[start : start + settings.max_seq_len], np.int32)
            if len(piece) < LEAST_TOKENS:
                if start == 0:
                    tally.leave_out("nothing_trained", where)
                continue
            yield Row(tokens=piece, labels=piece, key=key, dataset=one.name, content=b"", cut=False)
