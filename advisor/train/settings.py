"""The settings of the SFT program as typed values; which combinations cannot work.

Goes in: a recipe. Comes out: `SftSettings`. Never does: choose a value that the recipe states; a key that is
left out takes the plain value given here, which recipes/sft/program.toml documents."""

from __future__ import annotations

from typing import Literal

import msgspec

from advisor.errors import InputError, RefusedError
from advisor.types import Recipe, Record


class SftSettings(Record, frozen=True, kw_only=True):
    """One field for each key of recipes/sft/program.toml."""

    learning_rate: float
    epochs: float = 1.0
    max_steps: int = -1
    micro_batch: int
    effective_batch: int
    max_seq_len: int
    warmup_ratio: float = 0.0
    scheduler: Literal["cosine", "linear", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = "adamw_torch"
    precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    weight_bits: Literal[4, 16, 32] = 32
    double_quant: bool = True
    gradient_checkpointing: bool = False
    packing: bool = False
    attention: Literal["sdpa", "flash", "eager"] = "sdpa"
    loss: Literal["chunked", "full_logits"] = "chunked"
    loss_on: Literal["assistant", "all"] = "assistant"
    heldout_fraction: float = 0.0
    mixing_cap: int = 0
    mixing_temperature: float = 1.0
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target: str = "all-linear"


def read_settings(recipe: Recipe, *, cuda: bool) -> SftSettings:
    """Return a recipe's settings, checked against each other and the device.

    Args:
        recipe: a recipe of the program `sft`.
        cuda: whether an NVIDIA device will train.

    Raises:
        InputError: a key is unknown, missing or of the wrong type.
        RefusedError: the combination cannot work.
    """
    try:
        settings = msgspec.convert(recipe.settings, SftSettings)
    except msgspec.ValidationError as problem:
        raise InputError(
            f"The settings of the recipe do not fit the program 'sft': {problem}.",
            "Correct the recipe; the keys are listed in recipes/sft/program.toml.",
        ) from problem
    for wrong, message, remedy in _conflicts(recipe.tuner, settings, cuda=cuda):
        if wrong:
            raise RefusedError(message, remedy)
    return settings


def _conflicts(tuner: str, settings: SftSettings, *, cuda: bool) -> tuple[tuple[bool, str, str], ...]:
    four_bits = settings.weight_bits == 4
    return (
        (
            settings.effective_batch % settings.micro_batch != 0,
            f"effective_batch {settings.effective_batch} is not a multiple of micro_batch "
            f"{settings.micro_batch}.",
            "Set one of them so that it is.",
        ),
        (
            settings.packing and settings.micro_batch > 1 and settings.attention != "flash",
            f"packing with micro_batch {settings.micro_batch} makes one sequence of the whole batch, which "
            "without flash attention costs the square of its length.",
            "Set micro_batch: 1, or attention: flash, or packing: false.",
        ),
        (
            four_bits != (tuner == "qlora"),
            f"weight_bits {settings.weight_bits} does not go with the tuner {tuner}.",
            "4 bits belong to qlora; full and lora take 16 or 32.",
        ),
        (
            settings.precision == "fp16" and not cuda,
            "precision fp16 needs an NVIDIA card.",
            "Set precision: bf16 or fp32.",
        ),
        (
            settings.precision == "fp16" and tuner == "full" and settings.weight_bits == 16,
            "Full tuning in fp16 needs 32-bit weights: gradients of 16-bit weights underflow.",
            "Set weight_bits: 32.",
        ),
        (
            settings.attention == "flash" and not cuda,
            "attention flash needs an NVIDIA card.",
            "Set attention: sdpa.",
        ),
    )
