"""Every family that is exported, tied or not, byte-level or SentencePiece-style, proved by llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from advisor.errors import ExportError
from advisor.export import export_model
from advisor.verify import verify_gguf
from families import LONGROPE, make_family

pytestmark = [pytest.mark.slow]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"spm": True}),
    "gemma2": ("gemma2", {"spm": True}),
    "gemma3": ("gemma3", {"tied": False, "spm": True}),
    "phi3": ("phi3", {"tied": False, "spm": True, "config": LONGROPE}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"spm": True}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, family, **more) for name, (family, more) in CASES.items()}


@pytest.mark.parametrize("name", list(CASES))
def test_family_answers_as_trained(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    """F32 logits match to rounding (GELU: to llama.cpp's table), token ids and template on all probes."""
    file = export_model(made[name], quants=("F32",), out=tmp_path).files[0]
    proof = verify_gguf(Path(file.path), against=made[name])
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]
    logits = next(check for check in proof.checks if check.name == "logits")
    gelu = name.startswith(("gemma", "gpt2"))
    assert float(logits.measured["max_delta"] or 1) < (1e-2 if gelu else 1e-4)


def test_space_before_the_first_words_alone(tmp_path: Path) -> None:
    """Llama's tokenizer class puts a space before a conversation but not after its special tokens."""
    folder = make_family(tmp_path / "model", "llama", spm=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"})
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    file = export_model(folder, quants=("F32",)).files[0]
    proof = verify_gguf(Path(file.path), against=folder)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]
    assert "a space was put in front" in proof.checks[0].evidence


def test_four_bits_of_wide_norms_and_transposed_weights(made: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2's transposed weights survive four bits, its positions stay exact."""
    file = export_model(made["gpt2"], quants=("Q4_K_M",), out=tmp_path).files[0]
    assert verify_gguf(Path(file.path), against=made["gpt2"]).passed
    assert file.mix["F32"] == 19


def test_mixtures_are_those_of_llama_cpp(made: dict[str, Path], tmp_path: Path) -> None:
    """Written in one pass, every tensor has type and bytes as llama.cpp's own quantiser makes them."""
    quants = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")
    files = export_model(made["smollm3"], quants=quants, out=tmp_path).files
    code = (
        "import ctypes, sys, llama_cpp\n"
        "for quant in sys.argv[2:]:\n"
        "    params = llama_cpp.llama_model_quantize_default_params()\n"
        "    params.ftype = getattr(llama_cpp, f'LLAMA_FTYPE_MOSTLY_{quant}')\n"
        "    target = f'{sys.argv[1]}.{quant}'.encode()\n"
        "    assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), target, ctypes.byref(params)) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code, files[0].path, *quants[1:]], check=True, capture_output=True)
    for file in files[1:]:
        theirs = {tensor.name: tensor for tensor in GGUFReader(f"{files[0].path}.{file.quant}").tensors}
        ours = {tensor.name: tensor for tensor in GGUFReader(file.path).tensors}
        assert theirs.keys() == ours.keys()
        assert [n for n in ours if ours[n].tensor_type != theirs[n].tensor_type] == []
        assert [n for n in ours if ours[n].data.tobytes() != theirs[n].data.tobytes()] == []


def _changed(folder: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("gemma", {"tie_word_embeddings": False}, "one for both"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 6}, "every 6th"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "without it"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "every 4th"),
        ("granite", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_what_llama_cpp_fixes_otherwise_is_refused(
    made: dict[str, Path], tmp_path: Path, name: str, config: dict[str, Any], told: str
) -> None:
    """Values that llama.cpp has built in are compared with config.json, family by family."""
    with pytest.raises(ExportError, match=told):
        export_model(_changed(made[name], tmp_path / "changed", **config), quants=("F32",))
