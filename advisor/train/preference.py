"""Trainers for judged answers: TRL's for DPO, KTO and reward models, our own two losses without a reference.

Goes in: rows that are tokens already. Comes out: trainers; margins and accuracies on rows that are not
trained on. Never does: tokenise; keep a second copy of the weights (the reference's log-probabilities are
computed once, before the first step)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from advisor.train.data import IGNORED
from advisor.train.evaluation import Evaluator
from advisor.train.pairs import Judged, open_judged, pair_table, whole_table
from advisor.train.session import HELDOUT, Session, carry_out, open_model, open_tokenizer, trainer_arguments
from advisor.train.settings import Settings
from advisor.train.trainer import batches, chunked_head, judging, pad_multiple
from advisor.train.tuners import trained_to_fp32

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the log-probabilities of the chosen and rejected answers (batch,) and their lengths (batch,) to the
loss."""


def train_without_reference(session: Session, settings: Settings, pair_loss: Loss) -> int:
    """Data, model, training, result for a loss that needs no reference model; returns the exit status."""
    tokenizer, template, ending = open_tokenizer(session)
    data = open_judged(session, settings, tokenizer, template, ending)
    model = open_model(session, settings, tokenizer, ending)
    if session.recipe.tuner != "full":
        trained_to_fp32(model)
    chunked = settings.loss == "chunked"
    if chunked:
        add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)
    trainer = PairTrainer(
        pair_loss=pair_loss,
        collate=collator(settings, pad_id=ending.pad_id),
        chunked=chunked,
        model=model,
        args=TrainingArguments(**trainer_arguments(session.recipe, settings), remove_unused_columns=False),
        train_dataset=session.rows(pair_table(data.train), settings),
        processing_class=tokenizer,
    )
    measure = HeldOutPairs(trainer, data.heldout, settings, pad_id=ending.pad_id)
    evaluator = Evaluator(
        trainer, tokenizer, template, settings, model=session.recipe.model, rows={}, heldout=HELDOUT
    )
    return carry_out(session, trainer, tokenizer, settings, measure=measure, evaluator=evaluator)


class ReadyRows:
    """For TRL's trainers: the rows are tokens with verified borders, so nothing is prepared any more."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none into the checkpoints folder; the export writes the one that counts."""


class ReadyDpoTrainer(ReadyRows, DPOTrainer):  # type: ignore[misc]  # trl is not typed
    """DPOTrainer for rows that are tokens."""


class ReadyKtoTrainer(ReadyRows, KTOTrainer):  # type: ignore[misc]  # trl is not typed
    """KTOTrainer for rows that are tokens, in batches that are made already."""


class ReadyRewardTrainer(ReadyRows, RewardTrainer):  # type: ignore[misc]  # trl is not typed
    """RewardTrainer for rows that are tokens."""


class PairTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trains on pairs with a loss of their log-probabilities alone."""

    def __init__(self, *, pair_loss: Loss, collate: Any, chunked: bool, **rest: Any) -> None:
        super().__init__(data_collator=collate, **rest)
        self.pair_loss = pair_loss
        self.chunked = chunked
        # The loss is a mean over pairs, so the trainer must divide it by the accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of transformers
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean loss of the pairs."""
        sums, lengths = answer_logps(model, inputs, chunked=self.chunked)
        (chosen, rejected), (long, short) = sums.chunk(2), lengths.chunk(2)
        return self.pair_loss(chosen, rejected, long, short)


def collator(settings: Settings, *, pad_id: int) -> DataCollatorForPreference:
    """Return what makes a batch of pairs: prompts and answers joined, padded as the trainer of SFT pads."""
    return DataCollatorForPreference(pad_token_id=pad_id, pad_to_multiple_of=pad_multiple(settings))


