"""How long are the rows in tokens, and how many of them are answers: counted on a sample.

Goes in: sampled conversations, the model's tokenizer and template. Comes out: `Lengths`. Without a tokenizer
they are estimated from bytes, and say so. Never does: load transformers; count all rows.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from advisor.errors import ModelError
from advisor.probe.model_folder import special_tokens
from advisor.rows import Conversation, Message, rule_table
from advisor.templates import TemplateRefusalError, render, render_with_spans
from advisor.types import DataKind, Histogram, Record

Count = Callable[[str], int]


class Lengths(Record, frozen=True, kw_only=True):
    """Token statistics of a sample; `longest` is that of the longest row of all."""

    mean: float
    p50: int
    p95: int
    longest: int
    histogram: Histogram
    supervised: float | None
    measured: bool
    refused: tuple[int, ...] = ()
    """Rows that the chat template refuses."""
    refusal: str = ""


class Counter:
    """Counts the tokens of rows as training will see them."""

    def __init__(self, tokenizer_file: Path | None, chat_template: str | None) -> None:
        self.template = chat_template
        self.bos = self.eos = ""
        self.measured = tokenizer_file is not None
        if tokenizer_file is None:
            per_token = rule_table("profile")["estimate"]["bytes_per_token"]
            self.count: Count = lambda text: round(len(text.encode()) / per_token)
            return
        tokens = special_tokens(tokenizer_file.parent, {})
        self.bos, self.eos = tokens.bos, tokens.eos
        tokenizer = _load(tokenizer_file)
        self.count = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)

    def row(self, said: Conversation, kind: DataKind) -> tuple[int, int]:
        """Return (tokens, tokens of answers) of one row; of a pair, those of its longer side.

        Raises:
            TemplateRefusalError: the template refuses the conversation.
        """
        if kind in ("raw_text", "documents"):
            total = self.count(said.text or "") + 1
            return total, total
        if said.chosen:
            sides = [self._turns([*said.prompt, *side], said) for side in (said.chosen, said.rejected)]
            return max(sides)[0], self._answers(said.chosen)
        if said.completion:
            return self._turns([*said.prompt, *said.completion], said)[0], self._answers(said.completion)
        if said.messages:
            return self._turns(said.messages, said)
        return self._prompt(said), 0

    def _turns(self, turns: Sequence[Message], said: Conversation) -> tuple[int, int]:
        if self.template is None:
            return sum(self.count(turn["content"]) + 1 for turn in turns), self._answers(turns)
        text, spans = render_with_spans(
            self.template, turns, tools=said.tools, bos_token=self.bos, eos_token=self.eos
        )
        answers = sum(self.count(text[start:end]) for start, end in spans) if spans else self._answers(turns)
        return self.count(text), answers

    def _answers(self, turns: Sequence[Message]) -> int:
        """The answers, each with the token that ends it."""
        return sum(self.count(turn["content"]) + 1 for turn in turns if turn["role"] == "assistant")

    def _prompt(self, said: Conversation) -> int:
        if self.template is None:
            return sum(self.count(turn["content"]) + 1 for turn in said.prompt)
        text = render(
            self.template, said.prompt, tools=said.tools, add_generation_prompt=True,
            bos_token=self.bos, eos_token=self.eos,
        )  # fmt: skip
        return self.count(text)


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as problem:
        raise ModelError(
            f"{file} cannot be read as a tokenizer: {problem}", "Take tokenizer.json from the original model."
        ) from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def measure(
    sample: Sequence[tuple[int, Conversation]],
    longest: tuple[int, int, Conversation] | None,
    kind: DataKind,
    *,
    tokenizer_file: Path | None,
    chat_template: str | None,
) -> Lengths | None:
    """Count the sampled rows.

    Args:
        sample: (row number, conversation), spread over the data.
        longest: (characters, row number, conversation) of the longest row of all.
        kind: of the data.
        tokenizer_file: tokenizer.json of the model; None: estimate from bytes.
        chat_template: of the model; None: plain text.

    Returns:
        The statistics, or None where no row could be counted.
    """
    counter = Counter(tokenizer_file, chat_template)
    totals: list[int] = []
    answers: list[int] = []
    refused: list[int] = []
    refusal = ""
    for number, said in sample:
        try:
            total, answered = counter.row(said, kind)
        except TemplateRefusalError as problem:
            refused.append(number)
            refusal = refusal or problem.message
            continue
        totals.append(total)
        answers.append(answered)
    if not totals:
        return None
    most = max(totals)
    if longest is not None:
        with contextlib.suppress(TemplateRefusalError):
            most = max(most, counter.row(longest[2], kind)[0])
    ordered = sorted(totals)
    return Lengths(
        mean=round(sum(totals) / len(totals), 1),
        p50=_rank(ordered, 0.50),
        p95=_rank(ordered, 0.95),
        longest=most,
        histogram=_histogram(ordered, most),
        supervised=round(sum(answers) / len(answers), 1) if any(answers) else None,
        measured=counter.measured,
        refused=tuple(refused),
        refusal=refusal,
    )


def _rank(ordered: Sequence[int], share: float) -> int:
    """The nearest-rank percentile."""
    return ordered[max(0, min(len(ordered) - 1, int(-(-share * len(ordered) // 1)) - 1))]


def _histogram(ordered: Sequence[int], most: int) -> Histogram:
    edges = [edge for edge in rule_table("profile")["histogram"]["edges"] if edge < most]
    edges.append(most)
    counts, below = [], 0
    for edge in edges:
        upto = bisect.bisect_right(ordered, edge)
        counts.append(upto - below)
        below = upto
    return Histogram(edges=tuple(edges), counts=tuple(counts))


def pair_similarity(sample: Sequence[tuple[int, Conversation]]) -> float | None:
    """Return how alike chosen and rejected answers are: the mean share of words they have in common."""
    shares = []
    for _, said in sample:
        left, right = (_words(side) for side in (said.chosen, said.rejected))
        if left or right:
            shares.append(2 * len(left & right) / (len(left) + len(right)))
    return round(sum(shares) / len(shares), 3) if shares else None


def _words(turns: Sequence[Message]) -> set[str]:
    return {word for turn in turns for word in turn["content"].split()}
