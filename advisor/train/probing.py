"""How much memory and time do real steps take on this device?

Goes in: the order of the supervisor (environment), a dataset, a trainer that is ready. Comes out: the few
rows that answer the question, and one `probe` event. Never does: save, or train on: the process ends after
it, so that the training that follows is not touched by it.

The first step takes the longest rows there are, for the memory; the later ones take batches from the whole
range of lengths, evenly by rank, for the time."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from advisor.run.events import EventWriter
from advisor.train.evaluation import ANSWER_TOKENS, MOST_ROWS, MOST_SECONDS, Evaluator
from advisor.train.memory import peak_memory
from advisor.train.settings import ReinforcementSettings, Settings
from advisor.types import Recipe, Record

ORDER = "FTADVISOR_PROBE"
MOST_ACCUMULATED = 2
"""Micro batches of a step: the second one meets the gradients of the first, and more change nothing."""

WITH_REFERENCE = ("dpo", "kto")
"""Objectives whose trainer scores all rows with the reference before the first step."""
JUDGED_AT_FIRST = ("dpo", "kto", "orpo", "simpo")
"""Objectives whose held-out rows are scored once more, before all else."""
FEW_ANSWERED, MORE_ANSWERED = 2, 8
"""Tokens of each answer in a probe: the difference is what one more token of a batch takes."""


class Order(Record, frozen=True, kw_only=True):
    """What the supervisor asks for, as JSON in the environment."""

    steps: int
    """Typical steps after the one of the longest rows."""
    seconds: float
    """No further typical step begins after so many seconds."""


class Times(Record, frozen=True, kw_only=True):
    """Wall and CPU seconds of one thing."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def scaled(self, factor: float) -> Times:
        """Return both, times `factor`."""
        return Times(seconds=self.seconds * factor, cpu_seconds=self.cpu_seconds * factor)

    def plus(self, other: Times) -> Times:
        """Return the sum."""
        return Times(seconds=self.seconds + other.seconds, cpu_seconds=self.cpu_seconds + other.cpu_seconds)

    def beyond(self, other: Times) -> Times:
        """Return how much more this is than the other; nothing where it is less, as on a busy machine."""
        return Times(
            seconds=max(0.0, self.seconds - other.seconds),
            cpu_seconds=max(0.0, self.cpu_seconds - other.cpu_seconds),
        )


def sum_of(laps: Iterable[Times]) -> Times:
    """Return the sum; nothing of none."""
    total = Times()
    for one in laps:
        total = total.plus(one)
    return total


def mean_of(laps: Sequence[Times]) -> Times:
    """Return the mean; nothing of none."""
    return sum_of(laps).scaled(1 / max(len(laps), 1))


