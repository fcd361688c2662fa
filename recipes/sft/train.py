"""Supervised fine-tuning on answers, with TRL's SFTTrainer and the tuners of PEFT and our own.

    python -P train.py recipe.yaml

The working folder is the run folder. It reads the recipe, trains, and leaves events.jsonl, checkpoints/ and
adapter/ or model/ there. A whole checkpoint of the same recipe is continued from. `ftadvisor run` starts it;
by hand it works the same. Exit 0 done, 1 failed, 130 stopped on request."""

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

from advisor.storage import write_atomic
from advisor.train.data import prepare
from advisor.train.evaluation import Evaluator
from advisor.train.parallel import is_first
from advisor.train.session import (
    HELDOUT,
    Session,
    carry_out,
    leave,
    open_model,
    open_tokenizer,
    run_program,
    trainer_arguments,
)
from advisor.train.settings import SftSettings, read_settings
from advisor.train.trainer import AnswerTrainer, heldout_figures, pad_multiple
from advisor.train.tuners import trained_to_fp32, virtual_tokens


def train(session: Session) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, SftSettings, cuda=torch.cuda.is_available())

    # The end of a turn: the template's token is the end token everywhere, so that the model learns to stop.
    tokenizer, template, ending = open_tokenizer(session)

    # The data: labels on answers only, counted and shown before the first step.
    data = prepare(recipe.datasets, tokenizer, template, settings)
    if data.heldout_content and is_first():
        write_atomic(HELDOUT, b"\n".join(data.heldout_content) + b"\n")
    events.write("data", end_token=ending.end, **data.account.as_fields())
    if data.account.left_out:
        events.write("warning", message=data.account.warning())
    heldout = session.heldout(data.heldout, settings)

    # The model, and what of it moves.
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
    trainer.virtual_tokens = virtual_tokens(model)
    if recipe.tuner != "full":
        trained_to_fp32(trainer.model)

    earlier = {one.name for one in recipe.datasets if one.role == "earlier_task"}
    return carry_out(
        session,
        trainer,
        tokenizer,
        settings,
        measure=lambda: heldout_figures(trainer, heldout, settings, remembered=earlier),
        evaluator=Evaluator(
            trainer, tokenizer, template, settings, model=recipe.model, rows=heldout, heldout=HELDOUT
        ),
    )


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
