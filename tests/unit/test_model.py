"""A model is read from a folder, a config.json or the knowledge base; what is wrong with it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import ModelError
from advisor.knowledge import Knowledge, load, spec_of
from advisor.probe.model import read_model, tokenizer_file
from advisor.resources import kb_dir
from advisor.types import ModelSpec
from tiny import CHATML, make_tiny_model

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **SMALL},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 24, **SMALL},
    "mistral": {"model_type": "mistral", **SMALL},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, **SMALL},
    "qwen3 biased": {"model_type": "qwen3", "attention_bias": True, **SMALL},
    "gemma": {"model_type": "gemma", "head_dim": 16, **SMALL},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, **SMALL},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, **SMALL},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, **SMALL},
    "granite": {"model_type": "granite", "mlp_bias": True, **SMALL},
    "olmo2": {"model_type": "olmo2", **SMALL},
    "olmo3": {"model_type": "olmo3", **SMALL},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, **SMALL},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 320,
    },
}


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    """The knowledge base that is shipped."""
    return load()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A complete tiny model."""
    return make_tiny_model(tmp_path / "tiny")


def _codes(spec: ModelSpec) -> dict[str, str]:
    return {finding.code: finding.severity for finding in spec.findings}


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...})
    )


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_transformers(
    tmp_path: Path, knowledge: Knowledge, fields: dict[str, Any]
) -> None:
    """Counted from config.json alone, the parameters are exactly those of the model in transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    spec = read_model(str(tmp_path / "config.json"), knowledge=knowledge)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.shape.tied == bool(config.tie_word_embeddings)
    assert spec.architecture == type(model).__name__
    assert spec.context_tokens == 128
    assert spec.path is None


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_complete_folder_has_nothing_to_complain_of(
    tmp_path: Path, knowledge: Knowledge, architecture: str, tied: bool
) -> None:
    """A complete folder gives its template, its dtype and its count, and has no findings."""
    folder = make_tiny_model(tmp_path / "m", architecture=architecture, tied=tied, dtype="bfloat16")
    spec = read_model(str(folder), knowledge=knowledge)
    assert spec.findings == ()
    assert (spec.path, spec.weight_dtype, spec.chat_template) == (str(folder), "bfloat16", CHATML)
    assert spec.instruct
    assert spec.has_chat_template
    assert tokenizer_file(spec) == folder / "tokenizer.json"


def test_every_known_model_needs_no_network(knowledge: Knowledge) -> None:
    """A hub id that kb/ knows, in any case of letters, is answered from there."""
    for key, facts in knowledge.models.items():
        spec = read_model(key.upper(), knowledge=knowledge)
        assert spec == spec_of(key, facts)
        assert (spec.id, spec.parameters, spec.shape.layers) == (key, facts.parameters, facts.layers)


@pytest.mark.skipif(
    not (kb_dir() / "starter" / "config.json").is_file(), reason="the starter is not built yet"
)
def test_starter_is_complete(knowledge: Knowledge) -> None:
    """The embedded starter is a complete model without findings."""
    spec = read_model("starter", knowledge=knowledge)
    assert (spec.id, spec.findings) == ("starter", ())


def test_licence_is_read_from_the_card(tiny: Path, knowledge: Knowledge) -> None:
    """The card's front matter says licence and languages; a card without it says nothing."""
    (tiny / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage:\n- en\n- fr\n---\n# Model\n")
    spec = read_model(str(tiny), knowledge=knowledge)
    assert (spec.licence, spec.commercial, spec.languages) == ("cc-by-nc-4.0", False, ("en", "fr"))
    (tiny / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n")
    spec = read_model(str(tiny), knowledge=knowledge)
    assert (spec.licence, spec.commercial) == ("gemma", True)
    assert "conditions" in spec.licence_note
    (tiny / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert read_model(str(tiny), knowledge=knowledge).commercial is None


def test_missing_template_is_a_finding(tmp_path: Path, knowledge: Knowledge) -> None:
    """A model without chat template is read, and the finding says what that means."""
    folder = make_tiny_model(tmp_path / "m", chat_template=False)
    spec = read_model(str(folder), knowledge=knowledge)
    assert _codes(spec) == {"no_chat_template": "warning"}
    assert not spec.instruct
    assert not spec.has_chat_template


@pytest.mark.parametrize("form", ["text", "list"])
def test_template_in_tokenizer_config_is_found(tmp_path: Path, knowledge: Knowledge, form: str) -> None:
    """Older models keep the template in tokenizer_config.json, as a text or as a list of named ones."""
    folder = make_tiny_model(tmp_path / "m", chat_template=False)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    _edit(folder / "tokenizer_config.json", chat_template=CHATML if form == "text" else named)
    assert read_model(str(folder), knowledge=knowledge).chat_template == CHATML


def test_token_traps_are_findings(tiny: Path, knowledge: Knowledge) -> None:
    """Padding with the end token, and an end token that is not the template's end of turn, are said."""
    _edit(tiny / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token={"content": "<|endoftext|>"})
    for name in ("config.json", "generation_config.json"):
        _edit(tiny / name, eos_token_id=0)
    spec = read_model(str(tiny), knowledge=knowledge)
    assert _codes(spec) == {"pad_equals_eos": "warning", "eos_not_end_of_turn": "warning"}
    assert "<|im_end|>" in spec.findings[1].message
    _edit(tiny / "generation_config.json", eos_token_id=[0, 3])
    assert "eos_not_end_of_turn" not in _codes(read_model(str(tiny), knowledge=knowledge))


INCOMPLETE = {
    "no weights": (["model.safetensors"], "incomplete_model", "no .safetensors file"),
    "no tokenizer": (["tokenizer.json"], "no_tokenizer", "tokenizer.json"),
}


@pytest.mark.parametrize(("remove", "code", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_folder_is_a_finding(
    tiny: Path, knowledge: Knowledge, remove: list[str], code: str, message: str
) -> None:
    """An estimate needs only config.json; what training lacks is an error among the findings and is named."""
    for name in remove:
        (tiny / name).unlink()
    spec = read_model(str(tiny), knowledge=knowledge)
    assert _codes(spec) == {code: "error"}
    assert message in spec.findings[0].message


def test_missing_shard_is_named(tiny: Path, knowledge: Knowledge) -> None:
    """A shard that the index lists and the folder lacks is named."""
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = read_model(str(tiny), knowledge=knowledge)
    assert "model-00002-of-00002.safetensors" in spec.findings[0].message


def test_cut_weights_are_an_error(tiny: Path, knowledge: Knowledge) -> None:
    """A weight file that was cut off is named before anything is loaded."""
    file = tiny / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 100, 200, 4):
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors is cut off") as caught:
            read_model(str(tiny), knowledge=knowledge)
        assert caught.value.code == "incomplete_model"


def test_pickled_weights_are_not_opened(tiny: Path, knowledge: Knowledge) -> None:
    """Pickled weights are named, with the reason why they are not read."""
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    spec = read_model(str(tiny), knowledge=knowledge)
    assert "pickle" in spec.findings[0].message


def test_weights_of_another_model_are_noticed(tiny: Path, knowledge: Knowledge) -> None:
    """config.json and weights that do not belong together are a finding with both counts."""
    _edit(tiny / "config.json", num_hidden_layers=3)
    spec = read_model(str(tiny), knowledge=knowledge)
    assert _codes(spec) == {"parameter_mismatch": "warning"}
    assert "The weights hold" in spec.unknown[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ()),
        ({"architectures": ["OddForCausalLM"]}, ("the class OddForCausalLM", "counted as LlamaForCausalLM")),
        ({"architectures": ["OddForCausalLM"], "model_type": "odd"}, ("OddForCausalLM is not known",)),
        ({"architectures": ..., "model_type": ...}, ("(not named)",)),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}}, ("modeling_odd",)),
        ({"num_key_value_heads": ...}, ("num_key_value_heads is not given",)),
        ({"max_position_embeddings": ...}, ("max_position_embeddings is not given: 2,048 counted",)),
        ({"vision_config": {"hidden_size": 8}}, ("sees or hears (vision_config)",)),
    ],
    ids=["all known", "class", "architecture", "nothing named", "own code", "key heads", "context", "senses"],
)
def test_what_is_not_known_is_said(
    tiny: Path, knowledge: Knowledge, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    """What config.json leaves open is named, and how it was counted; nothing is guessed in silence."""
    _edit(tiny / "config.json", **changes)
    file = str(tiny / "config.json")
    said = read_model(file, like="LlamaForCausalLM", knowledge=knowledge).unknown
    assert bool(said) is bool(words)
    assert all(word in "; ".join(said) for word in words)


def test_experts_are_counted_or_refused(tiny: Path, knowledge: Knowledge) -> None:
    """Experts take the place of the dense MLP, with a router; in unknown fields they are an error."""
    file = tiny / "config.json"
    dense = read_model(str(file), knowledge=knowledge)
    _edit(file, num_local_experts=8, num_experts_per_tok=2)
    mixture, shape = read_model(str(file), knowledge=knowledge), dense.shape
    one = 3 * shape.layers * shape.hidden * shape.intermediate
    assert mixture.parameters - dense.parameters == 7 * one + 8 * shape.layers * shape.hidden
    assert mixture.active_parameters == mixture.parameters - 6 * one
    assert (mixture.shape.experts, mixture.shape.intermediate) == (8, 2 * shape.intermediate)
    for changes, word in (
        ({"moe_intermediate_size": [8]}, "moe_intermediate_size"),
        ({"num_local_experts": ..., "moe_intermediate_size": ..., "expert_groups": 8}, "expert_groups"),
        ({"expert_groups": ..., "num_experts": "64"}, "num_experts"),
    ):
        _edit(file, **changes)
        with pytest.raises(ModelError, match=word):
            read_model(str(file), knowledge=knowledge)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (
            {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "num_local_experts": 8, "num_experts_per_tok": 2},
            46_702_792_704,
        ),
        (
            {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151936,
             "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
             "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
             "mlp_only_layers": [], "decoder_sparse_step": 1},
            30_532_122_624,
        ),
    ],
    ids=["Mixtral 8x7B", "Qwen3 30B-A3B"],
)  # fmt: skip
def test_mixtures_have_the_size_that_their_makers_state(
    tmp_path: Path, knowledge: Knowledge, fields: dict[str, Any], parameters: int
) -> None:
    """Counted like Llama with experts, two well-known mixtures come within a thousandth of their size."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    spec = read_model(str(file), like="LlamaForCausalLM", knowledge=knowledge)
    assert spec.parameters == pytest.approx(parameters, rel=1e-3)
    assert any("is not known" in one for one in spec.unknown)


def _adapter(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    return str(folder)


def _gguf(folder: Path) -> str:
    (folder / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    return str(folder / "m.gguf")


def _gguf_folder(folder: Path) -> str:
    _gguf(folder)
    (folder / "config.json").unlink()
    return str(folder)


def _quantised(folder: Path) -> str:
    _edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    return str(folder)


def _unknown(folder: Path) -> str:
    _edit(folder / "config.json", architectures=["LamaForCausalLM"], model_type="lama")
    return str(folder)


def _seeing(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return str(folder)


def _broken(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return str(folder)


def _no_width(folder: Path) -> str:
    _edit(folder / "config.json", hidden_size=...)
    return str(folder)


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return str(folder)


def _text(folder: Path) -> str:
    (folder / "m.txt").write_text("x")
    return str(folder / "m.txt")


BAD: dict[str, tuple[Any, str, str, str]] = {
    "adapter": (_adapter, "adapter_as_base", "its base is some/base", "--model some/base"),
    "gguf": (_gguf, "use_unquantised_base", "is a GGUF file", "original model"),
    "gguf folder": (_gguf_folder, "use_unquantised_base", "is a GGUF file", "original model"),
    "gptq": (_quantised, "use_unquantised_base", r"quantised \(gptq\)", "16-bit"),
    "architecture": (_unknown, "unknown_architecture", "LamaForCausalLM.*Nearest: LlamaForCausalLM", "Qwen3"),
    "sees": (_seeing, "unknown_architecture", "LlavaForConditionalGeneration is not known", "estimate"),
    "broken config": (_broken, "model", "not valid JSON", "original"),
    "field missing": (_no_width, "bad_config", "hidden_size must be a positive whole number", "config.json"),
    "no config": (_no_config, "incomplete_model", "has no config.json", "safetensors"),
    "other file": (_text, "model", "neither a model folder nor a config.json", "folder"),
    "nowhere": (lambda folder: str(folder / "a" / "b"), "unknown_model", "neither a folder", "starter"),
    "gguf nowhere": (lambda folder: "gone/away.gguf", "use_unquantised_base", "GGUF", "original model"),
}


@pytest.mark.parametrize(("make", "code", "message", "remedy"), BAD.values(), ids=BAD)
def test_unusable_model_is_named_with_its_remedy(
    tiny: Path, knowledge: Knowledge, make: Any, code: str, message: str, remedy: str
) -> None:
    """What cannot be a base model is refused with a code, the reason and the next step."""
    with pytest.raises(ModelError, match=message) as caught:
        read_model(make(tiny), knowledge=knowledge)
    assert caught.value.code == code
    assert remedy in caught.value.remedy


def test_multimodal_config_describes_its_text_part(tmp_path: Path, knowledge: Knowledge) -> None:
    """Where the language model is a part of config.json, that part is described."""
    text = {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        **SMALL,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model(str(tmp_path / "config.json"), knowledge=knowledge)
    assert spec.model_type == "gemma3_text"
    assert spec.shape.layers == 3
    assert (spec.shape.sliding_window, spec.shape.full_attention_layers) == (32, 1)


def test_copy_of_a_folder_reads_the_same(tiny: Path, tmp_path: Path, knowledge: Knowledge) -> None:
    """Nothing that is read depends on where the folder lies, but its path."""
    shutil.copytree(tiny, tmp_path / "other" / "tiny")
    first, second = (read_model(str(p), knowledge=knowledge) for p in (tiny, tmp_path / "other" / "tiny"))
    assert first.path != second.path
    assert (first.id, first.parameters, first.findings) == (second.id, second.parameters, second.findings)


def test_tokenizer_that_llama_cpp_cannot_follow_is_named(tiny: Path, knowledge: Knowledge) -> None:
    """Unigram and normalising tokenizers are recognised from the folder alone, ordinary ones pass."""
    assert read_model(str(tiny), knowledge=knowledge).gguf_obstacle == ""
    _edit(tiny / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert "Lowercase" in read_model(str(tiny), knowledge=knowledge).gguf_obstacle
    data = json.loads((tiny / "tokenizer.json").read_text())
    _edit(tiny / "tokenizer.json", normalizer=None, model={**data["model"], "type": "Unigram"})
    assert "Unigram" in read_model(str(tiny), knowledge=knowledge).gguf_obstacle
