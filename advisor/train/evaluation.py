"""What does a model make of rows and questions that it is not trained on?

Goes in: a model in memory, held-out rows, questions with answers that can be checked. Comes out: Measured.
Never does: judge; sample (all answers are greedy); move the random state of the training."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson
import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase

from advisor.resources import kb_dir
from advisor.templates import TemplateRefusalError
from advisor.train.answers import Template, render_prompt
from advisor.train.data import IGNORED
from advisor.train.generation import generation_inputs
from advisor.train.model import DTYPES, model_place
from advisor.train.settings import Settings
from advisor.train.tuners import virtual_tokens
from advisor.types import Asked, Measured, RecipeModel, RowLoss

PROBES = "general_prompts.jsonl"
"""A model folder may bring its own general questions; else those of kb/probes/ are asked."""
MOST_ROWS, MOST_SAMPLES, MOST_PROBES = 128, 32, 160
ANSWER_TOKENS = 48
TOGETHER = 64
MOST_SECONDS = 60.0
"""Of asking, at each of the two times; on a slow machine fewer questions are asked."""
SHORT_ANSWER = 40
"""Characters. An answer up to here can be compared as a whole, or by its number."""


class Evaluator:
    """Measures a model, whenever it is called, on the same rows and questions."""

    def __init__(
        self, trainer: Any, tokenizer: PreTrainedTokenizerBase, template: Template | None,
        settings: Settings, *, model: RecipeModel, rows: dict[str, Any], heldout: Path,
    ) -> None:  # fmt: skip
        """Remember what to ask.

        Args:
            trainer: holds the model.
            tokenizer: of the model.
            template: None where the model has none; then nothing is asked.
            settings: micro_batch, loss, precision and max_seq_len are read.
            model: whose folder may bring general questions.
            rows: tables with input_ids and labels, by dataset.
            heldout: the same rows as conversations, one JSON object a line; need not exist.
        """
        self._trainer, self._tokenizer, self._template = trainer, tokenizer, template
        self._settings = settings
        self._rows = _in_turn(rows, MOST_ROWS)
        self._samples = read_samples(heldout) if template else []
        self._probes = read_probes(model) if template else []

    def __call__(self, *, swap: bool) -> Measured:
        """Return what the model makes of rows and questions now.

        Args:
            swap: also score each answer behind another row's question.
        """
        begin = time.monotonic()
        with self._asked() as model:
            rows = tuple(self._losses(model, swap=swap))
            samples = tuple(self._ask(model, self._samples, until=begin + MOST_SECONDS / 2))
            probes = tuple(self._ask(model, self._probes, until=begin + MOST_SECONDS))
        seconds = round(time.monotonic() - begin, 2)
        return Measured(rows=rows, samples=samples, probes=probes, seconds=seconds)

    @property
    def batches(self) -> tuple[int, ...]:
        """Questions of each batch of one evaluation, where time does not end it."""
        return tuple(
            min(TOGETHER, len(part) - start)
            for part in (self._samples, self._probes)
            for start in range(0, len(part), TOGETHER)
        )

    def score(self) -> None:
        """Score the rows once, as an evaluation does; to be timed."""
        with self._asked() as model:
            list(self._losses(model, swap=False))

    def answer(self, tokens: int, *, questions: int) -> None:
        """Answer one batch of so many questions, `tokens` tokens each; to be timed."""
        asked = max(self._samples, self._probes, key=len)[:questions]
        with self._asked() as model:
            list(self._ask(model, asked, until=math.inf, most=tokens))

    @contextlib.contextmanager
    def _asked(self) -> Iterator[Any]:
        """Yield the model as it answers, and leave it as it was."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        was_training, cached = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        with torch.no_grad(), self._autocast(model):
            yield model
        model.config.use_cache = cached
        model.train(was_training)

    def _autocast(self, model: Any) -> torch.autocast:
        """On a processor every length of a row would be compiled anew in 16 bits."""
        device = next(model.parameters()).device
        enabled = device.type != "cpu" and self._settings.precision != "fp32"
        return torch.autocast(device.type, dtype=DTYPES[self._settings.precision], enabled=enabled)

    def _losses(self, model: Any, *, swap: bool) -> Iterator[RowLoss]:
        plain = [ids for _, *ids in self._rows]
        longest = self._settings.max_seq_len
        swapped = [_swap(self._rows, n, longest) if swap else None for n in range(len(self._rows))]
        there = [row for row in swapped if row is not None]
        own, other = self._sums(model, plain), iter(self._sums(model, there))
        for (dataset, _, labels), loss, second in zip(self._rows, own, swapped, strict=True):
            tokens = sum(label != IGNORED for label in labels[1:])
            yield RowLoss(
                dataset=dataset, tokens=tokens, loss=loss, swapped=None if second is None else next(other)
            )

    def _sums(self, model: Any, rows: Sequence[Sequence[list[int]]]) -> list[float]:
        """Return the summed loss of the trained tokens of each row [ids, labels]."""
        # As many tokens at a time as a training step holds, which keeps far more of each.
        held = self._settings.micro_batch * self._settings.max_seq_len
        size = max(1, held // max((len(ids) for ids, _ in rows), default=1))
        found: list[float] = []
        for start in range(0, len(rows), size):
            ids, mask, labels = self._padded(model, rows[start : start + size])
            wanted = labels[:, 1:]
            used = (wanted != IGNORED).any(dim=0).nonzero().squeeze(1)
            keep = used + virtual_tokens(self._trainer.model)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
            each = functional.cross_entropy(
                logits.float().transpose(1, 2), wanted[:, used], reduction="none", ignore_index=IGNORED
            )
            found += each.sum(dim=1).tolist()
        return found

    def _padded(self, model: Any, rows: Sequence[Sequence[list[int]]]) -> tuple[torch.Tensor, ...]:
        longest = max(len(ids) for ids, _ in rows)
        pad = self._tokenizer.pad_token_id
        made = (
            [ids + [pad] * (longest - len(ids)) for ids, _ in rows],
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows],
            [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows],
        )
        device = next(model.parameters()).device
        return tuple(torch.tensor(one, device=device) for one in made)

    def _ask(
        self, model: Any, questions: list[dict[str, Any]], *, until: float, most: int = ANSWER_TOKENS
    ) -> Iterator[Asked]:
        """Answer questions greedily, those of similar length together."""
        assert self._template is not None or not questions
        rendered = []
        for question in questions:
            try:
                text = render_prompt(self._template, question["messages"])  # type: ignore[arg-type]
            except TemplateRefusalError:
                continue
            rendered.append((self._tokenizer.encode(text, add_special_tokens=False), question))
        rendered.sort(key=lambda one: len(one[0]))
        for start in range(0, len(rendered), TOGETHER):
            if time.monotonic() > until:
                return
            yield from self._answers(model, rendered[start : start + TOGETHER], most)

    def _answers(
        self, model: Any, batch: list[tuple[list[int], dict[str, Any]]], most: int
    ) -> Iterator[Asked]:
        longest = max(len(ids) for ids, _ in batch)
        pad, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        device = next(model.parameters()).device
        ids = torch.tensor([[pad] * (longest - len(one)) + one for one, _ in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one, _ in batch], device=device)
        speaker, text = generation_inputs(model, ids, mask)
        made = speaker.generate(
            **text,
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=most, eos_token_id=end,
                pad_token_id=pad,
            ),
        )[:, text["input_ids"].shape[1] :].tolist()  # fmt: skip
        for (_, question), tokens in zip(batch, made, strict=True):
            ended = end in tokens
            own = tokens[: tokens.index(end)] if ended else tokens
            answer = self._tokenizer.decode(own, skip_special_tokens=True).strip()
            yield Asked(
                prompt=question["messages"][-1]["content"], answer=answer, tokens=len(own), ended=ended,
                right=_right(answer, question), exact=_exact(answer, question),
                reference=question.get("reference"), skill=question.get("skill", ""),
                dataset=question.get("dataset", ""),
            )  # fmt: skip


