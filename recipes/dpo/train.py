"""Direct preference optimisation, with TRL's DPOTrainer.

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
from trl import DPOConfig

from advisor.train.evaluation import Evaluator
from advisor.train.pairs import open_judged, pair_table
from advisor.train.preference import HeldOutPairs, ReadyDpoTrainer
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
from advisor.train.settings import DpoSettings, read_settings
from advisor.train.trainer import pad_multiple
from advisor.train.tuners import trained_to_fp32


def train(session: Session) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    recipe = session.recipe
    settings = read_settings(recipe, DpoSettings, cuda=torch.cuda.is_available())
    tokenizer, template, ending = open_tokenizer(session)
    data = open_judged(session, settings, tokenizer, template, ending)
    model = open_model(session, settings, tokenizer, ending)
    with_sft = settings.sft_loss_weight > 0
    trainer = ReadyDpoTrainer(
        model=model,
        args=DPOConfig(
            **trainer_arguments(recipe, settings),
            beta=settings.beta,
            loss_type=[settings.dpo_loss, "sft"] if with_sft else [settings.dpo_loss],
            loss_weights=[1.0, settings.sft_loss_weight] if with_sft else None,
            label_smoothing=settings.label_smoothing,
            max_length=settings.max_seq_len,
            precompute_ref_log_probs=True,
            pad_to_multiple_of=pad_multiple(settings),
        ),
        train_dataset=session.rows(pair_table(data.train), settings),
        processing_class=tokenizer,
    )
    if recipe.tuner != "full":
        trained_to_fp32(trainer.model)
    measure = HeldOutPairs(trainer, data.heldout, settings, pad_id=ending.pad_id, beta=settings.beta)
    evaluator = Evaluator(
        trainer, tokenizer, template, settings, model=recipe.model, rows={}, heldout=HELDOUT
    )
    return carry_out(session, trainer, tokenizer, settings, measure=measure, evaluator=evaluator)


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
