"""Prompts for reinforcement, and how good the model's own answers are before and after.

Goes in: prompts with or without answers, a trainer. Comes out: rows, mean rewards of sampled answers. Never
does: move the random state of the training; begin a training in which every answer gets the same mark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler

from advisor.errors import DataError, RefusedError
from advisor.templates import TemplateRefusalError
from advisor.train.answers import Template, render_prompt
from advisor.train.data import Tally, conversations, told
from advisor.train.evaluation import Evaluator
from advisor.train.rewards import Reward, rewards_of
from advisor.train.session import HELDOUT, Session, carry_out, open_model, open_tokenizer, trainer_arguments
from advisor.train.settings import ReinforcementSettings, read_settings
from advisor.train.tuners import trained_to_fp32
from advisor.types import RecipeDataset, Record

PROBED_PROMPTS, PROBED_SAMPLES = 16, 4
"""So many answers are sampled before and after: enough to see whether any of them differs in its mark."""


class Prompts(Record, frozen=True, kw_only=True):
    """Rows to answer."""

    rows: Any
    """datasets.Dataset with `prompt` (messages) and, where all have one, `reference`."""
    answered: bool
    account: dict[str, Any]
    left_out: str


def prepare_prompts(
    datasets: tuple[RecipeDataset, ...],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: ReinforcementSettings,
) -> Prompts:
    """Read the prompts; one that is longer than max_seq_len is left out and counted.

    Raises:
        DataError: no prompt is left.
    """
    tally = Tally()
    rows, tokens = [], []
    for where, _, said in conversations(datasets, tally):
        try:
            size = len(tokenizer.encode(render_prompt(template, said.prompt), add_special_tokens=False))
        except TemplateRefusalError:
            tally.leave_out("template_refuses", where)
            continue
        if size > settings.max_seq_len:
            tally.leave_out("too_long", where)
            continue
        rows.append({"prompt": said.prompt, "reference": said.reference})
        tokens.append(size)
    if not rows:
        reasons = told(tally.left_out, tally.examples) or "there are none"
        raise DataError(f"No prompt can be used: {reasons}.", "Look at the data: ftadvisor inspect FILE")
    answered = all(row["reference"] is not None for row in rows)
    account = {
        "rows": len(rows), "rows_read": tally.read, "tokens": sum(tokens), "longest": max(tokens),
        "answered": answered, "left_out": dict(tally.left_out), "examples": tally.examples,
    }  # fmt: skip
    if not answered:
        rows = [{"prompt": row["prompt"]} for row in rows]
    return Prompts(
        rows=Dataset.from_list(rows), answered=answered, account=account,
        left_out=told(tally.left_out, tally.examples),
    )  # fmt: skip


class Sampled:
    """The mean mark of answers that the model samples now."""

    def __init__(
        self,
        trainer: Any,
        prompts: Prompts,
        rewards: Sequence[Reward],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        settings: ReinforcementSettings,
    ) -> None:
        self._trainer, self._rewards, self._tokenizer = trainer, rewards, tokenizer
        self._template, self._settings = template, settings
        self._rows = [dict(row) for row in prompts.rows.select(range(min(PROBED_PROMPTS, len(prompts.rows))))]

    def __call__(self) -> dict[str, float | None]:
        """Return the mean reward of sampled answers and its standard error; there is no loss that could be
        compared."""
        marks = self.marks()
        return {
            "loss": None, "reward": statistics.fmean(marks),
            "reward_error": statistics.stdev(marks) / math.sqrt(len(marks)),
            "answers": len(marks),
        }  # fmt: skip

    def refuse_if_all_alike(self) -> None:
        """Refuse what cannot learn: with equal marks for all answers there is nothing to prefer.

        Raises:
            RefusedError: all sampled answers have the same mark.
        """
        marks = self.marks()
        if max(marks) - min(marks) > 0:
            return
        raise RefusedError(
            f"All {len(marks)} answers that were tried have the same mark ({marks[0]:g}), so that there is "
            "nothing to learn from.",
            "Train with examples first (sft), choose easier prompts, or another reward.",
            code="no_reward_signal",
        )

    def marks(self) -> list[float]:
        """Return the weighted mark of each sampled answer, always of the same random numbers."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        was_training, cached = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(0)
            found = [mark for row in self._rows for mark in self._of_row(model, row)]
        model.config.use_cache = cached
        model.train(was_training)
        return found

    def _of_row(self, model: Any, row: dict[str, Any]) -> list[float]:
        settings = self._settings
        text = render_prompt(self._template, row["prompt"])
        ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        device = next(model.parameters()).device
        made = model.generate(
            input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), do_sample=True,
            temperature=settings.temperature, top_k=0, max_new_tokens=settings.max_completion_length,
            num_return_sequences=PROBED_SAMPLES, eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )[:, ids.shape[1] :]  # fmt: skip
        answers = [_until_end(one.tolist(), self._tokenizer.eos_token_id) for one in made]
        columns: dict[str, Any] = {
            "prompts": [row["prompt"]] * len(answers),
            "completions": [
                [{"role": "assistant", "content": self._tokenizer.decode(one, skip_special_tokens=True)}]
                for one in answers
            ],
            "completion_ids": answers,
        }
        if "reference" in row:
            columns["reference"] = [row["reference"]] * len(answers)
        weights = settings.reward_weights or [1.0] * len(self._rewards)
        each = [reward(**columns) for reward in self._rewards]
        return [
            math.fsum(w * m for w, m in zip(weights, marks, strict=True)) for marks in zip(*each, strict=True)
        ]


