"""The model to trace: the user's libraries build it, with its adapters and checkpointing, on the meta device.

Goes in: a ModelSpec and MemorySettings. Comes out: a module without data. Never does: read weights or a
configuration file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from advisor.errors import RefusedError
from advisor.train.trace_standins import FLASH, PADDED, Autocast, Product4
from advisor.train.tuners import GROUPS
from advisor.types import MemorySettings, ModelSpec

BLOCK, OUTER = 64, 256
"""Weights of one NF4 scale, and scales of one scale of scales, as bitsandbytes has them."""

VIRTUAL = {
    "prompt_tuning": PromptTuningConfig, "p_tuning": PromptEncoderConfig, "prefix_tuning": PrefixTuningConfig,
}  # fmt: skip
CHOSEN_BY_PEFT: dict[str, tuple[type[PeftConfig], Mapping[str, Any]]] = {
    "ia3": (IA3Config, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
    "ln_tuning": (LNTuningConfig, TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING),
}
PAIRED = ("dpo", "orpo", "simpo", "reward")
OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "cpt": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "kto": ("log_probs", "entropy", "mean_logits"),
}
"""What each trainer asks of the head."""


def sequences(settings: MemorySettings) -> int:
    """Return the rows of one forward pass: a pair is two."""
    return settings.micro_batch * (2 if settings.objective in PAIRED else 1)


def in_tiles(settings: MemorySettings) -> bool:
    """Tell whether the loss is computed tile by tile; a reward model has no vocabulary to compute it over."""
    always = settings.objective in ("dpo", "kto")
    return settings.objective != "reward" and (always or settings.loss == "chunked")


def build(spec: ModelSpec, settings: MemorySettings) -> nn.Module:
    """Return the model as the trainer has it, on the meta device."""
    rows = sequences(settings)
    kernel = "eager" if settings.attention == "eager" else FLASH
    if settings.attention == "sdpa" and (settings.packed or rows > 1):
        kernel = PADDED
    wide = torch.float32 if settings.weight_bits == 32 else torch.bfloat16
    marks = settings.objective == "reward"
    kind = AutoModelForSequenceClassification if marks else AutoModelForCausalLM
    config = configuration(spec)
    if marks:
        config.num_labels = 1
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config, dtype=wide, attn_implementation=kernel)
    model.train()
    if in_tiles(settings):
        add_fused_lm_head(model, outputs=OUTPUTS.get(settings.objective, ("log_probs",)))
    adapters = adapters_of(spec.model_type, settings)
    if adapters is not None:
        with torch.device("meta"):
            model = get_peft_model(model, adapters)
    if settings.weight_bits == 4:
        _quantise(model, settings)
    if settings.adapter_bits == 16:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    if settings.gradient_checkpointing:
        _checkpoint(model, settings, adapters is not None)
    return model


def configuration(spec: ModelSpec) -> Any:
    """Return the configuration of the model library for a spec."""
    shape = spec.shape
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if spec.model_type == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=shape.hidden, n_inner=shape.intermediate, n_layer=shape.layers, n_head=shape.heads,
            vocab_size=shape.vocab, n_positions=spec.context_tokens, tie_word_embeddings=shape.tied,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ids,
        )  # fmt: skip
    return AutoConfig.for_model(
        spec.model_type, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocab, tie_word_embeddings=shape.tied,
        attention_bias=shape.attention_bias, mlp_bias=shape.mlp_bias, **ids,
    )  # fmt: skip


def adapters_of(model_type: str, settings: MemorySettings) -> PeftConfig | None:
    """Return PEFT's configuration of a tuner, None for full tuning.

    Raises:
        RefusedError: the tuner takes PEFT's own choice of layers, and PEFT has none for the family.
    """
    if settings.tuner == "full":
        return None
    task = "SEQ_CLS" if settings.objective == "reward" else "CAUSAL_LM"
    if settings.tuner in VIRTUAL:
        return VIRTUAL[settings.tuner](task_type=task, num_virtual_tokens=settings.virtual_tokens)
    if settings.tuner in CHOSEN_BY_PEFT:
        kind, families = CHOSEN_BY_PEFT[settings.tuner]
        if model_type not in families:
            raise RefusedError(
                f"PEFT names no layers of {model_type} for {settings.tuner}; those that are trained then are "
                "not traced.",
                "Use --engine closed_form.",
            )
        return kind(task_type=task)
    named = GROUPS.get(settings.target) or tuple(name.strip() for name in settings.target.split(","))
    modules = settings.target if settings.target == "all-linear" else list(named)
    if settings.tuner == "osf":
        return OSFConfig(effective_rank=settings.preserved_share, target_modules=modules, task_type=task)
    dora = settings.tuner == "dora"
    return LoraConfig(r=settings.lora_r, target_modules=modules, task_type=task, use_dora=dora)


def _quantise(model: nn.Module, settings: MemorySettings) -> None:
    """Replace the weight of every linear layer of the blocks by its packed form."""
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or "lm_head" in name or "lora_" in name:
            continue
        entries, outputs = layer.weight.numel(), layer.out_features
        scales = entries // BLOCK
        size = entries // 2 + (scales + scales // OUTER * 4 if settings.double_quant else scales * 4)
        packed = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        replaced: Any = layer
        replaced.weight, replaced.forward = packed, _product_with(outputs)


def _product_with(outputs: int) -> Callable[[Tensor], Tensor]:
    def product(inputs: Tensor) -> Tensor:
        result: Tensor = Product4.apply(inputs.to(torch.bfloat16), outputs)
        return result

    return product


def _checkpoint(model: Any, settings: MemorySettings, frozen: bool) -> None:  # noqa: FBT001 - private
    contexts: dict[str, Any] = {}
    if mixed(settings):
        contexts["context_fn"] = lambda: (contextlib.nullcontext(), Autocast(torch.bfloat16))
    model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
    if frozen:
        model.enable_input_require_grads()


def mixed(settings: MemorySettings) -> bool:
    return settings.autocast and settings.precision != "fp32"