def _in_turn(tables: dict[str, Any], most: int) -> list[tuple[str, list[int], list[int]]]:
    """Return (dataset, ids, labels) of up to `most` rows, every dataset alike."""
    each = max(1, most // max(len(tables), 1))
    return [
        (name, list(row["input_ids"]), list(row["labels"]))
        for name, table in tables.items()
        for row in table.select(range(min(each, len(table))))
    ]


def _swap(rows: list[tuple[str, list[int], list[int]]], n: int, most: int) -> list[list[int]] | None:
    """Return the answer of a row behind the question of the next row of its dataset; None where one of them
    has no question or they do not fit."""
    dataset, ids, labels = rows[n]
    same = [other for other in rows if other[0] == dataset]
    _, other, marks = same[(same.index(rows[n]) + 1) % len(same)]
    mine, theirs = _begin(labels), _begin(marks)
    if not mine or not theirs or len(ids) - mine + theirs > most or ids[:mine] == other[:theirs]:
        return None
    return [other[:theirs] + ids[mine:], [IGNORED] * theirs + labels[mine:]]


def _begin(labels: list[int]) -> int:
    """Return where the first answer begins."""
    return next((n for n, label in enumerate(labels) if label != IGNORED), 0)


def read_probes(model: RecipeModel) -> list[dict[str, Any]]:
    """Return general questions: those that lie beside the model, else those of the knowledge base."""
    beside = Path(model_place(msgspec.structs.replace(model, after=None))) / PROBES
    path = beside if beside.is_file() else kb_dir() / "probes" / "general.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    return [{**row, "messages": [{"role": "user", "content": row["prompt"]}]} for row in rows[:MOST_PROBES]]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the questions of held-out conversations: all before the last answer, which is the reference."""
    if not path.is_file():
        return []
    by_dataset: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_bytes().splitlines():
        said = orjson.loads(line)
        by_dataset.setdefault(said.get("dataset", ""), []).append(said)
    each = max(1, MOST_SAMPLES // max(len(by_dataset), 1))
    # Of every dataset alike, spread over its rows.
    chosen = [one for rows in by_dataset.values() for one in rows[:: math.ceil(len(rows) / each)]]
    return [
        {
            "messages": one["messages"][:-1], "dataset": one.get("dataset", ""),
            "reference": str(one["messages"][-1].get("content") or ""),
        }
        for one in chosen
        if not one.get("tools")
        and len(one["messages"]) > 1
        and one["messages"][-1].get("role") == "assistant"
    ]  # fmt: skip


def _right(answer: str, question: dict[str, Any]) -> bool | None:
    """Tell whether an answer is right, where it can be told: an accepted text, a label, a number."""
    if "expect" in question:
        return any(word.casefold() in answer.casefold() for word in question["expect"])
    reference = _reference(question)
    if not reference or len(reference) > SHORT_ANSWER:
        return None
    numbers = re.findall(r"-?\d+(?:\.\d+)?", reference)
    if numbers:
        return re.findall(r"-?\d+(?:\.\d+)?", answer)[-1:] == numbers[-1:]
    return _same(answer, reference)


def _exact(answer: str, question: dict[str, Any]) -> bool | None:
    """Tell whether a long answer is the one of the data, word for word; another one may be as good."""
    reference = _reference(question)
    return _same(answer, reference) if len(reference) > SHORT_ANSWER else None


def _reference(question: dict[str, Any]) -> str:
    return str(question.get("reference", "")).strip()


def _same(answer: str, reference: str) -> bool:
    return answer.casefold().strip(" .") == reference.casefold().strip(" .")