class PromptOrder(RepeatSampler):  # type: ignore[misc]  # trl is not typed
    """RepeatSampler whose order depends on the epoch alone, so that a resumed run meets the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        """Begin the order of an epoch, counted from 0."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class SameOrder:
    """For TRL's trainers against rewards: they draw the order of an epoch from where the one before left the
    generator, which a run that resumes in a later epoch does not know."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> PromptOrder:
        made = super()._get_train_sampler(dataset)  # type: ignore[misc]  # of the trainer beside it
        return PromptOrder(
            made.data_source, mini_repeat_count=made.mini_repeat_count, batch_size=made.batch_size,
            repeat_count=made.repeat_count, shuffle=made.shuffle, seed=made.seed,
        )  # fmt: skip

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none into the checkpoints folder; the export writes the one that counts."""


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def train_against_rewards(session: Session, trainer_class: Any, arguments_class: Any) -> int:
    """Prompts, rewards, model, training, result; each part is told as an event before the next begins.

    Args:
        session: of the program.
        trainer_class: TRL's trainer, or a subclass.
        arguments_class: the arguments that it takes.

    Returns:
        The exit status.
    """
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, ReinforcementSettings, cuda=torch.cuda.is_available())
    tokenizer, template, ending = open_tokenizer(session)
    tokenizer.padding_side = "left"
    prompts = prepare_prompts(recipe.datasets, tokenizer, template, settings)
    rewards = rewards_of(recipe, settings, tokenizer, template, answered=prompts.answered)
    names = [reward.__name__ for reward in rewards]
    events.write("data", end_token=ending.end, rewards=names, **prompts.account)
    if prompts.left_out:
        events.write("warning", message=f"Not every prompt is used: {prompts.left_out}.")

    model = open_model(session, settings, tokenizer, ending)
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=arguments_class(
            **(trainer_arguments(recipe, settings) | {"include_num_input_tokens_seen": "no"}),
            beta=settings.kl_beta,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            reward_weights=settings.reward_weights or None,
        ),
        train_dataset=session.rows(prompts.rows, settings),
        processing_class=tokenizer,
    )
    if recipe.tuner != "full":
        trained_to_fp32(trainer.model)
    measure = Sampled(trainer, prompts, rewards, tokenizer, template, settings)
    measure.refuse_if_all_alike()
    evaluator = Evaluator(
        trainer, tokenizer, template, settings, model=recipe.model, rows={}, heldout=HELDOUT
    )
    return carry_out(session, trainer, tokenizer, settings, measure=measure, evaluator=evaluator)
