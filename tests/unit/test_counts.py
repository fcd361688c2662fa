"""Counts of parameters equal those of the real libraries, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from advisor.estimate.layers import layout
from advisor.estimate.memory import trainable_parameters
from advisor.train.settings import SftSettings
from advisor.train.tuners import count, prepare_model
from advisor.types import MemorySettings, ModelSpec
from tests.unit.estimate_cases import FAMILIES, spec

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and torch warn about meta tensors and tied matrices.
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 7}


def build(model: ModelSpec) -> nn.Module:
    """The real model of a spec, without memory behind its weights."""
    shape = model.shape
    if model.model_type == "gpt2":
        config = AutoConfig.for_model(
            "gpt2", n_embd=shape.hidden, n_inner=shape.intermediate, n_layer=shape.layers, n_head=shape.heads,
            vocab_size=shape.vocab, n_positions=model.context_tokens,
            tie_word_embeddings=shape.tied, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            model.model_type, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab,
            tie_word_embeddings=shape.tied, attention_bias=shape.attention_bias, mlp_bias=shape.mlp_bias,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trained(model: ModelSpec, config: PeftConfig) -> int:
    """What PEFT trains."""
    with torch.device("meta"):
        return sum(p.numel() for p in get_peft_model(build(model), config).parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_of_a_family(family: str, *, tied: bool) -> None:
    """The layout has every weight of the real model, the tied matrix once; full tuning trains them all."""
    model = spec(family, tied=tied)
    real = sum(p.numel() for p in build(model).parameters())
    assert layout(model).parameters == real
    assert trainable_parameters(model, MemorySettings(tuner="full")) == real


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_count(family: str) -> None:
    """Biases of projections are part of the layout."""
    model = spec(family, attention_bias=True, mlp_bias=family == "llama")
    assert layout(model).parameters == sum(p.numel() for p in build(model).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_all_linear_layers(family: str) -> None:
    """LoRA and DoRA on all-linear, in every family."""
    model = spec(family)
    for dora in (False, True):
        config = LoraConfig(r=4, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = MemorySettings(tuner="dora" if dora else "lora", lora_r=4)
        assert trainable_parameters(model, settings) == trained(model, config)


@pytest.mark.parametrize(
    ("target", "modules"),
    [
        ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("q_v", ["q_proj", "v_proj"]),
        ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("q_proj, down_proj", ["q_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_lora_on_named_layers(family: str, target: str, modules: list[str]) -> None:
    """The names of groups mean the modules that they stand for."""
    model = spec(family)
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    assert trainable_parameters(model, MemorySettings(lora_r=4, target=target)) == trained(model, config)


@pytest.mark.parametrize("tuner", ["ia3", "ln_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuners_that_choose_their_own_layers(family: str, tuner: str) -> None:
    """Of every family what the program trains: PEFT's own choice, or the program's where PEFT has none."""
    model = spec(family)
    settings = SftSettings(
        learning_rate=1e-3, micro_batch=1, effective_batch=1, max_seq_len=8, target="keys-values-feedforward"
    )
    with torch.device("meta"):
        real = count(prepare_model(build(model), tuner, settings, tokenizer=None)).trainable
    assert trainable_parameters(model, MemorySettings(tuner=tuner, target=settings.target)) == real


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: PromptTuningConfig(**TOKENS), {"tuner": "prompt_tuning"}),
        (lambda: PrefixTuningConfig(**TOKENS), {"tuner": "prefix_tuning"}),
        (lambda: PromptEncoderConfig(**TOKENS), {"tuner": "p_tuning"}),
    ],
    ids=["prompt", "prefix", "p"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens(family: str, make: Callable[[], PeftConfig], settings: dict[str, Any]) -> None:
    """Prompt, prefix and p-tuning of seven virtual tokens."""
    model = spec(family)
    assert trainable_parameters(model, MemorySettings(virtual_tokens=7, **settings)) == trained(model, make())


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_orthogonal_subspaces(family: str, share: float) -> None:
    """The directions that learn, of every linear layer; the preserved ones are rounded down as PEFT does."""
    model, config = spec(family), OSFConfig(effective_rank=share, target_modules="all-linear")
    settings = MemorySettings(tuner="osf", preserved_share=share)
    assert trainable_parameters(model, settings) == trained(model, config)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_bitfit(family: str) -> None:
    """Native biases where there are some; else those of a model loaded with biases everywhere."""
    model = spec(family)
    real = build(model if family != "llama" else spec(family, attention_bias=True, mlp_bias=True))
    biases = sum(p.numel() for name, p in real.named_parameters() if name.endswith("bias"))
    assert trainable_parameters(model, MemorySettings(tuner="bitfit")) == biases
