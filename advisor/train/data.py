"""Turns the rows of a recipe's datasets into tokens and labels, and proves that only answers are trained on.

Goes in: datasets, a tokenizer with its template. Comes out: rows to train on, rows held out, and an account
of every row: trained tokens, what was left out and why, one row shown with its mask. Never does: cut an
answer in the middle; drop a row without counting it; let the order of the rows decide the split.

Rows longer than `max_seq_len` are cut after the last whole answer that fits; where none fits, the row is left
out. So an end token is never lost."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import orjson
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from advisor.errors import DataError, ModelError
from advisor.rows import Conversation, RowProblem, infer_mapping, read_rows, to_messages
from advisor.templates import TemplateRefusalError
from advisor.train.answers import Rendered, Template, render_answers, rewritten_answers
from advisor.train.settings import SftSettings
from advisor.types import RecipeDataset, Record

IGNORED = -100
"""Label of a token that is not trained on; torch's convention."""
BATCH_ROWS = 512
ROWS_TO_INFER_FROM = 50
PROMPTS_CHECKED = 1000
"""In so many rows the prompt's tokens are compared with the beginning of the row's tokens."""
SAMPLE_TOKENS = 200
EXAMPLES = 5
REASONS = {
    "too_long": "no whole answer fits into max_seq_len",
    "answer_not_found": "the template does not show where the answer is",
    "prompt_differs": "the tokens of the prompt are not the beginning of the tokens of the row",
    "template_refuses": "the chat template refuses the conversation",
    "nothing_trained": "no token of it is trained on",
    "mixing": "its dataset has more rows than its share of the mixture",
    "not_one_answer_turn": "it does not hold exactly the judged answers, one turn each",
    "replay": "more earlier data than the share to replay",
}


class Row(Record, frozen=True, kw_only=True):
    """One tokenised row."""

    tokens: Any
    """Token ids, numpy int32 of shape (tokens,)."""
    labels: Any
    """The same ids where trained on, else -100; numpy int32 of shape (tokens,)."""
    key: str
    """Hash of the row's content: decides the split."""
    dataset: str
    """Name of the dataset it came from."""
    content: bytes
    """The conversation as JSON."""
    cut: bool
    """Whether turns were left away at its end."""


class HasKey(Protocol):
    """A row with the hash that decides on which side of the split it lies."""

    @property
    def key(self) -> str: ...


Keyed = TypeVar("Keyed", bound=HasKey)


class Account(Record, frozen=True, kw_only=True):
    """What became of the rows; the fields of the `data` event."""

    rows: int
    heldout_rows: int
    rows_read: int
    rows_cut: int
    tokens: int
    longest: int
    supervised_tokens: int
    supervised_min: int
    supervised_mean: float
    supervised_max: int
    left_out: dict[str, int]
    """Reason -> rows."""
    examples: dict[str, list[str]]
    """Reason -> up to five `dataset row n`."""
    end_trained_rows: int
    """Rows whose last trained token ends an answer or a tool call."""
    marked_template: bool
    prompts_checked: int
    sample: list[dict[str, Any]]
    """One row as pieces {text, trained}."""

    def as_fields(self) -> dict[str, object]:
        """Return the fields of the `data` event."""
        return dict(msgspec.to_builtins(self))

    def warning(self) -> str:
        """Say what was left out."""
        return f"Not every row is trained on: {told(self.left_out, self.examples)}."


class Prepared(Record, frozen=True, kw_only=True):
    """Tokenised data, ready for the trainer."""

    train: Any
    """datasets.Dataset with input_ids and labels."""
    heldout: dict[str, Any]
    """Rows that are not trained on, by dataset."""
    heldout_content: tuple[bytes, ...]
    """The conversations held out, each one JSON object with `messages`, `tools` and `dataset`, its name."""
    account: Account


class _Item(Record, frozen=True, kw_only=True):
    where: str
    key: str
    dataset: str
    content: bytes
    rendered: Rendered


class Tally:
    """Counts what is left out, with examples."""

    def __init__(self) -> None:
        self.read = 0
        self.checked = 0
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(where)

    def leave_out_many(self, reason: str, count: int) -> None:
        if count:
            self.left_out[reason] += count


def conversations(
    datasets: tuple[RecipeDataset, ...], tally: Tally
) -> Iterator[tuple[str, RecipeDataset, Conversation]]:
    """Yield (`dataset row n`, its dataset, what the row says); a row that says nothing usable is counted.

    Args:
        datasets: paths are absolute, or relative to the working folder; a mapping that is not given is read
            off the first rows.
        tally: counts what was read and what was left out.

    Raises:
        DataError: a file cannot be read.
    """
    for one in datasets:
        numbered = read_rows(Path(one.path), format=one.format)
        head = list(itertools.islice(numbered, ROWS_TO_INFER_FROM))
        mapping = one.mapping or infer_mapping([row for _, row in head], where=one.path)[1]
        for number, row in itertools.chain(head, numbered):
            tally.read += 1
            where = f"{one.name} row {number}"
            try:
                said = to_messages(row, one.kind, mapping)
            except RowProblem as problem:
                tally.leave_out(problem.code, where)
            else:
                yield where, one, said


