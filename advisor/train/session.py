"""What all training programs do alike: begin, resume from a checkpoint, train, measure, save, tell.

Goes in: a recipe file, then a trainer that is ready. Comes out: events, checkpoints, the result, an exit
status. Never does: know what is trained; that is each program's own."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed

from advisor.errors import AdvisorError, ModelError, RefusedError
from advisor.run.events import EventWriter, stage_of
from advisor.storage import file_sha256, read_record, write_json
from advisor.train import checkpoints, probing
from advisor.train.answers import Template, read_template
from advisor.train.callbacks import Reporter
from advisor.train.evaluation import Evaluator
from advisor.train.memory import peak_memory
from advisor.train.model import (
    Ending,
    apply_ending,
    embedding_rows,
    load_model,
    load_tokenizer,
    settle_ending,
    start_adapter,
)
from advisor.train.parallel import (
    anywhere,
    is_first,
    is_sharded,
    parallel_arguments,
    processes,
    require_planned,
    require_processes,
    running,
    wait_for_all,
)
from advisor.train.process import StopRequest, end_with_parent, report_crashes
from advisor.train.results import WHOLE, save_result
from advisor.train.settings import Settings
from advisor.train.tuners import count, prepare_model
from advisor.types import Recipe

CHECKPOINTS, HELDOUT = Path("checkpoints"), Path("heldout.jsonl")
EVALUATION = "evaluation-{when}.json"
DONE, FAILED, STOPPED = 0, 1, 130


class Session:
    """One program at work on one recipe."""

    def __init__(self, recipe: Recipe, recipe_sha256: str, events: EventWriter, stop: StopRequest) -> None:
        self.recipe = recipe
        self.recipe_sha256 = recipe_sha256
        self.events = events
        self.stop = stop
        self.probe = probing.asked()

    def rows(self, dataset: Any, settings: Settings) -> Any:
        """Return the rows to train on: all, or the few that a probe takes."""
        return dataset if self.probe is None else self.probe.rows(dataset, settings)

    def heldout(self, tables: dict[str, Any], settings: Settings) -> dict[str, Any]:
        """Return the rows to measure on, by dataset: all, or one batch of each in a probe."""
        if self.probe is None:
            return tables
        return {
            name: table.select(self.probe.heldout(probing.row_tokens(table), settings))
            for name, table in tables.items()
        }


def run_program(train: Callable[[Session], int], recipe_file: Path) -> int:
    """Train one recipe; every outcome is an event. Returns the exit status."""
    recipe = read_record(recipe_file, Recipe)
    stage = stage_of(recipe_file.name, recipe.objective)
    # What went wrong may have happened in any process; all else is told once.
    failures = EventWriter(Path("events.jsonl"), stage)
    events = failures if is_first() else EventWriter(Path(os.devnull), stage)
    report_crashes(failures)
    stop = StopRequest()
    stop.install()
    end_with_parent()
    # A layer whose gradient torch does not know would train on silently wrong ones.
    warnings.filterwarnings("error", message=".*autograd kernel was not registered")
    set_seed(recipe.seed)
    try:
        require_processes(recipe)
        return train(Session(recipe, file_sha256(recipe_file), events, stop))
    except AdvisorError as error:
        kind = type(error).__name__
        failures.write("error", kind=kind, code=error.code, message=error.message, remedy=error.remedy)
        return FAILED


def leave(status: int) -> None:
    """End the process: all results are synced to disk, and clearing up torch would take two more seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def carry_out(
    session: Session,
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    measure: Callable[[], dict[str, Any]],
    beside: Mapping[str, bytes] = MappingProxyType({}),
    evaluator: Evaluator | None = None,
) -> int:
    """Train with a trainer that is ready, from the newest whole checkpoint on, and save the result.

    Args:
        session: of this program.
        trainer: a transformers Trainer.
        tokenizer: saved beside the weights.
        settings: of the recipe.
        measure: returns `loss` on rows that are not trained on, and what else is known of them.
        beside: files that are saved with the weights, by name.
        evaluator: asks the model questions, before and after; None where it cannot answer.
    """
    events, stop = session.events, session.stop
    if settings.report_to != "none":
        measure = with_curve(trainer, measure)
    asking = evaluator if settings.evaluate else None
    size = count(trainer.model)
    events.write(
        "model",
        trainable_parameters=size.trainable,
        parameters=size.total,
        device=str(trainer.args.device),
        device_name=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **peak_memory(),
    )
    if session.probe is not None:
        alone = asking if processes(session.recipe) == 1 else None
        probing.measure_steps(
            session.probe, trainer, session.recipe, settings, events, measure=measure, evaluator=alone
        )
        return DONE
    begin = checkpoints.newest(CHECKPOINTS, fit_of(session))
    for name, reason in begin.rejected.items():
        events.write("warning", message=f"{name} is not used: {reason}.")
    wait_for_all()  # all have looked before the first one tidies up
    if is_first():
        checkpoints.remove_unusable(CHECKPOINTS, begin)
    if begin.folder is not None:
        events.write("note", message=f"Going on from the checkpoint of step {begin.step}.")
    elif not is_sharded(session.recipe):
        events.write("heldout", when="before", step=0, **measure())
        evaluate(session, trainer, asking, when="before")
    if anywhere(stop.asked):
        return STOPPED
    trainer.add_callback(Spread(session, trainer, measure=None if begin.folder else measure))
    trainer.add_callback(
        Reporter(
            events,
            stop,
            recipe_sha256=session.recipe_sha256,
            keep_checkpoints=settings.keep_checkpoints,
            measure=measure,
        )
    )
    # A checkpoint of the last step, or one that was chosen as the result, needs only its weights.
    lineage = session.recipe.lineage
    chosen = lineage is not None and lineage.finish
    if begin.folder is not None and (chosen or begin.step >= planned_steps(begin.folder)):
        trainer._load_from_checkpoint(begin.folder)
    else:
        if begin.marker is not None:
            go_on_changed(trainer, begin.marker, settings)
        trainer.train(resume_from_checkpoint=begin.folder)
        if anywhere(stop.asked) and trainer.state.global_step < trainer.state.max_steps:
            events.write("note", message=f"Stopped after step {trainer.state.global_step}.")
            return STOPPED
    place = save_result(trainer, tokenizer, session.recipe, settings, measure=measure, beside=beside)
    at = begin.step if chosen else trainer.state.max_steps
    events.write("heldout", when="after", step=at, **place.measured)
    evaluate(session, trainer, asking, when="after")
    events.write(
        "done", artefact=place.name, bytes=place.bytes, cpu_seconds=time.process_time(), **peak_memory()
    )
    wait_for_all()  # the first process holds the others' connection
    return DONE


