"""Turns labelled texts into tokens and class numbers, and judges a head that picks a class.

Goes in: datasets of texts with a label. Comes out: rows for the trainer, the names of the classes, loss and
accuracy on rows that are not trained on. Never does: render a chat template (a head reads the plain text);
drop a row without counting it; make up a class that no row has."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer

from advisor.errors import DataError
from advisor.train.data import Tally, conversations, told
from advisor.train.settings import ClassifySettings
from advisor.train.trainer import batches, judging
from advisor.types import RecipeDataset, Record

LABELS = "labels.json"
"""Beside the weights: the names of the classes, in the order of the head's outputs."""


class Labelled(Record, frozen=True, kw_only=True):
    """One text."""

    tokens: list[int]
    label: int
    key: str
    """Hash of the text: decides the split."""


class LabelledData(Record, frozen=True, kw_only=True):
    """Rows ready for the trainer."""

    train: tuple[Labelled, ...]
    heldout: tuple[Labelled, ...]
    names: tuple[str, ...]
    account: dict[str, Any]
    """The fields of the `data` event."""
    left_out: str


def prepare_classes(
    datasets: tuple[RecipeDataset, ...], tokenizer: PreTrainedTokenizerBase, settings: ClassifySettings
) -> LabelledData:
    """Read, tokenise and split; a text longer than max_seq_len is cut at its end and counted.

    Args:
        datasets: of the kind classification.
        tokenizer: its end token closes every text; the head reads the class from there.
        settings: max_seq_len and heldout_fraction are read.

    Raises:
        DataError: there are fewer than two classes to tell apart.
    """
    tally, cut = Tally(), 0
    found: list[tuple[str, str]] = list(_texts(datasets, tally))
    names = tuple(sorted({label for _, label in found}))
    if len(names) < 2:
        reasons = told(tally.left_out, tally.examples) or "all have the same label"
        raise DataError(
            f"The {tally.read} rows hold {len(names)} class(es); two are needed to tell apart: {reasons}.",
            "Give rows of every class: ftadvisor inspect FILE shows the labels.",
            code="one_class",
        )
    rows = []
    for text, label in found:
        ids = tokenizer.encode(text, add_special_tokens=False)
        cut += len(ids) >= settings.max_seq_len
        ids = [*ids[: settings.max_seq_len - 1], tokenizer.eos_token_id]
        key = hashlib.sha256(text.encode()).hexdigest()
        rows.append(Labelled(tokens=ids, label=names.index(label), key=key))
    heldout, train = _split(rows, settings.heldout_fraction)
    counts = Counter(names[row.label] for row in train)
    account = {
        "rows": len(train), "heldout_rows": len(heldout), "rows_read": tally.read, "rows_cut": cut,
        "tokens": sum(len(row.tokens) for row in train), "longest": max(len(row.tokens) for row in train),
        "supervised_tokens": len(train), "classes": dict(sorted(counts.items())),
        "left_out": dict(tally.left_out), "examples": tally.examples,
        "sample": [
            {"text": tokenizer.decode(train[0].tokens[:200]), "trained": False},
            {"text": names[train[0].label], "trained": True},
        ],
    }  # fmt: skip
    return LabelledData(
        train=tuple(train), heldout=tuple(heldout), names=names, account=account,
        left_out=told(tally.left_out, tally.examples),
    )  # fmt: skip


def _texts(datasets: tuple[RecipeDataset, ...], tally: Tally) -> Iterator[tuple[str, str]]:
    for _, one, said in conversations(datasets, tally):
        if said.text is None or said.label is None:
            raise DataError(
                f"Data of the kind {one.kind!r} has no label for each text.",
                "A classifier head needs rows with a text and a label; else plan with --method lora.",
            )
        yield said.text, str(said.label)


def _split(rows: list[Labelled], fraction: float) -> tuple[list[Labelled], list[Labelled]]:
    """Return (held out, trained), class by class, so that a rare class is on both sides where it can be.

    Equal texts are on the same side, and one text of every class is trained on.
    """
    heldout = set[str]()
    for label in sorted({row.label for row in rows}):
        keys = sorted({row.key for row in rows if row.label == label})
        heldout |= set(keys[: min(len(keys) - 1, round(len(keys) * fraction))])
    return [row for row in rows if row.key in heldout], [row for row in rows if row.key not in heldout]


def labelled_table(rows: tuple[Labelled, ...]) -> Dataset:
    """Return rows as the trainer takes them."""
    return Dataset.from_dict(
        {"input_ids": [row.tokens for row in rows], "labels": [row.label for row in rows]}
    )


class ClassTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trainer for a head over classes; the loss of a step is the mean over its rows, however accumulated."""

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase, multiple: int | None, **rest: Any) -> None:
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
        super().__init__(data_collator=collator, processing_class=tokenizer, **rest)
        self.model_accepts_loss_kwargs = False


def class_figures(
    trainer: ClassTrainer, rows: tuple[Labelled, ...], settings: ClassifySettings
) -> dict[str, float | None]:
    """Return loss and accuracy on rows that are not trained on, the mean accuracy over the classes, and what
    always naming the most frequent class would get."""
    if not rows:
        return {"loss": None}
    model = trainer.model
    texts = [{"input_ids": row.tokens} for row in rows]
    with judging(model, settings):
        parts = [
            model(**batch).logits.float().cpu()
            for batch in batches(model, texts, trainer.data_collator, settings.micro_batch)
        ]
    scores, wanted = torch.cat(parts), torch.tensor([row.label for row in rows])
    right = scores.argmax(dim=1) == wanted
    each = [float(right[wanted == label].float().mean()) for label in sorted(set(wanted.tolist()))]
    return {
        "loss": float(functional.cross_entropy(scores, wanted)),
        "accuracy": float(right.float().mean()),
        "accuracy_by_class": sum(each) / len(each),
        "texts": len(rows),
        "most_frequent_class": max(Counter(wanted.tolist()).values()) / len(rows),
    }
