"""Continued pre-training on plain text, with TRL's SFTTrainer.

    python -P train.py recipe.yaml

The working folder is the run folder; see recipes/sft/train.py for what is read and left there."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import advisor  # noqa: F401 - only to explain its absence
except ImportError:
    sys.exit("The package ftadvisor is not importable here. Start this through: ftadvisor run FOLDER")

if __name__ == "__main__" and not any(
    word in Path(sys.argv[-1]).read_bytes() for word in (b"qlora", b"8bit")
):
    # PEFT imports bitsandbytes wherever it is installed: 3.4 of 16 CPU-seconds that only these two need.
    sys.modules["bitsandbytes"] = None

import torch
from trl import SFTConfig

from advisor.train.answers import read_template
from advisor.train.evaluation import Evaluator
from advisor.train.model import Ending, load_tokenizer
from advisor.train.session import (
    HELDOUT,
    Session,
    carry_out,
    leave,
    open_model,
    run_program,
    text_ending,
    trainer_arguments,
)
from advisor.train.settings import CptSettings, read_settings
from advisor.train.text import prepare_text
from advisor.train.trainer import AnswerTrainer, heldout_figures, pad_multiple
from advisor.train.tuners import trained_to_fp32


def train(session: Session) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, CptSettings, cuda=torch.cuda.is_available())
    tokenizer = load_tokenizer(recipe.model)
    ending: Ending = text_ending(session, tokenizer)
    data = prepare_text(recipe.datasets, tokenizer, settings)
    events.write("data", end_token=ending.end, trained_on=settings.loss_on, **data.account)
    if data.left_out:
        events.write("warning", message=f"Not everything is read: {data.left_out}.")
    if settings.replay_fraction and not data.account["replayed_rows"]:
        events.write("warning", message="There is no earlier data to replay, so none is mixed in.")
    heldout = session.heldout(data.heldout, settings)

    template = read_template(tokenizer, recipe.model.id) if tokenizer.chat_template else None
    model = open_model(session, settings, tokenizer, ending)
    trainer = AnswerTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(recipe, settings),
            packing=settings.packing,
            packing_strategy="bfd",
            max_length=settings.max_seq_len,
            pad_to_multiple_of=pad_multiple(settings),
            dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        ),
        train_dataset=session.rows(data.train, settings),
        processing_class=tokenizer,
    )
    trainer.plain_loss = settings.loss == "full_logits"
    if recipe.tuner != "full":
        trained_to_fp32(trainer.model)
    return carry_out(
        session,
        trainer,
        tokenizer,
        settings,
        measure=lambda: heldout_figures(trainer, heldout, settings),
        evaluator=Evaluator(
            trainer, tokenizer, template, settings, model=recipe.model, rows=heldout, heldout=HELDOUT
        ),
    )


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