class Spread(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Looks how the training is spread once it begins, and measures a sharded model for the first time."""

    def __init__(
        self, session: Session, trainer: Any, *, measure: Callable[[], dict[str, Any]] | None
    ) -> None:
        self._session, self._trainer, self._measure = session, trainer, measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what runs.

        Raises:
            TrainingError: it is not what was planned.
        """
        recipe, found = self._session.recipe, running(self._trainer)
        if recipe.parallel is not None:
            self._session.events.write("parallel", **msgspec.structs.asdict(found))
        require_planned(found, recipe)
        # Before it is spread, a sharded model lies in the host's memory, in one process only.
        if self._measure is not None and is_sharded(recipe):
            self._session.events.write("heldout", when="before", step=0, **self._measure())


def with_curve(trainer: Any, measure: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return a measurement that also reaches whatever else writes the trainer's curves."""

    def measured() -> dict[str, Any]:
        found = measure()
        # The trainer's names for what is measured on rows that are not trained on begin with `eval_`.
        logs = {f"eval_{name}": value for name, value in found.items() if value is not None}
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, logs)
        return found

    return measured


def evaluate(session: Session, trainer: Any, evaluator: Evaluator | None, *, when: str) -> None:
    """Write down what the model makes of questions now; on several devices none are asked."""
    if evaluator is None or trainer.accelerator.num_processes > 1:
        return
    found = evaluator(swap=when == "after")
    write_json(Path(EVALUATION.format(when=when)), found)
    session.events.write("evaluation", when=when, rows=len(found.rows), seconds=found.seconds)


def fit_of(session: Session) -> checkpoints.Fit:
    """Return which checkpoints the recipe of this session may go on from."""
    lineage = session.recipe.lineage
    if lineage is None:
        return checkpoints.Fit(sha256=session.recipe_sha256)
    return checkpoints.Fit(sha256=session.recipe_sha256, of=lineage.of, newest_step=lineage.newest_step)


def go_on_changed(trainer: Any, marker: checkpoints.Marker, settings: Settings) -> None:
    """Make a trainer go on from a checkpoint with another rate or optimiser than it was trained with.

    By itself it would take the old rate from the checkpoint, and fail on the state of another optimiser.
    """
    same_optimizer = marker.optimizer in (None, settings.optimizer)
    if same_optimizer and marker.learning_rate in (None, settings.learning_rate):
        return
    load = trainer._load_optimizer_and_scheduler

    def load_and_change(checkpoint: str | None) -> None:
        if same_optimizer:
            load(checkpoint)
        elif checkpoint is not None:
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            trainer.lr_scheduler.load_state_dict(state)
        scheduler = trainer.lr_scheduler
        scheduler.base_lrs = [settings.learning_rate] * len(scheduler.base_lrs)
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = settings.learning_rate, rate
        scheduler._last_lr = rates

    trainer._load_optimizer_and_scheduler = load_and_change


def planned_steps(checkpoint: str) -> int:
    """Return how many steps the run of a checkpoint has in all."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return int(state.max_steps)


def trainer_arguments(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Return the arguments that every trainer takes; what the libraries would choose by themselves is
    stated."""
    return {
        "output_dir": str(CHECKPOINTS),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.effective_batch // (settings.micro_batch * processes(recipe)),
        "warmup_steps": settings.warmup_ratio,
        "lr_scheduler_type": "constant_with_warmup"
        if settings.scheduler == "constant"
        else settings.scheduler,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        # FSDP has its own, which stands in its configuration.
        "activation_checkpointing": settings.gradient_checkpointing
        and not (recipe.parallel is not None and recipe.parallel.kind == "fsdp"),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "steps",
        "save_steps": settings.save_every_steps,
        "save_total_limit": None,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": settings.report_to,
        "disable_tqdm": True,
        **parallel_arguments(recipe),
        **(probing.arguments(probe, settings) if (probe := probing.asked()) else {}),
    }


def open_tokenizer(session: Session) -> tuple[PreTrainedTokenizerBase, Template, Ending]:
    """Load the tokenizer, make its end token the one that ends an answer, and say what had to change."""
    model = session.recipe.model
    tokenizer = load_tokenizer(model)
    template = read_template(tokenizer, model.id)
    if template.given:
        words = (
            f"{model.id} has no chat template and is given a plain one; answers end with {template.end!r}."
        )
        session.events.write("note", message=words)
    ending = settle_ending(tokenizer, template.end, rows=embedding_rows(model), call_end=template.call_end)
    for change in ending.changed:
        session.events.write("note", message=f"Tokenizer: {change}.")
    return tokenizer, template, ending


def text_ending(session: Session, tokenizer: PreTrainedTokenizerBase) -> Ending:
    """Settle the end and padding tokens of plain text: the tokenizer's own end token closes a document.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    model = session.recipe.model
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {model.id} has no end token.", "Choose another --model.")
    ending = settle_ending(tokenizer, tokenizer.eos_token, rows=embedding_rows(model))
    for change in ending.changed:
        session.events.write("note", message=f"Tokenizer: {change}.")
    return ending


def open_model(
    session: Session,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    ending: Ending,
    *,
    labels: int = 0,
) -> Any:
    """Load the base with exactly the tuner's weights trainable, or go on with an earlier stage's adapter.

    Args:
        session: of this program.
        settings: of the recipe.
        tokenizer: of the model.
        ending: settled for that tokenizer.
        labels: outputs of a head that is trained in place of the vocabulary's; 0: a language model.

    Raises:
        RefusedError: the earlier stage left whole weights, and this one trains an adapter.
    """
    recipe = session.recipe
    start = start_adapter(recipe.model)
    if recipe.model.after is not None and start is None and recipe.tuner not in WHOLE:
        raise RefusedError(
            f"The stage before left a whole model in {recipe.model.after}; an adapter trained on it would be "
            "looked for on the original base.",
            "Use the tuner full for this stage, or an adapter for both.",
        )
    base = load_model(
        recipe.model, settings, biases=recipe.tuner == "bitfit", labels=labels, sharded=is_sharded(recipe)
    )
    apply_ending(base, ending)
    if start is not None and not labels:
        session.events.write("note", message=f"Going on with the adapter in {start}, in its own shape.")
    return prepare_model(
        base,
        recipe.tuner,
        settings,
        tokenizer=tokenizer,
        task="SEQ_CLS" if labels else "CAUSAL_LM",
        start=None if labels else start,
    )
