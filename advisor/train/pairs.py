"""Turns judged answers into tokens: prompt and answer apart, the answer with its end token and nothing more.

Goes in: datasets of preferences or of single marked answers. Comes out: rows for the preference trainers, an
account of what was left out. Never does: cut an answer; let the same prompt lie on both sides of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import orjson
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from advisor.errors import DataError
from advisor.rows import Conversation, Message
from advisor.templates import TemplateRefusalError
from advisor.train.answers import Template, Tools, render_answers
from advisor.train.data import Tally, conversations, split, told
from advisor.train.model import Ending
from advisor.train.session import Session
from advisor.train.settings import Settings
from advisor.types import RecipeDataset, Record


class Judged(Record, frozen=True, kw_only=True):
    """One prompt with answers as tokens."""

    key: str
    """Hash of the prompt: decides the split."""
    prompt: list[int]
    chosen: list[int] = []
    rejected: list[int] = []
    """Empty for a single marked answer, which is `chosen` whatever its mark."""
    good: bool = True
    """The mark of a single answer."""


class JudgedData(Record, frozen=True, kw_only=True):
    """Rows ready for a trainer."""

    train: tuple[Judged, ...]
    heldout: tuple[Judged, ...]
    account: dict[str, Any]
    """The fields of the `data` event."""
    left_out: str
    """What was left out, in words; empty when nothing was."""


def open_judged(
    session: Session,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    ending: Ending,
    *,
    single: bool = False,
) -> JudgedData:
    """Prepare the rows of a recipe, and say how many there are and what was left out.

    Raises:
        DataError: no row is left.
    """
    data = prepare_judged(
        session.recipe.datasets, tokenizer, template, max_tokens=settings.max_seq_len,
        heldout_fraction=settings.heldout_fraction, single=single,
    )  # fmt: skip
    session.events.write("data", end_token=ending.end, **data.account)
    if data.left_out:
        session.events.write("warning", message=f"Not every row is trained on: {data.left_out}.")
    if session.probe is None:
        return data
    sizes = [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in data.heldout]
    few = tuple(data.heldout[n] for n in session.probe.heldout(sizes, settings))
    return msgspec.structs.replace(data, heldout=few)


def prepare_judged(
    datasets: tuple[RecipeDataset, ...],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_tokens: int,
    heldout_fraction: float,
    single: bool = False,
) -> JudgedData:
    """Read, render, tokenise and split.

    Args:
        datasets: of the kind preference, or unpaired_preference under `single`.
        tokenizer: with the end token already settled.
        template: of that tokenizer.
        max_tokens: a row that is longer with any of its answers is left out.
        heldout_fraction: share of the prompts that is not trained on.
        single: rows are marked answers; a pair becomes two of them.

    Raises:
        DataError: no row is left; the message counts the reasons.
    """
    tally = Tally()
    rows = [
        row
        for where, _, said in conversations(datasets, tally)
        for row in _tokenised(said, where, tokenizer, template, tally, max_tokens=max_tokens, single=single)
    ]
    if not rows or (single and len({row.good for row in rows}) < 2):
        reasons = told(tally.left_out, tally.examples) or "all have the same mark"
        raise DataError(
            f"None of the {tally.read} rows can be compared: {reasons}.",
            "Look at the rows: ftadvisor inspect FILE",
            code="no_supervised_tokens",
        )
    heldout, train = split(rows, heldout_fraction)
    answers = [len(row.chosen) + len(row.rejected) for row in train]
    account = {
        "rows": len(train), "heldout_rows": len(heldout), "rows_read": tally.read,
        "tokens": sum(answers) + sum(len(row.prompt) * (2 if row.rejected else 1) for row in train),
        "longest": max(len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in train),
        "supervised_tokens": sum(answers), "left_out": dict(tally.left_out), "examples": tally.examples,
        "sample": _sample(train[0], tokenizer),
    }  # fmt: skip
    return JudgedData(
        train=tuple(train), heldout=tuple(heldout), account=account,
        left_out=told(tally.left_out, tally.examples),
    )  # fmt: skip


def _tokenised(
    said: Conversation, where: str, tokenizer: PreTrainedTokenizerBase, template: Template, tally: Tally,
    *, max_tokens: int, single: bool,
) -> Iterator[Judged]:  # fmt: skip
    answers = [turns for turns in (said.chosen, said.rejected, said.completion) if turns]
    if any(len(turns) != 1 for turns in answers) or not answers or (not single and len(answers) != 2):
        tally.leave_out("not_one_answer_turn", where)
        return
    found = [
        answer_tokens(tokenizer, template, said.prompt, turns[0], said.tools, max_tokens=max_tokens)
        for turns in answers
    ]
    for problem in found:
        if isinstance(problem, str):
            tally.leave_out(problem, where)
            return
    key = hashlib.sha256(orjson.dumps(said.prompt, option=orjson.OPT_SORT_KEYS)).hexdigest()
    prompt, first = found[0]
    if not single:
        yield Judged(key=key, prompt=prompt, chosen=first, rejected=found[1][1])
    elif said.completion:
        yield Judged(key=key, prompt=prompt, chosen=first, good=bool(said.label))
    else:
        yield Judged(key=key, prompt=prompt, chosen=first)
        yield Judged(key=key, prompt=prompt, chosen=found[1][1], good=False)


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, template: Template, prompt: list[Message], answer: Message,
    tools: Tools, *, max_tokens: int,
) -> Any:  # fmt: skip
    """Return (tokens of the prompt, tokens of the answer with its end), or the reason why there are none."""
    try:
        rendered = render_answers(template, [*prompt, answer], tools)
    except TemplateRefusalError:
        return "template_refuses"
    if not rendered.spans:
        return "answer_not_found"
    start, stop = rendered.spans[-1]
    encoded = tokenizer(rendered.text[:stop], add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    begin = next((n for n, (left, _) in enumerate(encoded["offset_mapping"]) if left >= start), len(ids))
    if ids[:begin] != tokenizer.encode(rendered.prompt, add_special_tokens=False):
        return "prompt_differs"
    if len(ids) > max_tokens:
        return "too_long"
    return ids[:begin], ids[begin:]


def _sample(row: Judged, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    parts = ((row.prompt, False), (row.chosen, True), (row.rejected, True))
    return [{"text": tokenizer.decode(ids), "trained": trained} for ids, trained in parts if ids]


def pair_table(rows: Iterable[Judged]) -> Dataset:
    """Return pairs with the column names of TRL's preference trainers."""
    return Dataset.from_list(
        [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
    )


def whole_table(rows: Iterable[Judged]) -> Dataset:
    """Return pairs as two whole conversations each, as a reward model reads them."""
    return Dataset.from_list(
        [{"chosen_ids": row.prompt + row.chosen, "rejected_ids": row.prompt + row.rejected} for row in rows]
    )


def marked_table(rows: Iterable[Judged], *, batch: int) -> Dataset:
    """Return marked answers with the mismatched answer of each batch that KTO's estimate needs.

    The order is that of a hash, so that the marks are mixed; a last batch of one row, which has no other
    answer to be compared with, is left out.
    """
    ordered = sorted(rows, key=lambda row: hashlib.sha256(msgspec.json.encode(row)).digest())
    table = []
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        if len(part) < 2:
            continue
        others = [part[-1], *part[:-1]]
        table += [
            {
                "prompt_ids": row.prompt, "completion_ids": row.chosen, "label": row.good,
                "KL_completion_ids": other.chosen,
            }
            for row, other in zip(part, others, strict=True)
        ]  # fmt: skip
    return Dataset.from_list(table)
