"""The pure parts of the export: rotation, scaling, names, types, templates, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.errors import DiskError, ExportError, ModelError, UnknownNameError
from advisor.export.adapter import _scale
from advisor.export.architecture import plan_model, row_order
from advisor.export.changes import Delta
from advisor.export.chat_template import end_of_turn, is_chatml
from advisor.export.checkpoint import open_checkpoint, read_json
from advisor.export.encode import Type, encode_rows, type_for
from advisor.export.files import complete_file, complete_folder, need_space
from advisor.export.modelfile import modelfile
from advisor.export.source import find_trained
from advisor.export.tokenizer import CONTROL, UNUSED, USER_DEFINED, read_vocabulary
from advisor.gguf_rules import checked_quants, rules
from families import write_pieces
from tiny import CHATML, make_tiny_model

SETTINGS = {"eos_token": "<|im_end|>"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**read_json(folder / "config.json"), **changes}


def test_rotation_order_makes_halves_neighbours() -> None:
    """Row i and row i + half of each head end up side by side."""
    assert row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata_says_what_config_says(folder: Path) -> None:
    """Sizes, rotation and context go into the file under llama.cpp's names."""
    plan = plan_model(_config(folder), own_head=False)
    assert plan.metadata["llama.context_length"] == 512
    assert plan.metadata["llama.attention.head_count_kv"] == 2
    assert plan.metadata["llama.rope.freq_base"] == 10000.0
    assert {tensor.name for tensor in plan.tensors} >= {"token_embd.weight", "blk.1.attn_q.weight"}
    assert "output.weight" not in {tensor.name for tensor in plan.tensors}


def test_llama3_rotation_slows_only_long_waves(folder: Path) -> None:
    """Short waves keep their speed, long ones are stretched by the factor, the rest lies between."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    factors = plan_model(_config(folder, rope_parameters=scaling), own_head=False).factors[
        "rope_freqs.weight"
    ]
    assert len(factors) == 32
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    assert list(factors) == sorted(factors)
    assert any(1.0 < factor < 8.0 for factor in factors)


def test_old_style_linear_scaling_is_read(folder: Path) -> None:
    """`rope_scaling` with `type`, as checkpoints before transformers 5 have it, means the same."""
    config = _config(folder, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=20000.0)
    del config["rope_parameters"]
    plan = plan_model(config, own_head=False)
    assert plan.metadata["llama.rope.scaling.factor"] == 4.0
    assert plan.metadata["llama.rope.freq_base"] == 20000.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_would_compute_differently_is_refused(folder: Path, changes: dict[str, Any], told: str) -> None:
    """An unknown field or value is named and refused, never skipped."""
    with pytest.raises(ExportError, match=told):
        plan_model(_config(folder, **changes), own_head=False)


def test_empty_unknown_field_is_harmless(folder: Path) -> None:
    """A field that is null asks for nothing."""
    plan_model(_config(folder, something_new=None), own_head=False)


def test_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    """Within the window full attention is the same, so the context ends there and a note says so."""
    folder = make_tiny_model(tmp_path / "mistral", architecture="mistral", config={"sliding_window": 128})
    plan = plan_model(_config(folder), own_head=False)
    assert plan.metadata["llama.context_length"] == 128
    assert "128" in plan.notes[0]


def test_vocabulary_has_types_ends_and_template(folder: Path) -> None:
    """Special tokens are control, the end of turn is the end, markers are gone from the template."""
    found = read_vocabulary(folder, folder, rows=520)
    assert (found.pre, found.model) == ("gpt-2", "gpt2")
    assert found.tokens[found.eos] == "<|im_end|>"
    assert found.tokens[found.pad or 0] == "<|pad|>"
    assert found.types[:4] == (CONTROL,) * 4
    assert found.types[-1] == UNUSED
    assert len(found.tokens) == 520
    assert "generation %}" not in (found.chat_template or "")
    assert not found.add_bos


def test_end_of_turn_wins_over_eos(folder: Path) -> None:
    """A tokenizer that names another end than the template trains does not change what ends a turn."""
    _edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    found = read_vocabulary(folder, folder, rows=512)
    assert found.tokens[found.eot] == found.end_texts[0] == "<|im_end|>"
    assert found.tokens[found.eos] == "<|endoftext|>"
    assert "<|endoftext|>" in found.end_texts


def test_bos_is_not_added_where_the_template_has_none(folder: Path) -> None:
    """A BOS that no trained prompt began with is not put before prompts."""
    data = read_json(folder / "tokenizer.json")
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ],
        "pair": [], "special_tokens": {},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    _edit(folder / "tokenizer_config.json", bos_token="<|endoftext|>")
    found = read_vocabulary(folder, folder, rows=512)
    assert found.bos == 0
    assert not found.add_bos
    assert "trained without it" in found.notes[0]
    (folder / "chat_template.jinja").unlink()
    assert read_vocabulary(folder, folder, rows=512).add_bos


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen2-nfc"])
def test_split_pattern_names_the_pre_tokenizer(tmp_path: Path, kind: str) -> None:
    """The tokenizer's own pattern decides, not the name of the model."""
    folder = make_tiny_model(tmp_path / kind, tokenizer=kind)
    found = read_vocabulary(folder, folder, rows=512)
    assert found.pre == {"llama3": "llama-bpe"}.get(kind, "qwen2")
    assert (found.normaliser == "NFC") == (kind == "qwen2-nfc")


