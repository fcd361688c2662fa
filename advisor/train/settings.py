"""The settings of the training programs as typed values; which combinations cannot work.

Goes in: a recipe. Comes out: the settings of its program. Never does: choose a value that the recipe states;
a key that is left out takes the plain value given here, which the program's program.toml documents."""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from advisor.errors import InputError, RefusedError
from advisor.types import Recipe, Record

LOW_RANK = ("lora", "qlora")
VIRTUAL = ("prompt_tuning", "p_tuning", "prefix_tuning")
SUBSPACE = "osf"
PEFT_TUNERS = (*LOW_RANK, SUBSPACE, "ia3", "ln_tuning", *VIRTUAL)
HEAD = "classifier_head"
TUNERS = ("full", *PEFT_TUNERS, "bitfit", "adapter", HEAD)
AGAINST_REFERENCE = ("dpo", "kto", "rloo", "grpo")
"""Objectives that compare the model with what it was: the adapter switched off."""


class Settings(Record, frozen=True, kw_only=True):
    """The keys that every program has."""

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
    heldout_fraction: float = 0.0
    evaluate: bool = True
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_init: Literal["default", "pissa"] = "default"
    target: str = "all-linear"
    same_rank_for_all: bool = False
    cpu_offload: bool = False


class WrittenSettings(Settings, frozen=True, kw_only=True):
    """The keys of programs that train on what is written, by which older data may be kept in mind."""

    replay_fraction: float = 0.0
    preserved_share: float = 0.5


class SftSettings(WrittenSettings, frozen=True, kw_only=True):
    """One field for each key of recipes/sft/program.toml."""

    loss_on: Literal["assistant", "all"] = "assistant"
    mixing_cap: int = 0
    mixing_temperature: float = 1.0
    virtual_tokens: int = 20
    init: Literal["text", "vocabulary", "random"] = "text"
    init_text: str = "Answer the question exactly as the examples do."
    bottleneck: int = 64
    bottleneck_style: Literal["houlsby", "pfeiffer"] = "houlsby"


class ClassifySettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/classify/program.toml."""


class CptSettings(WrittenSettings, frozen=True, kw_only=True):
    """One field for each key of recipes/cpt/program.toml."""

    loss_on: Literal["all"] = "all"


class DpoSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/dpo/program.toml."""

    beta: float = 0.1
    dpo_loss: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_loss_weight: float = 0.0


class KtoSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/kto/program.toml."""

    beta: float = 0.1
    per_step_batch: int | None = None
    undesirable_over_desirable_weight: float = 1.0


class OrpoSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/orpo/program.toml."""

    beta: float = 0.1


class SimpoSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/simpo/program.toml."""

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5


class RewardSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/reward/program.toml."""


class ReinforcementSettings(Settings, frozen=True, kw_only=True):
    """One field for each key of recipes/rloo/program.toml and recipes/grpo/program.toml."""

    num_generations: int = 4
    kl_beta: float = 0.0
    max_completion_length: int = 256
    temperature: float = 1.0
    reward_functions: list[
        Literal[
            "exact_match",
            "contains",
            "number_match",
            "checks",
            "regular_expression",
            "valid_json",
            "json_schema",
            "length",
        ]
    ] = []
    reward_weights: list[float] = []
    reward_pattern: str | None = None
    reward_schema: str | None = None
    reward_length: int = 50
    reward_file: str | None = None
    reward_model: str | None = None


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def read_settings(recipe: Recipe, kind: type[SomeSettings], *, cuda: bool) -> SomeSettings:
    """Return a recipe's settings, checked against each other and the device.

    Args:
        recipe: a recipe of the program that `kind` belongs to.
        kind: the settings record of the program.
        cuda: whether an NVIDIA device will train.

    Raises:
        InputError: a key is unknown, missing or of the wrong type.
        RefusedError: the combination cannot work, or would silently give a wrong result.
    """
    try:
        settings = msgspec.convert(recipe.settings, kind)
    except msgspec.ValidationError as problem:
        raise InputError(
            f"The settings of the recipe do not fit the program {recipe.program!r}: {problem}.",
            f"Correct the recipe; the keys are listed in recipes/{recipe.program}/program.toml.",
        ) from problem
    conflicts = (
        *_batches(settings),
        *_spreading(recipe, settings),
        *_formats(recipe.tuner, settings, cuda=cuda),
        *_tuners(recipe.tuner, recipe.objective, settings),
        *(_marks(settings) if isinstance(settings, KtoSettings) else ()),
        *(_groups(settings) if isinstance(settings, ReinforcementSettings) else ()),
    )
    for wrong, message, remedy in conflicts:
        if wrong:
            raise RefusedError(message, remedy)
    return settings