def answer_logps(
    model: torch.nn.Module, batch: dict[str, Any], *, chunked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability of each answer (2 x batch,) and its number of tokens.

    Args:
        model: a language model; for `chunked` with TRL's head that never holds all logits.
        batch: as `collator` makes it.
        chunked: compute the logits tile by tile.
    """
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    attended = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
    if chunked:
        labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORED)
        return model(**attended, labels=labels, fused_lm_head=True).log_probs.sum(1), mask.sum(1)
    logits = model(**attended).logits[:, :-1]
    # Only where an answer is: a whole row of fp32 logits would be several times the size of everything else.
    picked = functional.cross_entropy(logits[mask].float(), ids[:, 1:][mask], reduction="none")
    each = torch.zeros(mask.shape, dtype=picked.dtype, device=picked.device).masked_scatter(mask, -picked)
    return each.sum(1), mask.sum(1)


def orpo_loss(beta: float) -> Loss:
    """Return SFT loss on the chosen answers plus `beta` times the odds ratio term. Source: orpo-readme."""

    def loss(
        chosen: torch.Tensor, rejected: torch.Tensor, long: torch.Tensor, short: torch.Tensor
    ) -> torch.Tensor:
        better, worse = chosen / long, rejected / short
        odds = better - worse - (torch.log1p(-better.exp()) - torch.log1p(-worse.exp()))
        return -(chosen.sum() / long.sum()) - beta * functional.logsigmoid(odds).mean()

    return loss


def simpo_loss(beta: float, gamma: float) -> Loss:
    """Return the loss of the length-normalised margin beyond `gamma`. Source: simpo-readme."""

    def loss(
        chosen: torch.Tensor, rejected: torch.Tensor, long: torch.Tensor, short: torch.Tensor
    ) -> torch.Tensor:
        return -functional.logsigmoid(beta * (chosen / long - rejected / short) - gamma).mean()

    return loss


def marked_figures(
    trainer: Any, rows: Iterable[Judged], settings: Settings, *, pad_id: int, beta: float
) -> Callable[[], dict[str, float | None]]:
    """Return what measures marked answers that are not trained on: the mean reward of good ones minus that of
    bad ones.

    Args:
        trainer: holds the model, not trained yet.
        rows: marked answers.
        settings: of the recipe.
        pad_id: the padding token.
        beta: rewards are beta times the change of the log-probability.
    """
    good, bad = (
        HeldOutPairs(trainer, [_twice(row) for row in rows if row.good is mark], settings, pad_id=pad_id)
        for mark in (True, False)
    )

    def measure() -> dict[str, float | None]:
        up, down = (one.change() for one in (good, bad))
        if not len(up) or not len(down):
            return {"loss": None}
        margin = beta * (up.mean() - down.mean())
        error = beta * math.sqrt(sum(float(one.var(correction=0)) / len(one) for one in (up, down)))
        return {
            "loss": float(-functional.logsigmoid(margin)), "margin": float(margin), "margin_error": error,
            "good_reward": float(beta * up.mean()), "bad_reward": float(beta * down.mean()),
        }  # fmt: skip

    return measure


def _twice(row: Judged) -> Judged:
    """A marked answer in the form of a pair, so that one piece of code scores both."""
    return msgspec.structs.replace(row, rejected=row.chosen)


class HeldOutPairs:
    """Judges pairs that are not trained on: how often, and by how much, the chosen answer is preferred."""

    def __init__(
        self, trainer: Any, rows: Iterable[Judged], settings: Settings, *, pad_id: int, beta: float = 1.0
    ) -> None:
        """Remember what the model says of the pairs now, before it is trained.

        Args:
            trainer: holds the model.
            rows: the pairs.
            settings: micro_batch and precision are read.
            pad_id: the padding token.
            beta: margins are told in units of the reward, beta times the log-ratio.
        """
        self._trainer, self._settings, self._beta = trainer, settings, beta
        self._rows = pair_table(rows)
        self._collate = collator(settings, pad_id=pad_id)
        self._before = self._logps()

    def __call__(self) -> dict[str, float | None]:
        """Return loss, accuracy and margin of the change since the beginning."""
        if not self._rows:
            return {"loss": None}
        now = self._logps()
        margins = self._beta * ((now[0] - self._before[0]) - (now[1] - self._before[1]))
        plain = now[0] - now[1]
        return {
            "loss": float(-functional.logsigmoid(margins).mean()),
            "margin": float(margins.mean()),
            "accuracy": float((margins > 0).float().mean()),
            "preferred": float((plain > 0).float().mean()),
            "pairs": len(self._rows),
        }

    def change(self) -> torch.Tensor:
        """Return by how much the log-probability of each chosen answer has changed, (rows,)."""
        return self._logps()[0] - self._before[0]

    def _logps(self) -> torch.Tensor:
        chunked = self._settings.loss == "chunked"
        model = self._trainer.model
        with chunked_head(model) if chunked else contextlib.nullcontext(), judging(model, self._settings):
            parts = [
                answer_logps(model, batch, chunked=chunked)[0].view(2, -1)
                for batch in batches(model, self._rows, self._collate, self._settings.micro_batch)
            ]
        return torch.cat(parts, dim=1).float().cpu() if parts else torch.zeros(2, 0)


def reward_figures(trainer: Any, rows: list[Judged], settings: Settings) -> dict[str, float | None]:
    """Return loss, accuracy and margin of a reward model on pairs."""
    if not rows:
        return {"loss": None}
    model = trainer.model
    margins = []
    with judging(model, settings):
        for batch in batches(model, whole_table(rows), trainer.data_collator, settings.micro_batch):
            chosen, rejected = model(**batch, use_cache=False).logits.float().squeeze(-1).chunk(2)
            margins.append(chosen - rejected)
    found = torch.cat(margins)
    return {
        "loss": float(-functional.logsigmoid(found).mean()),
        "accuracy": float((found > 0).float().mean()),
        "margin": float(found.mean()),
        "pairs": len(rows),
    }