def _tokenizer(folder: Path, **changes: Any) -> None:
    _edit(folder / "tokenizer.json", **changes)


def test_what_llama_cpp_cannot_tokenise_is_refused(folder: Path) -> None:
    """Unigram, other normalisers, unknown patterns and stripping tokens are refused with the reason."""
    original = read_json(folder / "tokenizer.json")
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    token = {**original["added_tokens"][0], "rstrip": True}
    cases = [
        ({"model": {**original["model"], "type": "Unigram"}}, "Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}, "pre-tokenizer"),
        ({"pre_tokenizer": None}, "pre-tokenizer"),
        ({"added_tokens": [token]}, "rstrip"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    ]
    for changes, told in cases:
        (folder / "tokenizer.json").write_text(json.dumps({**original, **changes}), encoding="utf-8")
        with pytest.raises(ExportError, match=told):
            read_vocabulary(folder, folder, rows=512)


def test_tokenizer_is_what_its_class_makes_of_it(tmp_path: Path) -> None:
    """Where transformers builds a tokenizer anew, that is what was trained: file and folder agree with it."""
    folder = tmp_path / "llama"
    folder.mkdir()
    write_pieces(folder, vocab=640, prefix=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert read_vocabulary(folder, folder, rows=640).add_space_prefix
    _edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    found = read_vocabulary(folder, folder, rows=640)
    assert (found.add_space_prefix, found.normaliser) == (False, "space")
    assert str(found.chat_template).startswith("{%- for message")
    (folder / "chat_template.jinja").write_text("User: {{ messages[0]['content'] }}{{ eos_token }}")
    assert str(read_vocabulary(folder, folder, rows=640).chat_template).startswith("{{ ' ' }}User")
    (folder / "chat_template.jinja").unlink()
    raw = read_vocabulary(folder, folder, rows=640)
    assert (raw.add_space_prefix, raw.normaliser, raw.plain_only) == (True, None, True)
    _edit(folder / "tokenizer_config.json", legacy=True)
    with pytest.raises(ExportError, match="metaspace always"):
        read_vocabulary(folder, folder, rows=640)


def test_family_decides_over_the_pattern(tmp_path: Path) -> None:
    """Every Qwen2 model is cut by Qwen2's pattern, because transformers does so whatever the file says."""
    folder = make_tiny_model(tmp_path / "qwen2", tokenizer="llama3")
    assert read_vocabulary(folder, folder, rows=512).pre == "llama-bpe"
    _edit(folder / "config.json", model_type="qwen2")
    found = read_vocabulary(folder, folder, rows=512)
    assert (found.pre, found.normaliser) == ("qwen2", "NFC")
    write_pieces(folder, vocab=640, prefix=True)
    with pytest.raises(ExportError, match="of 256 bytes"):
        read_vocabulary(folder, folder, rows=640)


def test_added_plain_token_is_user_defined(folder: Path) -> None:
    """An added token that is not special keeps that apart from control tokens."""
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    _tokenizer(folder, added_tokens=[*added, {**added[0], "id": 511, "content": "<tool>", "special": False}])
    found = read_vocabulary(folder, folder, rows=512)
    assert (found.tokens[511], found.types[511]) == ("<tool>", USER_DEFINED)


def test_more_tokens_than_rows_is_another_model(folder: Path) -> None:
    """A tokenizer with ids beyond the embedding belongs to another model."""
    with pytest.raises(ModelError, match="only 300 rows"):
        read_vocabulary(folder, folder, rows=300)


def test_no_end_token_is_refused(folder: Path) -> None:
    """Without any end token generation would never stop."""
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    _edit(folder / "tokenizer_config.json", eos_token=None)
    _edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(ExportError, match="never stop"):
        read_vocabulary(folder, folder, rows=512)


def test_template_is_recognised_by_what_it_renders() -> None:
    """ChatML is ChatML however it is written; anything else is not."""
    assert is_chatml(CHATML, SETTINGS)
    assert not is_chatml("{{ messages[0].content }}", SETTINGS)
    assert end_of_turn(CHATML, SETTINGS, ["<|im_end|>", "<|im", "x"]) == "<|im_end|>"
    assert end_of_turn("{{ messages[-1].content }}", SETTINGS, ["<|im_end|>"]) is None


def test_modelfile_stops_at_every_end_token(folder: Path) -> None:
    """Each end token is a stop parameter, and the template is given for ChatML."""
    text = modelfile("a.gguf", read_vocabulary(folder, folder, rows=512), SETTINGS)
    assert text.startswith("FROM ./a.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "<|im_start|>{{ .Role }}" in text


@pytest.mark.parametrize(
    ("config", "module", "scale"),
    [
        ({"lora_alpha": 16}, "model.layers.0.self_attn.q_proj", 2.0),
        ({"lora_alpha": 16, "use_rslora": True}, "model.layers.0.self_attn.q_proj", 16 / 8**0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"q_proj": 32}}, "model.layers.0.self_attn.q_proj", 4.0),
        ({"lora_alpha": 16, "alpha_pattern": {"q_proj": 32}}, "model.layers.0.self_attn.k_proj", 2.0),
    ],
)
def test_adapter_scale_follows_peft(config: dict[str, Any], module: str, scale: float) -> None:
    """alpha / rank, for rsLoRA over the root, patterns by the end of the name."""
    assert _scale(config, module, rank=8) == pytest.approx(scale)


def test_merged_rows_equal_the_merged_matrix() -> None:
    """Any part of the rows, in any order, is the same as the whole merge; DoRA included."""
    random = np.random.default_rng(0)
    weight, a, b, m = (
        random.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (2, 4), (6, 2), (6,))
    )
    rows = np.array([5, 0, 3])
    for magnitude in (None, np.abs(m)):
        delta = Delta(scale=0.5, a=a, b=b, magnitude=magnitude)
        assert np.allclose(delta.rows(weight[rows], rows), delta.rows(weight, slice(None))[rows])
    assert np.allclose(Delta(scale=0.5, a=a, b=b).rows(weight, slice(None)), weight + 0.5 * b @ a)


def test_overflow_and_infinity_are_named() -> None:
    """F16 says when it overflows; no type takes an infinite weight."""
    with pytest.raises(ExportError, match=r"65504") as caught:
        encode_rows("w", np.full((1, 4), 1e6, dtype=np.float32), Type.F16)
    assert caught.value.code == "f16_overflow"
    with pytest.raises(ExportError, match="diverged"):
        encode_rows("w", np.full((1, 32), np.nan, dtype=np.float32), Type.Q8_0)


def test_rows_that_fill_no_block_fall_back() -> None:
    """Vectors stay F32; a row of 40 cannot be Q8_0."""
    assert type_for("Q8_0", (4, 64)) == Type.Q8_0
    assert type_for("Q8_0", (4, 40)) == Type.F16
    assert type_for("Q8_0", (64,)) == Type.F32


def test_quantisations_are_checked_by_name() -> None:
    """Case does not matter, repetition neither; a wrong name shows the nearest."""
    assert checked_quants(("f16", "Q4_K_M", "F16")) == ("F16", "Q4_K_M")
    with pytest.raises(UnknownNameError, match="Q4_K_M"):
        checked_quants(("Q4_KM",))
    facts = rules().quantisations
    assert set(facts.preferred) == set(facts.direct + facts.through_llama)
    assert set(rules().architectures) >= {"LlamaForCausalLM", "Qwen2ForCausalLM"}


def _interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    """An interrupted write leaves the old file with its proof; a new file has none yet."""
    path = tmp_path / "a.gguf"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), complete_file(path) as aside:
        _interrupted(aside)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    proof = tmp_path / "a.verification.json"
    proof.write_text("of the old one")
    with pytest.raises(KeyboardInterrupt), complete_file(path) as aside:
        _interrupted(aside)
    assert proof.is_file(), "it still tells of the file that is there"
    with complete_file(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_two_exports_do_not_write_the_same_file(tmp_path: Path) -> None:
    """The second one is told to wait and leaves the first one's work alone."""
    path = tmp_path / "a.gguf"
    with complete_file(path) as aside:
        aside.write_text("first")
        with pytest.raises(DiskError, match="Another export"), complete_file(path):
            pass
        assert aside.is_file()
    assert path.read_text() == "first"


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    """The same for a folder of merged weights, also where a killed export left half of one."""
    path = tmp_path / "merged"
    with pytest.raises(KeyboardInterrupt), complete_folder(path) as aside:
        _interrupted(aside / "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".merged.part" / "deep").mkdir(parents=True)
    for words in ("old", "new"):
        with complete_folder(path) as aside:
            (aside / words).write_text(words)
    assert [file.name for file in tmp_path.rglob("*")] == ["merged", "new"]


def test_two_exports_do_not_write_the_same_folder(tmp_path: Path) -> None:
    """The second one is told to wait and leaves the first one's work alone."""
    path = tmp_path / "merged"
    with complete_folder(path) as aside:
        (aside / "first").write_text("first")
        with pytest.raises(DiskError, match="Another export"), complete_folder(path):
            pass
    assert [file.name for file in path.iterdir()] == ["first"]


def test_space_is_checked_before_writing(tmp_path: Path) -> None:
    """The error names what is needed and what is free; a place that is no folder is named too."""
    with pytest.raises(DiskError, match=r"needs .* free"):
        need_space(tmp_path, 1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Cannot write"):
        need_space(tmp_path / "file" / "below", 1)


def test_what_a_killed_export_left_gives_its_space_back(tmp_path: Path) -> None:
    """Half files of any name are removed before the next export; one that is being written stays, and one
    that another process took away meanwhile is nobody's fault."""
    (tmp_path / ".a-F16.gguf.part").write_text("half")
    for kind in ("merged", "adapter"):
        (tmp_path / f".a-{kind}.part").mkdir()
    (tmp_path / ".gone-F16.gguf.part").symlink_to("gone")
    (tmp_path / ".mine.part").write_text("of another program")
    with complete_file(tmp_path / "b-F16.gguf") as aside:
        aside.write_text("whole")
        need_space(tmp_path, 1)
    left = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert left == {".mine.part", "b-F16.gguf"}


def test_damaged_checkpoints_are_named(folder: Path) -> None:
    """A missing shard, a file cut short, and weights in another format each get their own error."""
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cut short"):
        open_checkpoint(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only a \.bin"):
        open_checkpoint(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        open_checkpoint(folder)


def test_adapter_belongs_to_the_base_that_it_names(folder: Path, tmp_path: Path) -> None:
    """Of a base on the hub the pinned revision is taken; one that is not named, or gone, is told."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    commits = ("a" * 40, "b" * 40)
    store = tmp_path / "home" / "hub" / "models--owner--model"
    for commit in commits:
        make_tiny_model(store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commits[1])
    code = (
        "import sys; from pathlib import Path; from advisor.export.source import find_trained\n"
        "print(find_trained(Path(sys.argv[1]), offline=True, on_progress=lambda _: None).base)"
    )
    named = {"base_model_name_or_path": "owner/model", "revision": commits[0]}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", code, str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().endswith(commits[0])
    for base, told in ((None, "names no base model"), (str(tmp_path / "gone"), "not there any more")):
        _edit(adapter / "adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(ModelError, match=told) as caught:
            find_trained(adapter, offline=True, on_progress=lambda _: None)
        assert "base_model_name_or_path" in caught.value.remedy


def test_export_loads_no_torch() -> None:
    """The exporter and the command layer above it work without importing torch, transformers or llama_cpp."""
    code = (
        "import sys; import advisor.export, advisor.verify, advisor.chat; "
        "print([m for m in ('torch', 'transformers', 'peft', 'llama_cpp') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
