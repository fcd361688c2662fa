"""A head that picks one of the classes of labelled texts, over a LoRA body, with transformers' Trainer.

    python -P train.py recipe.yaml

The working folder is the run folder; see recipes/sft/train.py for what is read and left there. Beside the
adapter lies labels.json: the names of the classes in the order of the head's outputs."""

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

import orjson
import torch
from transformers import TrainingArguments

from advisor.train.classes import LABELS, ClassTrainer, class_figures, labelled_table, prepare_classes
from advisor.train.model import load_tokenizer
from advisor.train.session import (
    Session,
    carry_out,
    leave,
    open_model,
    run_program,
    text_ending,
    trainer_arguments,
)
from advisor.train.settings import ClassifySettings, read_settings
from advisor.train.trainer import pad_multiple
from advisor.train.tuners import trained_to_fp32


def train(session: Session) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, ClassifySettings, cuda=torch.cuda.is_available())
    tokenizer = load_tokenizer(recipe.model)
    ending = text_ending(session, tokenizer)
    data = prepare_classes(recipe.datasets, tokenizer, settings)
    events.write("data", end_token=ending.end, **data.account)
    if data.left_out:
        events.write("warning", message=f"Not every row is trained on: {data.left_out}.")

    model = open_model(session, settings, tokenizer, ending, labels=len(data.names))
    trained_to_fp32(model)
    trainer = ClassTrainer(
        tokenizer=tokenizer,
        multiple=pad_multiple(settings),
        model=model,
        args=TrainingArguments(**trainer_arguments(recipe, settings)),
        train_dataset=session.rows(labelled_table(data.train), settings),
    )
    sizes = [len(row.tokens) for row in data.heldout]
    taken = None if session.probe is None else session.probe.heldout(sizes, settings)
    heldout = data.heldout if taken is None else tuple(data.heldout[number] for number in taken)
    return carry_out(
        session,
        trainer,
        tokenizer,
        settings,
        measure=lambda: class_figures(trainer, heldout, settings),
        beside={LABELS: orjson.dumps(data.names)},
    )


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
