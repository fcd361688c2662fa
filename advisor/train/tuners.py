"""Which weights move: all, adapters of PEFT, biases, bottleneck adapters of our own.

Goes in: a loaded model and the recipe's settings. Comes out: a PEFT configuration, or the model made ready in
place; counts of what is trained. Never does: train; leave trained weights in 16 bits; add a bias where the
architecture has no place for one."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from advisor.errors import ModelError, RefusedError, UnknownNameError
from advisor.train import bottleneck
from advisor.train.parallel import is_first
from advisor.train.settings import HEAD, LOW_RANK, SUBSPACE, TUNERS, Settings, SftSettings, WrittenSettings
from advisor.types import Record

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj"),
    "q_v": ("q_proj", "v_proj", "qkv_proj", "c_attn"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "mlp.c_proj"),
}
INITIAL = Path("initial_adapter")
"""The adapter before its first step, where the result is told as a difference to it (PiSSA)."""
CHOSEN_BY_PEFT = ("keys-values-feedforward", "all-linear")
"""Targets of IA3 that mean what PEFT knows of the family; where it knows none, `SCALED`."""
SCALED = ("k_proj", "v_proj", "qkv_proj", "down_proj")
PER_HEAD_NORMS = ("q_norm", "k_norm")
"""Norms that layer-norm tuning leaves as they are, as PEFT does in every family that it knows."""


class Trained(Record, frozen=True, kw_only=True):
    """How much of a model moves."""

    trainable: int
    total: int


def prepare_model(
    model: nn.Module,
    tuner: str,
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str = "CAUSAL_LM",
    start: Path | None = None,
) -> nn.Module:
    """Return the model with exactly the tuner's weights trainable.

    Args:
        model: the base, freshly loaded.
        tuner: its id.
        settings: of the recipe.
        tokenizer: turns the text that virtual tokens begin with into tokens.
        task: PEFT's task type; for SEQ_CLS the new head is trained too.
        start: adapter of an earlier stage to go on with.

    Raises:
        UnknownNameError: the tuner is unknown, or `target` names layers that the model does not have.
        RefusedError: the tuner does not go with this model.
    """
    if tuner not in TUNERS:
        raise UnknownNameError("tuner", tuner, TUNERS)
    if tuner == "full":
        return model
    if tuner == "bitfit":
        _free_biases(model)
        return model
    if tuner == SUBSPACE and isinstance(settings, WrittenSettings):
        return _in_subspaces(model, settings)
    if start is not None and tuner == "adapter":
        bottleneck.load(model, start)
        return model
    if start is not None:
        return _go_on(model, settings, start)
    if tuner in (*LOW_RANK, HEAD):
        wrapped: nn.Module = get_peft_model(model, lora_config(model, settings, task=task))
        if settings.lora_init != "default" and is_first():
            wrapped.save_pretrained(INITIAL)  # type: ignore[operator]  # a PeftModel
        return wrapped
    if not isinstance(settings, SftSettings):
        raise RefusedError(f"The tuner {tuner} is made for supervised fine-tuning.", "Choose lora or full.")
    if tuner == "adapter":
        bottleneck.add(model, adapter_shape(settings))
        return model
    return _small(model, tuner, settings, tokenizer)


def _go_on(model: nn.Module, settings: Settings, start: Path) -> nn.Module:
    """Load the adapter of an earlier stage to train it further; its own shape stays."""
    config = PeftConfig.from_pretrained(str(start))
    if config.is_prompt_learning:
        raise RefusedError(
            f"{start} holds virtual tokens, which PEFT does not train further once they are saved.",
            "Choose lora for a plan of several stages.",
        )
    wrapped: nn.Module = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    rank = config.to_dict().get("r", settings.lora_r)
    if settings.same_rank_for_all and rank != settings.lora_r:
        raise RefusedError(
            f"The adapter in {start} has rank {rank}, this recipe wants {settings.lora_r} for all.",
            f"Set lora_r: {rank}, or same_rank_for_all: false.",
        )
    return wrapped


def _small(
    model: PreTrainedModel, tuner: str, settings: SftSettings, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """Wrap a model with one of PEFT's tuners beside LoRA."""
    config = _small_config(model, tuner, settings)
    if isinstance(config, PromptTuningConfig):
        _begin_with_words(config, settings, tokenizer)
    wrapped: nn.Module = get_peft_model(model, config)
    if isinstance(config, PrefixTuningConfig) and settings.init == "text":
        _prefill(wrapped, settings, tokenizer)
    return wrapped


def _small_config(model: PreTrainedModel, tuner: str, settings: SftSettings) -> PeftConfig:
    if tuner == "ia3":
        return _ia3(model, settings)
    if tuner == "ln_tuning":
        return _norms(model)
    kind = {
        "prompt_tuning": PromptTuningConfig,
        "p_tuning": PromptEncoderConfig,
        "prefix_tuning": PrefixTuningConfig,
    }[tuner]
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens)


