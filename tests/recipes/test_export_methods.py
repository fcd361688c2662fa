"""Each way of training that becomes a GGUF, on two architectures, against the live PEFT model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from advisor.chat import ChatSession
from advisor.errors import ExportError
from advisor.export import export_model
from advisor.verify import verify_gguf
from families import make_family

pytestmark = [
    pytest.mark.slow,
    # peft, making adapters: names that transformers renames, advice on shared embeddings.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
TASK = {"task_type": "CAUSAL_LM"}
RANDOM = {"r": 4, "lora_alpha": 12}
METHODS: dict[str, peft.PeftConfig] = {
    "rslora": peft.LoraConfig(
        target_modules="all-linear", use_rslora=True, rank_pattern={"0.*(c_attn|q_proj)": 2},
        alpha_pattern={"0.*(c_attn|q_proj)": 7}, **RANDOM, **TASK,
    ),
    "dora": peft.LoraConfig(target_modules="all-linear", use_dora=True, **RANDOM, **TASK),
    "tokens": peft.LoraConfig(target_modules="all-linear", trainable_token_indices=[3, 7, 300], **RANDOM),
    "ia3": peft.IA3Config(**TASK),
    "ln": peft.LNTuningConfig(**TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, **TASK),
}  # fmt: skip
BASES = {"qwen2": {"tied": True}, "gpt2": {"tied": False}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {name: make_family(root / name, name, **more) for name, more in BASES.items()}
    return made | {"gemma3": make_family(root / "gemma3", "gemma3")}


def train(base: Path, config: Any, target: Path) -> Path:
    """Write an adapter whose weights are all random, and the same each time."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", list(METHODS))
def test_method_is_exported_exactly(bases: dict[str, Path], tmp_path: Path, method: str, base: str) -> None:
    """The file answers as base and live adapter do: logits, ids, template, tensors."""
    adapter = train(bases[base], METHODS[method], tmp_path / "adapter")
    file = export_model(adapter, quants=("F32",), out=tmp_path).files[0]
    proof = verify_gguf(Path(file.path), against=adapter)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]


def test_prompt_before_scaled_embeddings(bases: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3 multiplies what it looks up, which a trained prompt never passed; chat begins with it."""
    adapter = train(bases["gemma3"], METHODS["prompt"], tmp_path / "adapter")
    file = export_model(adapter, quants=("F32",), out=tmp_path).files[0]
    assert verify_gguf(Path(file.path), against=adapter).passed
    session = ChatSession(Path(file.path), max_tokens=8)
    assert "<|vp_" not in "".join(session.reply("Hello"))
    session.close()


def test_what_cannot_be_a_gguf_says_what_to_do(bases: dict[str, Path], tmp_path: Path) -> None:
    """Prefix tuning and bottleneck adapters are refused with another way; nothing is written."""
    prefix = train(bases["qwen2"], peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK), tmp_path / "prefix")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps({"peft_type": "BOTTLENECK", "base_model_name_or_path": str(bases["qwen2"])})
    )
    for source in (prefix, other):
        with pytest.raises(ExportError, match="cannot be merged") as caught:
            export_model(source, out=tmp_path / "out")
        assert "lora" in caught.value.remedy
    assert not (tmp_path / "out").exists()
