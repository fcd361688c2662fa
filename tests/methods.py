"""Ways of training that PEFT knows, and adapters of them whose weights are all random.

Goes in: a model folder. Comes out: an adapter folder. Never does: train; leave a weight at its beginning,
where a mistake would not show.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

_TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12, **_TASK}
METHODS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(target_modules="all-linear", **_LORA),
    "rslora": peft.LoraConfig(
        target_modules="all-linear", use_rslora=True, rank_pattern={"0.*(c_attn|q_proj)": 2},
        alpha_pattern={"0.*(c_attn|q_proj)": 7}, **_LORA,
    ),
    "dora": peft.LoraConfig(target_modules="all-linear", use_dora=True, **_LORA),
    "biases": peft.LoraConfig(target_modules="all-linear", bias="all", **_LORA),
    "tokens": peft.LoraConfig(target_modules="all-linear", trainable_token_indices=[3, 7, 300], **_LORA),
    "ia3": peft.IA3Config(**_TASK),
    "ln": peft.LNTuningConfig(**_TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **_TASK),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, **_TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **_TASK),
}  # fmt: skip


def make_adapter(
    base: Path, config: peft.PeftConfig, target: Path, *, seed: int = 1, size: float = 0.1
) -> Path:
    """Write an adapter whose weights are all random, and the same each time; `size` is their deviation."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(size * torch.randn(value.shape, generator=random))
    model.save_pretrained(target)
    return target
