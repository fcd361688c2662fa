"""Simple preference optimisation, with a loss of our own and no reference model.

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
from transformers import TrainingArguments

from advisor.train.pairs import pair_table, prepare_judged
from advisor.train.preference import HeldOutPairs, PairTrainer, simpo_loss
from advisor.train.session import (
    Session,
    carry_out,
    leave,
    open_model,
    open_tokenizer,
    run_program,
    trainer_arguments,
)
from advisor.train.settings import SimpoSettings, read_settings
from advisor.train.tuners import trained_to_fp32


def train(session: Session) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, SimpoSettings, cuda=torch.cuda.is_available())
    tokenizer, template, ending = open_tokenizer(session)
    data = prepare_judged(
        recipe.datasets,
        tokenizer,
        template,
        max_tokens=settings.max_seq_len,
        heldout_fraction=settings.heldout_fraction,
    )
    events.write("data", end_token=ending.end, **data.account)
    if data.left_out:
        events.write("warning", message=f"Not every row is trained on: {data.left_out}.")

    model = open_model(session, settings, tokenizer, ending)
    if recipe.tuner != "full":
        trained_to_fp32(model)
    trainer = PairTrainer(
        pair_loss=simpo_loss(settings.beta, settings.gamma_beta_ratio * settings.beta),
        pad_id=ending.pad_id,
        model=model,
        args=TrainingArguments(**trainer_arguments(recipe, settings), remove_unused_columns=False),
        train_dataset=pair_table(data.train),
        processing_class=tokenizer,
    )
    measure = HeldOutPairs(trainer, data.heldout, settings, pad_id=ending.pad_id)
    return carry_out(session, trainer, tokenizer, settings, measure=measure)


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