def prepare(
    datasets: tuple[RecipeDataset, ...],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: SftSettings,
) -> Prepared:
    """Read, render, tokenise, label and split.

    Args:
        datasets: paths are absolute, or relative to the working folder.
        tokenizer: with the end token already settled.
        template: of that tokenizer.
        settings: max_seq_len, loss_on, heldout_fraction, replay_fraction and the two of mixing are read.

    Raises:
        DataError: a file cannot be read, or no row is left to train on; the message counts the reasons.
        ModelError: the tokenizer cannot say where its tokens lie in the text.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "This tokenizer does not tell where its tokens lie in the text.", "Choose another model."
        )
    tally = Tally()
    rendered = _rendered(datasets, template, tally, answers_only=settings.loss_on == "assistant")
    rows = list(_tokenised(rendered, tokenizer, settings, tally))
    if not rows:
        raise DataError(
            f"None of the {tally.read} rows can be trained on: {told(tally.left_out, tally.examples)}.",
            "Plan again with a longer --set max_seq_len=..."
            if tally.left_out.most_common(1)[0][0] == "too_long"
            else "Look at the rows: ftadvisor inspect FILE",
            code="no_supervised_tokens",
        )
    heldout, rest = split(rows, settings.heldout_fraction)
    earlier = {one.name for one in datasets if one.role == "earlier_task"}
    old = [row for row in rest if row.dataset in earlier]
    new = mix(
        [row for row in rest if row.dataset not in earlier],
        cap=settings.mixing_cap,
        temperature=settings.mixing_temperature,
    )
    replayed = replay(old, share=settings.replay_fraction, new_rows=len(new))
    train = [*new, *replayed]
    tally.leave_out_many("mixing", len(rest) - len(old) - len(new))
    tally.leave_out_many("replay", len(old) - len(replayed))
    if not train:
        raise DataError("No row is left to train on.", "Give data of the new task: --data", code="no_rows")
    ends = [tokenizer.convert_tokens_to_ids(end) for end in (template.end, template.call_end) if end]
    trained = [int((row.labels != IGNORED).sum()) for row in train]
    account = Account(
        rows=len(train),
        heldout_rows=len(heldout),
        rows_read=tally.read,
        rows_cut=sum(row.cut for row in rows),
        tokens=sum(len(row.tokens) for row in train),
        longest=max(len(row.tokens) for row in train),
        supervised_tokens=sum(trained),
        supervised_min=min(trained),
        supervised_mean=round(sum(trained) / len(train), 1),
        supervised_max=max(trained),
        left_out=dict(tally.left_out),
        examples=tally.examples,
        end_trained_rows=sum(int(row.labels[row.labels != IGNORED][-1] in ends) for row in train),
        marked_template=template.marked,
        prompts_checked=tally.checked,
        sample=_sample(train[0], tokenizer),
    )
    return Prepared(
        train=table(train),
        heldout=by_dataset(heldout),
        heldout_content=tuple(
            orjson.dumps({**orjson.loads(content), "dataset": name})
            for content, name in {row.content: row.dataset for row in heldout}.items()
        ),
        account=account,
    )


def split(rows: list[Keyed], fraction: float) -> tuple[list[Keyed], list[Keyed]]:
    """Return (held out, trained): the same rows whatever their order; equal rows are on the same side.

    A fraction above zero holds at least one row out, unless all rows are equal.
    """
    keys = sorted({row.key for row in rows})
    wanted = min(len(keys) - 1, max(1, round(len(keys) * fraction))) if fraction > 0 else 0
    chosen = set(keys[:wanted])
    return [row for row in rows if row.key in chosen], [row for row in rows if row.key not in chosen]


def mix(rows: list[Row], *, cap: int, temperature: float) -> list[Row]:
    """Return the rows of several datasets in the wanted proportion; of one dataset, all of them.

    Rows are only left out, never repeated; which ones depends on their content alone.

    Args:
        rows: to train on.
        cap: most rows of one dataset; 0: no limit.
        temperature: shares are in proportion to rows ** (1 / temperature).

    Source: flan-mixtures.
    """
    sizes = Counter(row.dataset for row in rows)
    if len(sizes) < 2:
        return rows
    sizes = Counter({name: min(size, cap or size) for name, size in sizes.items()})
    weights = {name: size ** (1 / temperature) for name, size in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values())
    wanted = {name: min(size, round(weights[name] * scale)) for name, size in sizes.items()}
    keys = {
        name: {row.key for row in sorted((r for r in rows if r.dataset == name), key=lambda r: r.key)[:count]}
        for name, count in wanted.items()
    }
    return [row for row in rows if row.key in keys[row.dataset]]


def replay(rows: list[Row], *, share: float, new_rows: int) -> list[Row]:
    """Return so many earlier rows that they are `share` of all, every earlier dataset alike.

    A dataset with fewer rows than its part leaves the rest to the others; rows are never repeated.
    """
    wanted = round(share / (1 - share) * new_rows)
    queues = [
        sorted((row for row in rows if row.dataset == name), key=lambda row: row.key)
        for name in sorted({row.dataset for row in rows})
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((row for row in turns if row is not None), wanted))


def by_dataset(rows: list[Row]) -> dict[str, Dataset]:
    """Return rows as tables, one for each dataset."""
    names = dict.fromkeys(row.dataset for row in rows)
    return {name: table([row for row in rows if row.dataset == name]) for name in names}


def _rendered(
    datasets: tuple[RecipeDataset, ...], template: Template, tally: Tally, *, answers_only: bool
) -> Iterator[_Item]:
    for where, one, said in conversations(datasets, tally):
        if not said.messages:
            raise DataError(
                f"Data of the kind {one.kind!r} holds no answers to train on.",
                "Supervised fine-tuning needs questions with answers.",
            )
        try:
            rendered = render_answers(template, said.messages, said.tools)
        except TemplateRefusalError:
            tally.leave_out("template_refuses", where)
            continue
        turns = {"messages": said.messages, **({"tools": said.tools} if said.tools else {})}
        content = orjson.dumps(turns, option=orjson.OPT_SORT_KEYS)
        key = hashlib.sha256(content).hexdigest()
        alone = rewritten_answers(template, said.messages, said.tools, rendered) if answers_only else ()
        for part in (*alone, rendered):
            yield _Item(where=where, key=key, dataset=one.name, content=content, rendered=part)


def _tokenised(
    items: Iterator[_Item], tokenizer: PreTrainedTokenizerBase, settings: SftSettings, tally: Tally
) -> Iterator[Row]:
    while batch := list(itertools.islice(items, BATCH_ROWS)):
        encoded = tokenizer(
            [item.rendered.text for item in batch], add_special_tokens=False, return_offsets_mapping=True
        )
        for item, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            row = _labelled(item, np.array(ids, np.int32), np.array(offsets).reshape(-1, 2), settings)
            if isinstance(row, str):
                tally.leave_out(row, item.where)
            elif (
                not row.cut
                and tally.checked < PROMPTS_CHECKED
                and _prompt_differs(item, row, tokenizer, tally)
            ):
                tally.leave_out("prompt_differs", item.where)
            else:
                yield row


def _labelled(item: _Item, ids: Any, offsets: Any, settings: SftSettings) -> Row | str:
    """Return the row with labels, or the reason why it cannot be trained on.

    Args:
        item: the rendered row.
        ids: token ids of shape (tokens,).
        offsets: characters [begin, end) of each token, of shape (tokens, 2).
        settings: max_seq_len and loss_on are read.
    """
    if not item.rendered.spans:
        return "answer_not_found"
    begins, ends = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(ids), bool)
    keep = 0
    for start, stop in item.rendered.spans:
        answer = (begins >= start) & (ends <= stop) & (ends > begins)
        length = int(np.searchsorted(ends, stop, side="right"))
        if length > settings.max_seq_len:
            break
        inside |= answer
        keep = length
    if keep == 0:
        return "too_long"
    cut = len(ids) > settings.max_seq_len
    stop_at = keep if cut else len(ids)
    trained = np.ones(stop_at, bool) if settings.loss_on == "all" else inside[:stop_at]
    # The first token has nothing before it to be predicted from.
    if not trained[1:].any():
        return "nothing_trained"
    labels = np.where(trained, ids[:stop_at], IGNORED).astype(np.int32)
    return Row(
        tokens=ids[:stop_at],
        labels=labels,
        key=item.key,
        dataset=item.dataset,
        content=item.content,
        cut=cut,
    )


def _prompt_differs(item: _Item, row: Row, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> bool:
    """Tell whether the model would be given other tokens before the last answer than it was trained with."""
    tally.checked += 1
    prompt = tokenizer.encode(item.rendered.prompt, add_special_tokens=False)
    return bool(row.tokens[: len(prompt)].tolist() != prompt)


def _sample(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Show a row as pieces that are trained on and pieces that are not."""
    pairs = zip(
        row.tokens[:SAMPLE_TOKENS].tolist(), (row.labels[:SAMPLE_TOKENS] != IGNORED).tolist(), strict=True
    )
    return [
        {"text": tokenizer.decode([token for token, _ in group]), "trained": trained}
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]


def told(left_out: Mapping[str, int], examples: Mapping[str, list[str]]) -> str:
    """Return the reasons with their counts, the most frequent first."""
    return "; ".join(
        f"{count} rows: {REASONS.get(reason, reason)}"
        + (f" (for example {examples[reason][0]})" if reason in examples else "")
        for reason, count in sorted(left_out.items(), key=lambda pair: -pair[1])
    )


def table(rows: list[Row]) -> Dataset:
    """Return rows as the trainer takes them."""
    return Dataset.from_dict(
        {"input_ids": [row.tokens for row in rows], "labels": [row.labels for row in rows]}
    )