Conflict = tuple[bool, str, str]
"""Whether it is there, what it is, what to do."""


def _batches(settings: Settings) -> tuple[Conflict, ...]:
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
            settings.packing and settings.attention == "eager",
            "packing with eager attention lets packed rows see each other.",
            "Set attention: sdpa, or packing: false.",
        ),
    )


def _spreading(recipe: Recipe, settings: Settings) -> tuple[Conflict, ...]:
    processes = recipe.parallel.processes if recipe.parallel else 1
    sharded = recipe.parallel is not None and recipe.parallel.kind != "ddp"
    return (
        (
            settings.effective_batch % (settings.micro_batch * processes) != 0,
            f"effective_batch {settings.effective_batch} cannot be spread over {processes} processes with "
            f"micro_batch {settings.micro_batch}.",
            f"Set effective_batch to a multiple of {settings.micro_batch * processes}.",
        ),
        (
            settings.cpu_offload and not sharded,
            "Weights kept in the host's memory belong to sharded training.",
            "Plan without it: a smaller model, or --method qlora.",
        ),
        (
            sharded and settings.lora_init != "default",
            f"lora_init {settings.lora_init} changes the base weights, which sharded training does not save.",
            "Set lora_init: default.",
        ),
    )


def _marks(settings: KtoSettings) -> tuple[Conflict, ...]:
    return (
        (
            settings.micro_batch < 2,
            "kto estimates how far the model has moved from the other answers of a batch; one row has none.",
            "Set micro_batch: 2 or more.",
        ),
        (
            settings.per_step_batch not in (None, settings.micro_batch),
            f"per_step_batch {settings.per_step_batch} is not micro_batch {settings.micro_batch}.",
            "Set both to the same number.",
        ),
    )


def _groups(settings: ReinforcementSettings) -> tuple[Conflict, ...]:
    return (
        (
            settings.effective_batch % settings.num_generations != 0,
            f"effective_batch {settings.effective_batch} does not hold whole groups of num_generations "
            f"{settings.num_generations} answers to one prompt.",
            "Set one of them so that it does.",
        ),
        (
            settings.num_generations < 2,
            "One answer to a prompt has no other to be compared with.",
            "Set num_generations: 2 or more.",
        ),
    )


def _formats(tuner: str, settings: Settings, *, cuda: bool) -> tuple[Conflict, ...]:
    return (
        (
            (settings.weight_bits == 4) != (tuner == "qlora"),
            f"weight_bits {settings.weight_bits} does not go with the tuner {tuner}.",
            "4 bits belong to qlora; all others take 16 or 32.",
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
            settings.precision == "fp32" and settings.weight_bits == 16 and tuner not in ("full", *LOW_RANK),
            f"The tuner {tuner} trains 32-bit weights among 16-bit ones, which needs mixed precision.",
            "Set precision: bf16, or weight_bits: 32.",
        ),
        (
            tuner == SUBSPACE and settings.weight_bits != 32,
            "osf tells its change from the weights as they were, which 16 bits would round.",
            "Set weight_bits: 32.",
        ),
        (
            settings.attention == "flash" and not cuda,
            "attention flash needs an NVIDIA card.",
            "Set attention: sdpa.",
        ),
    )


def _tuners(tuner: str, objective: str, settings: Settings) -> tuple[Conflict, ...]:
    return (
        (
            settings.packing and tuner == HEAD,
            "packing is not possible with a classifier head: the class is read from the last token of a row.",
            "Set packing: false.",
        ),
        (
            settings.packing and objective not in ("sft", "cpt"),
            f"packing is not possible with {objective}: answers are compared row by row.",
            "Set packing: false.",
        ),
        (
            settings.packing and tuner in VIRTUAL,
            f"packing puts the virtual tokens of {tuner} before the first of several rows only, so the "
            "others would be trained without them.",
            "Set packing: false.",
        ),
        (
            settings.gradient_checkpointing and tuner == "prefix_tuning",
            "prefix_tuning hands its prefix over in the cache, which gradient checkpointing takes away.",
            "Set gradient_checkpointing: false.",
        ),
        (
            settings.lora_init != "default" and (tuner != "lora" or settings.use_dora),
            f"lora_init {settings.lora_init} changes the base weights; that goes with the tuner lora only, "
            "on an unquantised base, and without use_dora.",
            "Set lora_init: default.",
        ),
        (
            settings.lora_init != "default" and objective in AGAINST_REFERENCE,
            f"{objective} compares with the model without its adapter; lora_init {settings.lora_init} "
            "changes that model.",
            "Set lora_init: default.",
        ),
    )