class Probe:
    """Chooses the rows of a probe and remembers what they stand for."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.steps_planned = 0
        self.longest_tokens = 0
        self.typical_tokens: list[int] = []
        """Longest row of each typical batch, in order."""
        self.mean_tokens = 0.0
        """Longest row of a batch, in the mean over the whole data."""
        self.batches = 0
        """Micro batches of one pass over the data."""
        self.heldout_tokens = self.heldout_taken = self.scored_tokens = 0
        """Tokens held out, padding counted; taken of them by the probe; scored of them by an evaluation."""

    def rows(self, dataset: Any, settings: Settings) -> Any:
        """Return the longest rows of `dataset`, then typical batches, in the order of training."""
        sizes = row_tokens(dataset)
        self.longest_tokens = max(sizes)
        if isinstance(settings, ReinforcementSettings):
            self.steps_planned = _steps(len(sizes) * settings.num_generations, settings)
            longest = sorted(range(len(sizes)), key=lambda n: -sizes[n])
            wanted = settings.effective_batch // settings.num_generations * (1 + self.order.steps)
            return dataset.select(longest[:wanted])
        if settings.packing:
            self.steps_planned = _steps(math.ceil(sum(sizes) / settings.max_seq_len), settings)
            return dataset.select(self._packed(sizes, settings))
        self.steps_planned = _steps(len(sizes), settings)
        return dataset.select(
            self._padded(sizes, settings, fixed="KL_completion_ids" in dataset.column_names)
        )

    def share_of(self, batches: int) -> float:
        """Return the tokens of a mean batch of the whole data for each token of the first typical batches."""
        measured = self.typical_tokens[:batches]
        return self.mean_tokens * len(measured) / sum(measured) if measured else 1.0

    def heldout(self, sizes: Sequence[int], settings: Settings) -> list[int]:
        """Return which held-out rows to measure on: those of one batch, the longest."""
        micro = settings.micro_batch
        longest = sorted(range(len(sizes)), key=lambda n: -sizes[n])[:micro]
        parts = [sizes[n : n + micro] for n in range(0, len(sizes), micro)]
        self.heldout_tokens += sum(len(part) * max(part) for part in parts)
        self.heldout_taken += sum(len(longest) * sizes[n] for n in longest[:1])
        self.scored_tokens += sum(sizes[:MOST_ROWS])
        return longest

    def _packed(self, sizes: list[int], settings: Settings) -> list[int]:
        wanted = (1 + self.order.steps) * accumulated(settings) * settings.micro_batch * settings.max_seq_len
        chosen, tokens = [], 0
        for n in random.Random(0).sample(range(len(sizes)), len(sizes)):
            if tokens >= wanted:
                break
            chosen.append(n)
            tokens += sizes[n]
        return chosen

    def _padded(self, sizes: list[int], settings: Settings, *, fixed: bool) -> list[int]:
        """Rows of the longest batches, then of batches at even ranks of the padded lengths."""
        micro, each = settings.micro_batch, accumulated(settings)
        rows = list(range(len(sizes)))
        if not fixed:
            random.Random(0).shuffle(rows)
        groups = [rows[n : n + micro] for n in range(0, len(rows), micro)]
        whole = [group for group in groups if len(group) == micro] or groups
        ranked = sorted(whole, key=lambda group: max(sizes[n] for n in group))
        if fixed:
            first = [n for group in (ranked[-each:] * each)[:each] for n in group]
        else:
            longest = sorted(range(len(sizes)), key=lambda n: -sizes[n])
            first = (longest * math.ceil(micro * each / len(longest)))[: micro * each]
        chosen, self.batches = typical(len(ranked), self.order.steps, each), len(ranked)
        self.typical_tokens = [max(sizes[n] for n in ranked[rank]) for rank in chosen]
        self.mean_tokens = sum(max(sizes[n] for n in group) for group in ranked) / len(ranked)
        return [*first, *(n for rank in chosen for n in ranked[rank])]


def asked() -> Probe | None:
    """Return the probe that the supervisor asked this process for."""
    text = os.environ.get(ORDER)
    return Probe(msgspec.json.decode(text, type=Order)) if text else None


def accumulated(settings: Settings) -> int:
    """Return the micro batches of one step of a probe."""
    each = settings.effective_batch // settings.micro_batch
    return each if isinstance(settings, ReinforcementSettings) else min(each, MOST_ACCUMULATED)


def arguments(probe: Probe, settings: Settings) -> dict[str, Any]:
    """Return what the trainer's arguments are in a probe, where they differ from the recipe's."""
    return {
        "max_steps": 1 + probe.order.steps,
        "gradient_accumulation_steps": accumulated(settings),
        "save_strategy": "no",
        "report_to": "none",
    }


def typical(batches: int, steps: int, each: int) -> list[int]:
    """Return ranks of batches (0 is the shortest), evenly spread; the batches of one step balance each other.

    Args:
        batches: how many there are.
        steps: how many steps to fill.
        each: batches of a step, 1 or 2.
    """
    wanted = steps * each
    ranks = [min(batches - 1, int((n + 0.5) * batches / wanted)) for n in range(wanted)]
    pairs = [[ranks[n]] if each == 1 else [ranks[n], ranks[wanted - 1 - n]] for n in range(steps)]
    middle_first = sorted(pairs, key=lambda pair: abs(sum(pair) / len(pair) - (batches - 1) / 2))
    return [rank for pair in middle_first for rank in pair]


def row_tokens(dataset: Any) -> list[int]:
    """Return the length of each row as the model sees it; of prompts that are still text, the characters."""

    def lengths(name: str) -> list[int]:
        return [len(ids) for ids in dataset[name]]

    names = dataset.column_names
    if "input_ids" in names:
        return lengths("input_ids")
    if "prompt" in names:
        return [sum(len(str(turn["content"])) for turn in prompt) for prompt in dataset["prompt"]]
    answers = [lengths(name) for name in names if name.endswith("_ids") and name != "prompt_ids"]
    before = lengths("prompt_ids") if "prompt_ids" in names else [0] * len(dataset)
    return [start + max(ends) for start, *ends in zip(before, *answers, strict=True)]


def _steps(rows: int, settings: Settings) -> int:
    """Return the optimizer steps of the whole training, as the trainer counts them."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(rows / settings.micro_batch)
    return math.ceil(
        max(1, math.ceil(batches / (settings.effective_batch // settings.micro_batch))) * settings.epochs
    )


class _Watch:
    """A clock of wall and CPU seconds; waits for the device first."""

    def __init__(self) -> None:
        self._since = self._now()

    def lap(self) -> Times:
        """Return what passed since the last lap."""
        now, since = self._now(), self._since
        self._since = now
        return Times(seconds=now[0] - since[0], cpu_seconds=now[1] - since[1])

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic(), time.process_time()


class _Stopwatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Times each step: its micro batches, and the rest."""

    def __init__(self, most_seconds: float) -> None:
        self.micro: list[Times] = []
        self.rest: list[Times] = []
        self._most = most_seconds
        self._watch = _Watch()
        self._typical_since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._watch.lap()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The micro batches are done."""
        self.micro.append(self._watch.lap())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is done; the first was that of the longest rows."""
        self.rest.append(self._watch.lap())
        if state.global_step == 1:
            self._typical_since = time.monotonic()
        elif time.monotonic() - self._typical_since > self._most:
            control.should_training_stop = True


def measure_steps(
    probe: Probe,
    trainer: Any,
    recipe: Recipe,
    settings: Settings,
    events: EventWriter,
    *,
    measure: Callable[[], dict[str, Any]],
    evaluator: Evaluator | None,
) -> None:
    """Evaluate once, train the few steps, and tell what they took.

    Args:
        probe: chose the rows that the trainer has.
        trainer: with `arguments`.
        recipe: its objective is read.
        settings: of the recipe.
        events: where the `probe` event goes.
        measure: the evaluation, on the rows that `probe` left of the held-out ones.
        evaluator: asks questions before and after the training; None where none are asked.
    """
    process = psutil.Process()
    ready = Times(seconds=time.time() - process.create_time(), cpu_seconds=time.process_time())
    trainer.args.train_sampling_strategy = "sequential"
    evaluation, asking, reference = _beside_the_steps(
        probe, trainer, recipe, settings, measure=measure, evaluator=evaluator
    )
    stopwatch = _Stopwatch(probe.order.seconds)
    trainer.add_callback(stopwatch)
    trainer.train()
    peak, whole = peak_memory(), _whole(probe, stopwatch, settings)
    before = 2 if recipe.objective in JUDGED_AT_FIRST else 1
    passes = before + 1 + (probe.steps_planned - 1) // settings.save_every_steps
    once = ready.plus(reference).plus(asking).plus(evaluation.scaled(passes))
    total = once.plus(whole.scaled(probe.steps_planned))
    events.write(
        "probe",
        longest_tokens=probe.longest_tokens,
        micro_batch=settings.micro_batch,
        steps_measured=len(stopwatch.rest),
        steps_planned=probe.steps_planned,
        measured_peak_bytes=peak["memory_bytes"],
        allocated_bytes=peak.get("allocated_bytes"),
        ready_seconds=ready.seconds,
        reference_seconds=reference.seconds,
        evaluation_seconds=evaluation.seconds,
        evaluations=passes,
        asking_seconds=asking.seconds,
        seconds_per_step=whole.seconds,
        seconds=total.seconds,
        cpu_seconds_per_step=whole.cpu_seconds,
        cpu_seconds=total.cpu_seconds,
    )


def _beside_the_steps(
    probe: Probe,
    trainer: Any,
    recipe: Recipe,
    settings: Settings,
    *,
    measure: Callable[[], dict[str, Any]],
    evaluator: Evaluator | None,
) -> tuple[Times, Times, Times]:
    """Return what one evaluation of all held-out rows, all questions, and the reference take."""
    watch = _Watch()
    measure()  # the first of a process warms up
    watch.lap()
    measure()
    evaluation = watch.lap().scaled(probe.heldout_tokens / max(probe.heldout_taken, 1))
    asking = _asking(probe, evaluator, watch) if evaluator is not None else Times()
    reference = _reference(probe, trainer, settings, watch) if recipe.objective in WITH_REFERENCE else Times()
    return evaluation, asking, reference


def _asking(probe: Probe, evaluator: Evaluator, watch: _Watch) -> Times:
    """Return what scoring rows and answering questions takes, before and after the training together.

    Rows are scored once before, and twice after: with their own questions and with others'.
    """
    evaluator.score()  # the first in the weights' own type warms up
    watch.lap()
    evaluator.score()
    rows = watch.lap().scaled(probe.scored_tokens / max(probe.heldout_taken, 1))
    each = {size: _batch(evaluator, size, watch) for size in dict.fromkeys(evaluator.batches)}
    return sum_of(
        scored.plus(_begun([each[size] for size in evaluator.batches], MOST_SECONDS - scored.seconds))
        for scored in (rows, rows.scaled(2))
    )


def _batch(evaluator: Evaluator, size: int, watch: _Watch) -> Times:
    """Return what answering `size` questions together takes."""
    evaluator.answer(FEW_ANSWERED, questions=size)  # the first of a size warms up
    watch.lap()
    evaluator.answer(FEW_ANSWERED, questions=size)
    few = watch.lap()
    evaluator.answer(MORE_ANSWERED, questions=size)
    token = watch.lap().beyond(few).scaled(1 / (MORE_ANSWERED - FEW_ANSWERED))
    return few.plus(token.scaled(ANSWER_TOKENS - FEW_ANSWERED))


def _begun(batches: Sequence[Times], seconds: float) -> Times:
    """Return what the batches take that are begun, one after the other, in so many seconds."""
    total = Times()
    for batch in batches:
        if total.seconds >= seconds:
            break
        total = total.plus(batch)
    return total


def _reference(probe: Probe, trainer: Any, settings: Settings, watch: _Watch) -> Times:
    """Return what the reference's log-probabilities of all rows take, by the typical batches."""
    laps = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        if number < accumulated(settings):  # the longest rows
            continue
        watch.lap()
        trainer.compute_ref_log_probs(trainer.model, batch)
        laps.append(watch.lap())
    return mean_of(laps).scaled(probe.share_of(len(laps)) * probe.batches)


def _whole(probe: Probe, watch: _Stopwatch, settings: Settings) -> Times:
    """Return what a mean step of the recipe takes; the first of a process warms up and does not count."""
    micro, rest = watch.micro[1:] or watch.micro, watch.rest[1:] or watch.rest
    times = settings.effective_batch // settings.micro_batch / accumulated(settings)
    computed, other = mean_of(micro), mean_of(rest)
    return computed.scaled(times * probe.share_of(len(micro) * accumulated(settings))).plus(other)
