"""Group relative policy optimisation against rewards, with TRL's GRPOTrainer.

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
from trl import GRPOConfig, GRPOTrainer

from advisor.train.reinforcement import Sampled, prepare_prompts
from advisor.train.rewards import rewards_of
from advisor.train.session import (
    Session,
    carry_out,
    leave,
    open_model,
    open_tokenizer,
    run_program,
    trainer_arguments,
)
from advisor.train.settings import ReinforcementSettings, read_settings
from advisor.train.tuners import trained_to_fp32


class PlainGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not typed
    """GRPOTrainer without a model card in the checkpoints; the export writes the one that counts."""

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none."""


def train(session: Session) -> int:
    """Prompts, rewards, model, training, result; each part is told as an event before the next begins."""
    recipe, events = session.recipe, session.events
    settings = read_settings(recipe, ReinforcementSettings, cuda=torch.cuda.is_available())
    tokenizer, template, ending = open_tokenizer(session)
    tokenizer.padding_side = "left"
    prompts = prepare_prompts(recipe.datasets, tokenizer, template, settings)
    rewards = rewards_of(recipe, settings, tokenizer, template, answered=prompts.answered)
    names = [reward.__name__ for reward in rewards]
    events.write("data", end_token=ending.end, rewards=names, **prompts.account)
    if prompts.left_out:
        events.write("warning", message=f"Not every prompt is used: {prompts.left_out}.")

    model = open_model(session, settings, tokenizer, ending)
    trainer = PlainGRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(
            **(trainer_arguments(recipe, settings) | {"include_num_input_tokens_seen": "no"}),
            beta=settings.kl_beta,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            reward_weights=settings.reward_weights or None,
        ),
        train_dataset=prompts.rows,
        processing_class=tokenizer,
    )
    if recipe.tuner != "full":
        trained_to_fp32(trainer.model)
    measure = Sampled(trainer, prompts, rewards, tokenizer, template, settings)
    measure.refuse_if_all_alike()
    return carry_out(session, trainer, tokenizer, settings, measure=measure)


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