def lora_config(model: nn.Module, settings: Settings, *, task: str = "CAUSAL_LM") -> LoraConfig:
    """Return the PEFT configuration of LoRA.

    Raises:
        UnknownNameError: `target` names layers that the model does not have.
    """
    return LoraConfig(
        task_type=task,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.lora_init == "default" else settings.lora_init,
        target_modules=target_modules(model, settings.target),
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _ia3(model: PreTrainedModel, settings: SftSettings) -> IA3Config:
    chosen = settings.target in CHOSEN_BY_PEFT
    if chosen and model.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        return IA3Config(task_type="CAUSAL_LM")
    named = _among(_linear_layers(model), SCALED) if chosen else target_modules(model, settings.target)
    forward = [name for name in named if name in ("down_proj", "mlp.c_proj")]
    return IA3Config(task_type="CAUSAL_LM", target_modules=named, feedforward_modules=forward)


def _norms(model: PreTrainedModel) -> LNTuningConfig:
    """Return PEFT's choice of norms for the family, else all but those of single heads."""
    if model.config.model_type in TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING:
        return LNTuningConfig(task_type="CAUSAL_LM")
    norms = {name.rpartition(".")[2] for name, one in model.named_modules() if "Norm" in type(one).__name__}
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=sorted(norms.difference(PER_HEAD_NORMS)))


def _begin_with_words(
    config: PromptTuningConfig, settings: SftSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Let virtual tokens begin as the embeddings of words; they learn far better than from noise."""
    config.prompt_tuning_init = {"text": "TEXT", "vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[
        settings.init
    ]
    if settings.init == "text":
        config.prompt_tuning_init_text = settings.init_text
        config.tokenizer_name_or_path = tokenizer.name_or_path


def _prefill(model: nn.Module, settings: SftSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a prefix begin as the keys and values of a text, repeated to its length."""
    text, wanted = settings.init_text, settings.virtual_tokens
    while len(tokenizer.encode(text, add_special_tokens=False)) < wanted:
        text = f"{text} {settings.init_text}"
    base = model.get_base_model()  # type: ignore[operator]  # a PeftModel
    base.config.use_cache = True
    initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)
    base.config.use_cache = False


def _in_subspaces(model: nn.Module, settings: WrittenSettings) -> nn.Module:
    """Take every linear layer apart into directions that stay and directions that learn.

    Raises:
        RefusedError: a layer is of a kind that cannot be taken apart.
    """
    if any(_conv1d(module) for module in model.modules()):
        raise RefusedError(
            f"PEFT does not take apart the layers of {type(model).__name__}, so nothing would be trained.",
            "Choose full or lora: ftadvisor plan --method lora",
        )
    config = OSFConfig(
        task_type="CAUSAL_LM",
        effective_rank=settings.preserved_share,
        target_modules=target_modules(model, settings.target),
    )
    wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def _free_biases(model: nn.Module) -> None:
    found = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    model.requires_grad_(requires_grad=False)
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no bias terms, so BitFit has nothing to train.",
            "Choose lora or ia3: ftadvisor plan --method lora",
        )
    for parameter in found:
        parameter.requires_grad = True


def adapter_shape(settings: SftSettings) -> bottleneck.BottleneckConfig:
    """Return what a bottleneck adapter of these settings looks like."""
    return bottleneck.BottleneckConfig(style=settings.bottleneck_style, bottleneck=settings.bottleneck)


def target_modules(model: nn.Module, target: str) -> str | list[str]:
    """Return what PEFT calls the layers of `target`.

    Raises:
        UnknownNameError: the model has no such layer.
        RefusedError: the output layer was named, which the trainer would silently not train.
    """
    if target == "all-linear":
        return target
    linear = _linear_layers(model)
    wanted = GROUPS.get(target) or tuple(name.strip() for name in target.split(",") if name.strip())
    found = _among(linear, wanted)
    if "lm_head" in found:
        raise RefusedError("LoRA on the output layer lm_head is not supported.", "Set target: all-linear.")
    if not found or (target not in GROUPS and len(found) < len(wanted)):
        missing = next(word for word in wanted if word not in found)
        leaves = {name.rpartition(".")[2] for name in linear} | {"all-linear", *GROUPS}
        raise UnknownNameError("target layer", missing, leaves, "Correct `target` in the recipe.")
    return found


def _linear_layers(model: nn.Module) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _conv1d(module)
    }


def _among(names: set[str], wanted: tuple[str, ...]) -> list[str]:
    """Return the wanted endings that some name has."""
    return [word for word in wanted if any(name == word or name.endswith(f".{word}") for name in names)]


def virtual_tokens(model: torch.nn.Module) -> int:
    """Return how many positions a prompt-learning adapter puts before a row."""
    if not isinstance(model, PeftModel):
        return 0
    config = model.active_peft_config
    counts = config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING
    return int(config.num_virtual_tokens) if counts else 0


def trained_to_fp32(model: nn.Module) -> None:
    """Hold trained weights in fp32; TRL makes adapters bf16 on a 4-bit base, where small updates vanish."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def count(model: nn.Module) -> Trained:
    """Count trained and all parameters; a packed 4-bit weight counts as the weights it stands for.

    Raises:
        ModelError: nothing would be trained.
    """
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    if trainable == 0:
        raise ModelError("No weight of this model would be trained.", "Correct `target` in the recipe.")
    return Trained(trainable=trainable, total=total)


def _conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
