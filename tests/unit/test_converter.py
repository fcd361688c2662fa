"""llama.cpp's own converter is found, kept with its checksum, and never fetched when that is forbidden."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from advisor.errors import ExportError, UsageError
from advisor.export import export_model
from advisor.export.converter import _unpack, contents_sha256, find_converter
from advisor.verify import verify_gguf
from tiny import make_tiny_model


def _silent(_: str) -> None:
    pass


def _archive(path: Path, names: tuple[str, ...]) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name in names:
            member = tarfile.TarInfo(f"llama_cpp_python-9/vendor/llama.cpp/{name}")
            member.size = 5
            package.addfile(member, io.BytesIO(b"text\n"))
    return path


def test_without_the_network_the_way_out_is_named(tmp_path: Path) -> None:
    """An unknown architecture offline says what is missing and how to get it; nothing is left behind."""
    folder = make_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["StrangeForCausalLM"]}))
    with pytest.raises(ExportError, match="own converter") as caught:
        export_model(folder, quants=("F16",), out=tmp_path / "out", offline=True)
    assert "--llama-cpp" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="has no convert_hf_to_gguf"):
        export_model(folder, quants=("F16",), out=tmp_path / "out", llama_cpp=tmp_path)


def test_what_the_converter_cannot_help_is_told_without_it(tmp_path: Path) -> None:
    """No architecture at all, or no vocabulary of its own, is named as what it is."""
    folder = make_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "convert_hf_to_gguf.py").touch()
    cases = (
        ({"architectures": []}, r"\(none\)"),
        ({"architectures": ["S"], "vocab_size": None}, "vocab_size"),
    )
    for change, told in cases:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ExportError, match=told):
            export_model(folder, quants=("F16",), out=tmp_path / "out", llama_cpp=tmp_path)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "BOTTLENECK"])
def test_what_peft_cannot_merge_is_told_before_the_converter_is_fetched(tmp_path: Path, kind: str) -> None:
    """On an unknown architecture, adapters that stay beside their base are refused at once."""
    folder = make_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["StrangeForCausalLM"]}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": kind, "base_model_name_or_path": str(folder)})
    )
    with pytest.raises(ExportError, match=f"{kind} cannot be merged"):
        export_model(adapter, quants=("F16",), out=tmp_path / "out", offline=True)
    assert not (tmp_path / "out").exists()


def test_only_the_converter_is_unpacked(tmp_path: Path) -> None:
    """Of a source package of 77 MB the converter and its library are kept, and nothing leaves the folder."""
    names = (
        "convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py", "src/llama.cpp",
        "conversion/../../../outside.py",
    )  # fmt: skip
    _unpack(_archive(tmp_path / "a.tar.gz", names), tmp_path / "made" / "here")
    found = {
        str(path.relative_to(tmp_path / "made" / "here")) for path in tmp_path.rglob("made/here/**/*.py")
    }
    assert found == {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/x.py"}
    assert not list(tmp_path.rglob("outside.py"))
    with pytest.raises(ExportError, match="holds no convert"):
        _unpack(_archive(tmp_path / "b.tar.gz", ("src/llama.cpp",)), tmp_path / "none")


def test_changed_copy_is_not_used(tmp_path: Path) -> None:
    """A kept converter is run as it was fetched, or not at all."""
    version = importlib.metadata.version("llama-cpp-python")
    kept = tmp_path / f"converter-{version}"
    _unpack(_archive(tmp_path / "a.tar.gz", ("convert_hf_to_gguf.py", "conversion/base.py")), kept)
    record = {"version": version, "archive_sha256": "0", "contents_sha256": contents_sha256(kept)}
    (kept / "source.json").write_text(json.dumps(record))
    assert find_converter(None, cache=tmp_path, offline=True, on_progress=_silent) == kept
    (kept / "conversion" / "base.py").write_text("import os\n")
    with pytest.raises(ExportError, match="own converter"):
        find_converter(None, cache=tmp_path, offline=True, on_progress=_silent)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.slow
def test_other_architecture_is_converted_and_proved(tmp_path: Path) -> None:
    """An adapter on an architecture not written here, in four bits by an importance matrix, is right."""
    if "FTADVISOR_LLAMA_CPP" not in os.environ:
        pytest.skip("FTADVISOR_LLAMA_CPP names no checkout of llama.cpp")
    checkout = Path(os.environ["FTADVISOR_LLAMA_CPP"])
    import gguf
    import peft
    import transformers

    from advisor.export.encode import encode_rows
    from advisor.verify.importance import measure_importance
    from families import randomise
    from methods import METHODS, make_adapter

    folder = make_tiny_model(tmp_path / "model")
    made = transformers.StableLmConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(made)
    randomise(model, small=False)
    model.save_pretrained(folder)
    adapter = make_adapter(folder, METHODS["lora"], tmp_path / "adapter")
    rows = tmp_path / "texts.jsonl"
    lines = [f"Water {number} runs from the hills to the sea; it is wild in March." for number in range(40)]
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    found = measure_importance(adapter, (rows,), offline=True, on_progress=_silent)

    exported = export_model(adapter, quants=("Q4_K_M",), importance=found, llama_cpp=checkout)
    file = Path(exported.files[0].path)
    assert exported.files[0].importance
    assert any("texts.jsonl" in note for note in exported.notes)
    proof = verify_gguf(file, against=adapter)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]
    assert not [path for path in file.parent.iterdir() if path.name.startswith(".")]

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }
    for name, module in names.items():
        tensor, origin = tensors[f"{name}.weight"], f"{module}.weight"
        values = weights[origin].float().numpy(), tensor.tensor_type
        assert tensor.data.tobytes() == encode_rows(name, *values, found.columns[origin]).tobytes()
        assert tensor.data.tobytes() != encode_rows(name, *values, None).tobytes()
    assert reader.fields["quantize.imatrix.dataset"].contents() == "texts.jsonl"
    assert reader.fields["quantize.imatrix.entries_count"].contents() == len(found.columns)
