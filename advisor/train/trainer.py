"""TRL's SFTTrainer with the loss that the recipe names, and the loss of rows that are not trained on.

Goes in: tokenised rows with labels. Comes out: losses. Never does: tokenise, download, write a model card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from torch.nn import functional
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from advisor.train.data import IGNORED
from advisor.train.model import DTYPES
from advisor.train.settings import Settings

ENCODER = "prompt_encoder.safetensors"
"""In a checkpoint of p-tuning: the network that writes the virtual tokens."""
MOST_EXACT = 200
PAD_MULTIPLE = 32
"""Tokens. In bf16 on CPU every new row length makes the library compile and keep new kernels: over 150 steps
of random lengths 1734 MiB and 24.6 CPU-seconds without, 889 MiB and 22.5 CPU-seconds with this padding (torch
2.15)."""


def pad_multiple(settings: Settings) -> int | None:
    """Return the multiple to which rows are padded, or None where that gains nothing or is not possible."""
    on_cpu = not torch.accelerator.is_available()
    return PAD_MULTIPLE if on_cpu and settings.precision == "bf16" else None


class AnswerTrainer(SFTTrainer):  # type: ignore[misc]  # trl is not typed
    """SFTTrainer for rows that already have labels."""

    plain_loss = False
    """True: cross-entropy over logits instead of TRL's tiled head, which scores masked positions too where
    there is no Triton and computes the logits twice."""
    virtual_tokens = 0
    """Positions that the model puts before those of the row; a prefix takes none, it lies in the cache."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of transformers
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the sum of the token losses divided by `num_items_in_batch`, or by the trained tokens of the
        batch.

        Logits are computed only where at least one row of the batch is trained on, and at up to
        `PAD_MULTIPLE` - 1 places more, which do not count.
        """
        if return_outputs or not self.plain_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        used = _to_multiple((labels != IGNORED).any(dim=0)).nonzero().squeeze(1)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**rest, use_cache=False, logits_to_keep=used + self.virtual_tokens).logits
        wanted = labels[:, used]
        trained = wanted != IGNORED
        total = functional.cross_entropy(logits[trained].float(), wanted[trained], reduction="sum")
        if num_items_in_batch is None:
            return total / trained.sum().clamp(min=1)
        # `num_items_in_batch` counts the tokens of all processes, and DDP averages their gradients.
        return total / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if output_dir is not None and _loses_its_encoder(self.model):
            encoder = self.model.prompt_encoder.state_dict()
            save_file(
                {name: value.contiguous() for name, value in encoder.items()}, Path(output_dir) / ENCODER
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if _loses_its_encoder(self.model):
            self.model.prompt_encoder.load_state_dict(load_file(Path(resume_from_checkpoint) / ENCODER))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none into the checkpoints folder; the export writes the one that counts."""


def _to_multiple(used: torch.Tensor) -> torch.Tensor:
    """Return the mask [tokens] with the first unused places added until their number is a multiple."""
    missing = -int(used.sum()) % PAD_MULTIPLE
    used[(~used).nonzero()[:missing].squeeze(1)] = True
    return used


def _loses_its_encoder(model: torch.nn.Module) -> bool:
    """PEFT saves what a prompt encoder produces, not the encoder: enough to answer, not to train on."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.P_TUNING


@contextlib.contextmanager
def judging(model: torch.nn.Module, settings: Settings) -> Iterator[None]:
    """Evaluation mode, no gradients and the precision of the training; afterwards all is as before."""
    device = next(model.parameters()).device
    was_training = model.training
    enabled = settings.precision != "fp32"
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=DTYPES[settings.precision], enabled=enabled):
            yield
    finally:
        model.train(was_training)


def batches(
    model: torch.nn.Module,
    rows: Dataset | Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    size: int,
) -> Iterator[dict[str, Any]]:
    """Yield `size` rows at a time as `collate` makes them, on the device of the model, in their order.

    Without a data loader no random state moves, so that a run that measures ends like one that does not."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), size):
        made = collate([dict(rows[n]) for n in range(start, min(start + size, len(rows)))])
        yield {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in made.items()
        }


@contextlib.contextmanager
def chunked_head(model: Any) -> Iterator[None]:
    """Give a model TRL's head that never holds all logits, for a while.

    The trainer's own one is gone at the end of a training in 16 bits, when the model is unwrapped."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = vars(base).get("forward")
    add_fused_lm_head(base)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


def heldout_figures(
    trainer: AnswerTrainer, rows: dict[str, Dataset], settings: Settings, *, remembered: Collection[str] = ()
) -> dict[str, float | None]:
    """Return the mean loss over the trained tokens of all rows, and of each dataset where there are several.

    Args:
        trainer: holds the model.
        rows: held out, by dataset.
        settings: micro_batch and precision are read.
        remembered: datasets of earlier tasks, of which is also told how many answers are still written word
            for word: a loss hardly tells when only the first words of every answer are lost.
    """
    losses, tokens = {}, {}
    for name, one in rows.items():
        loss = mean_token_loss(trainer, one, settings)
        if loss is not None:
            losses[name] = loss
            tokens[name] = sum(sum(label != IGNORED for label in row[1:]) for row in one["labels"])
    if not losses:
        return {"loss": None}
    total = sum(losses[name] * tokens[name] for name in losses) / sum(tokens.values())
    each = {f"loss of {name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
    exact: dict[str, float | None] = {
        f"exact share of {name}": word_for_word(trainer, rows[name], settings)
        for name in losses
        if name in remembered
    }
    return {"loss": total, **each, **exact}


def word_for_word(trainer: AnswerTrainer, rows: Dataset, settings: Settings) -> float:
    """Return the share of rows whose answers the model, taking the likeliest token, writes as they are.

    One row at a time and of long datasets the first `MOST_EXACT`, so that it takes little memory and time.
    """
    model = trainer.model
    exact, few = 0, rows.select(range(min(len(rows), MOST_EXACT)))
    with judging(model, settings):
        for batch in batches(model, few, trainer.data_collator, 1):
            labels = batch.pop("labels")[0, 1:]
            used = (labels != IGNORED).nonzero().squeeze(1)
            logits = model(**batch, use_cache=False, logits_to_keep=used + trainer.virtual_tokens).logits
            exact += int(torch.equal(logits[0].argmax(dim=-1), labels[used]))
    return exact / len(few)


def mean_token_loss(trainer: AnswerTrainer, rows: Dataset | None, settings: Settings) -> float | None:
    """Return the mean loss over all trained tokens of `rows`; None without rows."""
    if rows is None or len(rows) == 0:
        return None
    model = trainer.model
    total, tokens = 0.0, 0
    head = contextlib.nullcontext() if trainer.plain_loss else chunked_head(model)
    with judging(model, settings), head:
        for batch in batches(model, rows, trainer.data_collator, settings.micro_batch):
            trained = int((batch["labels"][:, 1:] != IGNORED).sum())
            if trainer.plain_loss:
                loss = trainer.compute_loss(model, batch)
            else:
                loss = model(**batch, fused_lm_head=True).loss
            total += float(loss) * trained
            tokens += trained
    return total / max(tokens, 1)
