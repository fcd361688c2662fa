"""Tells what a running trainer does, finishes its checkpoints, and stops it when it is asked to.

Goes in: the trainer's own calls. Comes out: events `step`, `checkpoint`, `heldout`; checkpoints with their
marker. Never does: change the order of the data or any random state; let a checkpoint with a broken loss be
written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from advisor.errors import TrainingError
from advisor.run.events import EventWriter
from advisor.train import checkpoints
from advisor.train.heat import slowed_by_heat
from advisor.train.memory import peak_memory
from advisor.train.parallel import anywhere, is_first, wait_for_all
from advisor.train.process import StopRequest

TOLD = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "margin": "margin",
    "accuracy": "accuracy",
    "kl": "kl",
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "cut_off_share",
}
"""What the trainers log beside the loss -> its name in a step event."""


class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Writes an event for each step and checkpoint."""

    def __init__(
        self,
        events: EventWriter,
        stop: StopRequest,
        *,
        recipe_sha256: str,
        keep_checkpoints: int,
        measure: Callable[[], dict[str, Any]],
    ) -> None:
        self._events = events
        self._stop = stop
        self._recipe_sha256 = recipe_sha256
        self._keep = keep_checkpoints
        self._measure = measure
        self._begin = self._begin_tokens = self._begin_step = 0.0
        self._saving_since = self._step_since = 0.0
        nvidia = torch.cuda.is_available() and torch.version.cuda is not None
        self._card = str(torch.cuda.get_device_properties().uuid) if nvidia else ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of this process; a resumed run begins at a later step."""
        self._begin, self._begin_tokens = time.monotonic(), state.num_input_tokens_seen
        self._begin_step, self._step_since = state.global_step, self._begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and end after this step when a stop was asked for, of whichever process."""
        self._stop.asked = anywhere(self._stop.asked)
        if self._stop.asked:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Write the step event; the trainer logs before it saves, so neither a broken loss nor weights that a
        broken gradient has moved reach a checkpoint.

        Raises:
            TrainingError: the loss or the gradient is not a finite number.
        """
        if "loss" not in logs:
            return
        broken = _broken(logs, scaled=args.fp16)
        self._events.write(
            "step",
            step=state.global_step,
            total=state.max_steps,
            loss=_number(logs["loss"]),
            learning_rate=logs.get("learning_rate"),
            # Answers that all got the same mark have no gradient; that is no fault of a reinforcement run.
            grad_norm=(logs.get("grad_norm") or None) if "reward" in logs else logs.get("grad_norm"),
            **({"broken": broken} if broken else {}),
            tokens=state.num_input_tokens_seen,
            step_seconds=round(time.monotonic() - self._step_since, 4),
            **{name: _number(logs[key]) for key, name in TOLD.items() if key in logs},
            **self._pace(state),
            **peak_memory(),
            **(slowed_by_heat(self._card) if self._card else {}),
        )
        if broken:
            raise TrainingError(
                f"The {broken} at step {state.global_step} is not a finite number.",
                "Plan again with a lower rate (--set learning_rate=...) or with --set precision=fp32.",
                code=f"{broken}_not_finite",
            )
        self._saving_since = self._step_since = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the checkpoint complete, drop old ones, and measure the held-out loss."""
        root = Path(args.output_dir)
        folder = root / f"checkpoint-{state.global_step}"
        wait_for_all()  # each process has written its part
        if is_first():
            size = checkpoints.finish(
                folder,
                step=state.global_step,
                recipe_sha256=self._recipe_sha256,
                learning_rate=args.learning_rate,
                optimizer=str(args.optim.value),
            )
            checkpoints.rotate(root, keep=self._keep)
            self._events.write(
                "checkpoint",
                step=state.global_step,
                path=str(folder),
                bytes=size,
                seconds=round(time.monotonic() - self._saving_since, 3),
            )
        if not self._stop.asked and state.global_step < state.max_steps:
            found = self._measure()
            if any(value is not None for value in found.values()):
                step = state.global_step
                self._events.write("heldout", when=f"at step {step}", step=step, **found)
            if found.get("loss") is not None and is_first():
                checkpoints.note_heldout(folder, found["loss"])
        self._step_since = time.monotonic()

    def _pace(self, state: TrainerState) -> dict[str, float | None]:
        elapsed = time.monotonic() - self._begin
        done = state.global_step - self._begin_step
        if elapsed <= 0 or done <= 0:
            return {"tokens_per_second": None, "seconds_remaining": None}
        return {
            "tokens_per_second": round((state.num_input_tokens_seen - self._begin_tokens) / elapsed, 1),
            "seconds_remaining": round(elapsed / done * (state.max_steps - state.global_step), 1),
        }


def _broken(logs: dict[str, float], *, scaled: bool) -> str:
    """Return what is not a finite number, `loss` or `gradient`; empty when all is well.

    Args:
        logs: of one step.
        scaled: gradients are scaled for fp16, where the scaler leaves out a step with an infinite one.
    """
    if not math.isfinite(logs["loss"]):
        return "loss"
    norm = logs.get("grad_norm")
    return "gradient" if norm is not None and not math.isfinite(norm) and not scaled else ""


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
