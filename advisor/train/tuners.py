"""Which weights move: full, LoRA, QLoRA.

Goes in: a loaded model and the recipe's settings. Comes out: a PEFT configuration or none, counts of what is
trained. Never does: train; leave adapters in 16 bits.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from advisor.errors import RefusedError, UnknownNameError
from advisor.train.settings import SftSettings
from advisor.types import Record

ADAPTERS = ("lora", "qlora")
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj"),
    "q_v": ("q_proj", "v_proj", "qkv_proj", "c_attn"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "mlp.c_proj"),
}


class Trained(Record, frozen=True, kw_only=True):
    """How much of a model moves."""

    trainable: int
    total: int


def adapter_config(model: nn.Module, tuner: str, settings: SftSettings) -> LoraConfig | None:
    """Return the PEFT configuration of a tuner; None: all weights move.

    Raises:
        UnknownNameError: the tuner is unknown, or `target` names layers that the model does not have.
    """
    if tuner == "full":
        return None
    if tuner not in ADAPTERS:
        raise UnknownNameError("tuner", tuner, ("full", *ADAPTERS))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=target_modules(model, settings.target),
    )


def target_modules(model: nn.Module, target: str) -> str | list[str]:
    """Return what PEFT calls the layers of `target`.

    Raises:
        UnknownNameError: the model has no such layer.
        RefusedError: the output layer was named, which the trainer would silently not train.
    """
    if target == "all-linear":
        return target
    linear = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _conv1d(module)
    }
    wanted = GROUPS.get(target) or tuple(name.strip() for name in target.split(",") if name.strip())
    found = [word for word in wanted if any(name == word or name.endswith(f".{word}") for name in linear)]
    if "lm_head" in found:
        raise RefusedError("LoRA on the output layer lm_head is not supported.", "Set target: all-linear.")
    if not found or (target not in GROUPS and len(found) < len(wanted)):
        missing = next(word for word in wanted if word not in found)
        leaves = {name.rpartition(".")[2] for name in linear} | {"all-linear", *GROUPS}
        raise UnknownNameError("target layer", missing, leaves, "Correct `target` in the recipe.")
    return found


def adapters_to_fp32(model: nn.Module) -> None:
    """Hold trained adapter weights in fp32; TRL makes them bf16 on a 4-bit base, where small updates
    vanish."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def count(model: nn.Module) -> Trained:
    """Count trained and all parameters; a packed 4-bit weight counts as the weights it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return Trained(trainable=trainable, total=total)


def _conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
