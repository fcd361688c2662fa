"""Supervised fine-tuning on answers: full, LoRA or QLoRA, with TRL's SFTTrainer and PEFT.

    python -P train.py recipe.yaml

The working folder is the run folder. It reads the recipe, trains, and leaves events.jsonl, checkpoints/ and
adapter/ or model/ there. A whole checkpoint of the same recipe is continued from. `ftadvisor run` starts it;
by hand it works the same. Exit 0 done, 1 failed, 130 stopped on request."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

try:
    import advisor  # noqa: F401 - only to explain its absence
except ImportError:
    sys.exit("The package ftadvisor is not importable here. Start this through: ftadvisor run FOLDER")

if not any(word in Path(sys.argv[-1]).read_bytes() for word in (b"qlora", b"8bit")):
    # PEFT imports bitsandbytes wherever it is installed: 3.4 of 16 CPU-seconds that only these two need.
    sys.modules["bitsandbytes"] = None

import torch
from transformers import TrainerState, set_seed
from trl import SFTConfig

from advisor.errors import AdvisorError
from advisor.run.events import EventWriter, stage_of
from advisor.storage import file_sha256, read_record, write_atomic
from advisor.train import checkpoints
from advisor.train.answers import read_template
from advisor.train.callbacks import Reporter
from advisor.train.data import prepare
from advisor.train.memory import peak_memory
from advisor.train.model import apply_ending, embedding_rows, load_model, load_tokenizer, settle_ending
from advisor.train.process import StopRequest, end_with_parent, report_crashes
from advisor.train.results import save_result
from advisor.train.settings import SftSettings, read_settings
from advisor.train.trainer import AnswerTrainer, mean_token_loss, pad_multiple
from advisor.train.tuners import adapter_config, adapters_to_fp32, count
from advisor.types import Recipe

CHECKPOINTS, HELDOUT = Path("checkpoints"), Path("heldout.jsonl")
DONE, FAILED, STOPPED = 0, 1, 130


def main(recipe_file: Path) -> int:
    """Train one recipe; every outcome is an event."""
    recipe = read_record(recipe_file, Recipe)
    events = EventWriter(Path("events.jsonl"), stage_of(recipe_file.name, recipe.objective))
    report_crashes(events)
    stop = StopRequest()
    stop.install()
    end_with_parent()
    try:
        return train(recipe, file_sha256(recipe_file), events, stop)
    except AdvisorError as error:
        kind = type(error).__name__
        events.write("error", kind=kind, code=error.code, message=error.message, remedy=error.remedy)
        return FAILED


def train(recipe: Recipe, recipe_sha256: str, events: EventWriter, stop: StopRequest) -> int:
    """Data, model, training, result; each part is told as an event before the next begins."""
    settings = read_settings(recipe, cuda=torch.cuda.is_available())
    set_seed(recipe.seed)
    # A layer whose gradient torch does not know would train on silently wrong ones.
    warnings.filterwarnings("error", message=".*autograd kernel was not registered")

    # The end of a turn: the template's token is the end token everywhere, so that the model learns to stop.
    tokenizer = load_tokenizer(recipe.model)
    template = read_template(tokenizer, recipe.model.id)
    ending = settle_ending(tokenizer, template.end, rows=embedding_rows(recipe.model))
    for change in ending.changed:
        events.write("note", message=f"Tokenizer: {change}.")

    # The data: labels on answers only, counted and shown before the first step.
    data = prepare(recipe.datasets, tokenizer, template, settings)
    if data.heldout_content:
        write_atomic(HELDOUT, b"\n".join(data.heldout_content) + b"\n")
    events.write("data", end_token=ending.end, **data.account.as_fields())
    if data.account.left_out:
        events.write("warning", message=data.account.warning())

    # The model, and what of it moves.
    model = load_model(recipe.model, settings)
    apply_ending(model, ending)
    trainer = AnswerTrainer(
        model=model,
        args=arguments(recipe, settings),
        train_dataset=data.train,
        processing_class=tokenizer,
        peft_config=adapter_config(model, recipe.tuner, settings),
    )
    trainer.plain_loss = settings.loss == "full_logits"
    if recipe.tuner != "full":
        adapters_to_fp32(trainer.model)
    size = count(trainer.model)
    events.write(
        "model",
        trainable_parameters=size.trainable,
        parameters=size.total,
        device=str(trainer.args.device),
        **peak_memory(),
    )

    # Where to begin: the newest whole checkpoint; a damaged one is said and passed over.
    begin = checkpoints.newest(CHECKPOINTS, recipe_sha256=recipe_sha256)
    for name, reason in begin.rejected.items():
        events.write("warning", message=f"{name} is not used: {reason}.")
    checkpoints.remove_unusable(CHECKPOINTS, begin)
    if begin.folder is None:
        loss = mean_token_loss(trainer, data.heldout, settings)
        events.write("heldout", when="before", step=0, loss=loss)
    else:
        events.write("note", message=f"Going on from the checkpoint of step {begin.step}.")
    if stop.asked:
        return STOPPED

    # Training. A checkpoint of the last step needs no more steps, only its weights.
    trainer.add_callback(
        Reporter(
            events,
            stop,
            recipe_sha256=recipe_sha256,
            keep_checkpoints=settings.keep_checkpoints,
            heldout_loss=lambda: mean_token_loss(trainer, data.heldout, settings),
        )
    )
    if begin.folder is not None and begin.step >= planned_steps(begin.folder):
        trainer._load_from_checkpoint(begin.folder)
    else:
        trainer.train(resume_from_checkpoint=begin.folder)
        if stop.asked and trainer.state.global_step < trainer.state.max_steps:
            events.write("note", message=f"Stopped after step {trainer.state.global_step}.")
            return STOPPED

    # The result, measured as it is saved.
    place = save_result(
        trainer, tokenizer, recipe, settings, measure=lambda: mean_token_loss(trainer, data.heldout, settings)
    )
    events.write("heldout", when="after", step=trainer.state.max_steps, loss=place.heldout_loss)
    events.write("done", artefact=place.name, bytes=place.bytes, **peak_memory())
    return DONE


def arguments(recipe: Recipe, settings: SftSettings) -> SFTConfig:
    """Return the trainer's arguments; what TRL would otherwise choose by itself is stated."""
    return SFTConfig(
        output_dir=str(CHECKPOINTS),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.effective_batch // settings.micro_batch,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if settings.scheduler == "constant" else settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        activation_checkpointing=settings.gradient_checkpointing,
        packing=settings.packing,
        max_length=settings.max_seq_len,
        pad_to_multiple_of=pad_multiple(settings),
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        save_total_limit=None,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def planned_steps(checkpoint: str) -> int:
    """Return how many steps the run of a checkpoint has in all."""
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).max_steps


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    # All results are synced to disk; the interpreter's own clearing-up of torch would take two more seconds.
    os._exit(status)
