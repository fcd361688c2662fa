"""Tiny models exported by the real writers and proved by llama.cpp; faults planted into the files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from advisor.chat import ChatSession, answer_once, compare
from advisor.cli.main import run
from advisor.errors import AdvisorError, DiskError, ExportError, InputError, ModelError, UsageError
from advisor.export import export_model
from advisor.export.native import run_llama
from advisor.storage import file_sha256
from advisor.types import Check, Export, Verification
from advisor.verify import heldout_rows, verify_gguf
from tiny import make_tiny_model

pytestmark = [
    pytest.mark.slow,
    # peft, making adapters: names that transformers renames, advice on shared embeddings.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
QUANTS = ("F32", "F16", "Q8_0", "Q4_K_M")
LLAMA3_ROTATION = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"architecture": "llama", "tied": True},
    "llama-untied": {
        "architecture": "llama", "tied": False, "dtype": "bfloat16", "tokenizer": "llama3",
        "config": {
            "attention_bias": True, "mlp_bias": True, "head_dim": 32, "rope_parameters": LLAMA3_ROTATION,
        },
    },
    "qwen2": {"architecture": "qwen2", "tied": True, "hidden": 384},
    "mistral": {"architecture": "mistral", "tied": False, "config": {"sliding_window": 64}},
    "qwen3": {"architecture": "qwen3", "tied": True, "config": {"vocab_size": 544, "rope_parameters": YARN}},
}  # fmt: skip
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama-tied", {"target_modules": "all-linear"}),
    "patterns": (
        "llama-untied",
        {
            "target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"q_proj": 32},
            "rank_pattern": {"v_proj": 4},
        },
    ),
    "dora": ("mistral", {"target_modules": "all-linear", "use_dora": True}),
    "norms": ("qwen2", {"target_modules": "all-linear", "modules_to_save": ["input_layernorm", "norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(root / name, **settings) for name, settings in MODELS.items()}


@pytest.fixture(scope="module")
def adapters(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for name, (base, settings) in ADAPTERS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(models[base])
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, **settings))
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
        made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def exported(models: dict[str, Path]) -> Export:
    """The tied Llama in every quantisation."""
    return export_model(models["llama-tied"], to=("gguf", "modelfile"), quants=QUANTS)


def _file(made: Export, quant: str) -> Path:
    return next(Path(file.path) for file in made.files if file.quant == quant)


def _failed(proof: Verification) -> set[str]:
    return {check.name for check in proof.checks if not check.passed}


def _check(proof: Verification, name: str) -> Check:
    return next(check for check in proof.checks if check.name == name)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_family_is_exported_and_proved(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Each family's files answer as the model does: one family in every quantisation, the others in two."""
    quants = QUANTS if name == "llama-tied" else ("F32", "Q4_K_M")
    made = export_model(models[name], quants=quants, out=tmp_path)
    assert [file.quant for file in made.files] == list(quants)
    for file in made.files:
        proof = verify_gguf(Path(file.path), against=models[name])
        assert proof.passed, (file.quant, [c.evidence for c in proof.checks if not c.passed])
        assert len(proof.checks) == (7 if file.quant in ("F32", "F16") else 8)
        assert int(_check(proof, "token_ids").measured["texts"] or 0) >= 100
        assert int(_check(proof, "logits").measured["positions"] or 0) >= 64
        if file.quant == "F32":
            assert float(_check(proof, "logits").measured["max_delta"] or 1) < 1e-4


def test_output_layer_stored_beside_a_shared_embedding_counts(tmp_path: Path) -> None:
    """config.json says shared, the weights hold two that differ: transformers takes both, as we do."""
    folder = make_tiny_model(tmp_path / "model", tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    proof = verify_gguf(_file(export_model(folder, quants=("F32",)), "F32"), against=folder)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_every_adapter_is_merged_exactly(adapters: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The merged file equals base and live adapter, in F32 to rounding and in four bits within bounds."""
    made = export_model(adapters[name], quants=("F32", "Q4_K_M"), out=tmp_path)
    for file in made.files:
        proof = verify_gguf(Path(file.path), against=adapters[name])
        assert proof.passed, (file.quant, [c.evidence for c in proof.checks if not c.passed])
        if file.quant == "F32":
            assert float(_check(proof, "logits").measured["max_delta"] or 1) < 1e-4


def test_record_holds_the_truth_about_the_files(exported: Export) -> None:
    """Checksums, the true mix of types and bits per weight are recorded, and export.json is the same."""
    four = next(file for file in exported.files if file.quant == "Q4_K_M")
    assert four.mix == {"F32": 5, "Q4_K": 12, "Q6_K": 3}
    assert 4.5 < (four.bits_per_weight or 0) < 5.5
    recorded = json.loads(_file(exported, "F16").with_name("export.json").read_text())
    assert {file["sha256"] for file in recorded["files"]} == {file.sha256 for file in exported.files}
    left = {path.name for path in _file(exported, "F16").parent.iterdir()}
    assert not [name for name in left if name.startswith(".")]


def test_merged_folder_loads_without_peft(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Merged weights are an ordinary model whose export is the same as the adapter's."""
    made = export_model(adapters["head"], to=("merged", "gguf"), quants=("F32",), out=tmp_path)
    merged = Path(made.files[0].path).parent
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify_gguf(_file(made, "F32"), against=merged).passed


def test_merged_weights_keep_the_precision_of_the_base(tmp_path: Path) -> None:
    """Each is stored as the base stores it, also where config.json is silent about it or types are mixed."""
    folder = make_tiny_model(tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": None, "torch_dtype": None}))
    weights = load_file(folder / "model.safetensors")
    first = next(name for name in sorted(weights) if weights[name].ndim == 2)
    weights[first] = weights[first].astype(np.float16)
    save_file(weights, folder / "model.safetensors")
    (made,) = export_model(folder, to=("merged",), out=tmp_path).files
    merged = load_file(made.path)
    assert {name: merged[name].dtype for name in merged} == {name: weights[name].dtype for name in weights}
    assert all(np.array_equal(merged[name], weights[name]) for name in weights)


def test_command_compares_the_files_and_writes_a_card(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the files is recommended by what was measured; the card beside them says the same."""
    wanted = ("--to", "gguf,modelfile", "--quant", "F16,Q4_K_M", "--out", str(tmp_path), "--json")
    assert run(["export", str(models["llama-tied"]), *wanted]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = {row["quant"]: row for row in answer["table"]}
    assert [rows[quant]["recommended"] for quant in ("F16", "Q4_K_M")] == [True, False]
    assert abs(rows["F16"]["perplexity_change"]) < abs(rows["Q4_K_M"]["perplexity_change"])
    assert rows["F16"]["tokens_per_second"] > 1
    modelfile = tmp_path / "Modelfile"
    assert modelfile.read_text().startswith("FROM ./llama-tied-F16.gguf\nPARAMETER stop")
    card = (tmp_path / "README.md").read_text()
    assert f"`Modelfile`: `{file_sha256(modelfile)}`" in card
    assert file_sha256(modelfile) in (tmp_path / "export.json").read_text()
    assert "**llama-tied-F16.gguf** (recommended)" in card
    assert rows["Q4_K_M"]["path"].rpartition("/")[2] in card
    assert answer["export"]["files"][-1]["kind"] == "card"
    (tmp_path / "README.md").write_text("mine")
    assert (
        run(["export", str(models["llama-tied"]), "--quant", "F16", "--out", str(tmp_path), "--no-verify"])
        == 0
    )
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "not verified" in (tmp_path / "MODEL_CARD.md").read_text()


def test_second_export_keeps_what_is_still_of_the_model(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other types join the table with their proofs; a file that was changed, or a changed model, does not."""
    folder = shutil.copytree(models["llama-tied"], tmp_path / "model", ignore=lambda *_: {"export"})
    out = folder / "export"

    def export(quant: str, *more: str) -> tuple[dict[str, Any], str]:
        assert run(["export", str(folder), "--quant", quant, "--json", *more]) == 0
        said = capsys.readouterr()
        return {row["quant"]: row for row in json.loads(said.out)["table"]}, said.err

    export("F16")
    rows, _ = export("Q8_0", "--no-verify")
    assert {quant: row["proved"] for quant, row in rows.items()} == {"Q8_0": None, "F16": True}
    assert rows["F16"]["kl_mean"] is not None
    assert all(f"model-{quant}.gguf`: `" in (out / "README.md").read_text() for quant in rows)
    moved = folder.rename(tmp_path / "moved")
    folder, out = moved, moved / "export"
    with (out / "model-F16.gguf").open("r+b") as file:
        file.truncate(100_000)
    rows, _ = export("Q8_0", "--no-verify")
    assert list(rows) == ["Q8_0"]
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")
    assert list(export("Q4_K_M", "--no-verify")[0]) == ["Q4_K_M"]
    (out / "moved-Q4_K_M.verification.json").mkdir()  # nothing can be written there
    assert run(["verify", str(out / "moved-Q4_K_M.gguf"), "--against", str(folder)]) == 0
    said = capsys.readouterr()
    assert "PROVED" in said.out
    assert "the proof is not kept: Cannot write" in said.err


# --- faults planted into files -----------------------------------------------------------------------


def _patched(source: Path, target: Path, change: Callable[[gguf.GGUFReader], None]) -> Path:
    shutil.copyfile(source, target)
    reader = gguf.GGUFReader(target, mode="r+")
    change(reader)
    reader.data.flush()
    return target


def _tensor(reader: gguf.GGUFReader, name: str) -> Any:
    return next(tensor for tensor in reader.tensors if tensor.name == name).data


def _zero(reader: gguf.GGUFReader) -> None:
    _tensor(reader, "blk.1.ffn_up.weight")[:] = 0


def _skip_norm(reader: gguf.GGUFReader) -> None:
    _tensor(reader, "blk.0.attn_norm.weight")[:] = 1


def _swap_rows(reader: gguf.GGUFReader) -> None:
    rows = _tensor(reader, "token_embd.weight")
    rows[[300, 301]] = rows[[301, 300]]


def _other_end(reader: gguf.GGUFReader) -> None:
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 0


def _other_template(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.chat_template"]
    text = bytes(field.parts[-1]).replace(b"assistant", b"assistAnt")
    field.parts[-1][:] = np.frombuffer(text, dtype=np.uint8)


def _other_type(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.ggml.token_type"]
    field.parts[field.data[2]][0] = 1


def _other_rotation(reader: gguf.GGUFReader) -> None:
    reader.fields["llama.rope.freq_base"].parts[-1][0] = 100.0


def _other_context(reader: gguf.GGUFReader) -> None:
    reader.fields["llama.context_length"].parts[-1][0] = 1024


@pytest.mark.parametrize(
    ("quant", "change", "caught"),
    [
        ("F16", _zero, {"tensors", "logits"}),
        ("Q4_K_M", _zero, {"tensors"}),
        ("F16", _skip_norm, {"tensors", "logits"}),
        ("Q4_K_M", _skip_norm, {"tensors"}),
        ("F16", _swap_rows, {"tensors"}),
        ("Q4_K_M", _swap_rows, {"tensors"}),
        ("F16", _other_end, {"special_tokens"}),
        ("F16", _other_template, {"chat_template"}),
        ("F16", _other_type, {"special_tokens"}),
        ("F16", _other_context, {"metadata"}),
        ("Q4_K_M", _other_rotation, {"metadata", "arithmetic"}),
        ("Q4_K_M", _other_end, {"special_tokens"}),
        ("Q4_K_M", _other_template, {"chat_template"}),
        ("Q4_K_M", _other_type, {"special_tokens"}),
    ],
)
def test_planted_fault_is_caught(
    exported: Export,
    models: dict[str, Path],
    tmp_path: Path,
    quant: str,
    change: Callable[[gguf.GGUFReader], None],
    caught: set[str],
) -> None:
    """Verification fails, and names the aspect that was damaged."""
    bad = _patched(_file(exported, quant), tmp_path / "bad.gguf", change)
    proof = verify_gguf(bad, against=models["llama-tied"])
    assert not proof.passed
    assert caught <= _failed(proof)


def test_wrong_pre_tokenizer_is_caught(models: dict[str, Path], tmp_path: Path) -> None:
    """A file that cuts text by another pattern gives other token ids."""
    other = shutil.copytree(models["llama-tied"], tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    donor = json.loads((models["llama-untied"] / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**data, "pre_tokenizer": donor["pre_tokenizer"]}))
    for file in export_model(other, quants=("F16", "Q4_K_M")).files:
        proof = verify_gguf(Path(file.path), against=models["llama-tied"])
        assert {"token_ids", "metadata"} <= _failed(proof), file.quant


def test_bias_dropped_is_caught(models: dict[str, Path], tmp_path: Path) -> None:
    """A bias of nothing but zeros hides in four bits' logits, not from the tensors."""
    made = export_model(models["qwen2"], quants=("F16", "Q4_K_M"), out=tmp_path)

    def drop(reader: gguf.GGUFReader) -> None:
        _tensor(reader, "blk.0.attn_k.bias")[:] = 0

    for quant in ("F16", "Q4_K_M"):
        bad = _patched(_file(made, quant), tmp_path / "bad.gguf", drop)
        assert "tensors" in _failed(verify_gguf(bad, against=models["qwen2"])), quant


def test_adapter_scaled_wrongly_is_caught(adapters: dict[str, Path], tmp_path: Path) -> None:
    """An adapter at 1.3 times its strength shows even below the noise of four bits."""
    weak = shutil.copytree(adapters["plain"], tmp_path / "weak")
    weights = load_file(weak / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] = weights[name] * np.float32(0.02)
    save_file(weights, weak / "adapter_model.safetensors")
    strong = shutil.copytree(weak, tmp_path / "strong")
    config = json.loads((strong / "adapter_config.json").read_text())
    (strong / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16 * 1.3}))
    made = export_model(strong, quants=("F16", "Q4_K_M"), out=tmp_path / "out")
    for quant in ("F16", "Q4_K_M"):
        proof = verify_gguf(_file(made, quant), against=weak)
        assert "tensors" in _failed(proof), quant
        assert "times what the adapter adds" in _check(proof, "tensors").evidence or quant == "F16"
    assert verify_gguf(_file(made, "Q4_K_M"), against=strong).passed


def test_adapter_on_the_wrong_base_is_caught(adapters: dict[str, Path], tmp_path: Path) -> None:
    """A base of the same shape with other weights gives another model; one of another shape is refused."""
    wrong = shutil.copytree(adapters["plain"], tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    other = make_tiny_model(tmp_path / "other", seed=7)
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    for file in export_model(wrong, quants=("F16", "Q4_K_M")).files:
        assert {"tensors", "logits"} <= _failed(verify_gguf(Path(file.path), against=adapters["plain"]))
    larger = make_tiny_model(tmp_path / "larger", hidden=512)
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(larger)}))
    with pytest.raises(ModelError, match="another base"):
        export_model(wrong, quants=("F16",))


def test_truncated_file_is_caught(exported: Export, models: dict[str, Path], tmp_path: Path) -> None:
    """A file cut short fails its verification instead of crashing it."""
    bad = tmp_path / "bad.gguf"
    for quant in ("F16", "Q4_K_M"):
        bad.write_bytes(_file(exported, quant).read_bytes()[:-100_000])
        proof = verify_gguf(bad, against=models["llama-tied"])
        assert not proof.passed
        assert "cut short" in proof.checks[0].evidence


# --- inputs that cannot work, disks that fill, interruptions -------------------------------------------


def _broken(models: dict[str, Path], folder: Path, **config: Any) -> Path:
    shutil.copytree(models["llama-tied"], folder, ignore=shutil.ignore_patterns("export"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def test_unusable_sources_are_refused(models: dict[str, Path], exported: Export, tmp_path: Path) -> None:
    """Each says what was given and what to do; nothing is left behind."""
    empty = tmp_path / "run"
    empty.mkdir()
    cases: list[tuple[Path, type[AdvisorError], str]] = [
        (tmp_path / "nowhere", InputError, "does not exist"),
        (_file(exported, "F16"), InputError, "GGUF file"),
        (empty, InputError, "neither a run folder"),
        (_broken(models, tmp_path / "b", new_field=3), ExportError, "new_field"),
        (_broken(models, tmp_path / "c", num_hidden_layers=3), ExportError, "missing"),
        (_broken(models, tmp_path / "d", num_hidden_layers=1), ExportError, "no place"),
        (_broken(models, tmp_path / "e", vocab_size=400), ExportError, "instead of"),
    ]
    tokenless = _broken(models, tmp_path / "f")
    (tokenless / "tokenizer.json").unlink()
    cases.append((tokenless, ModelError, "no tokenizer.json"))
    for source, kind, told in cases:
        with pytest.raises(kind, match=told) as caught:
            export_model(source, quants=("F16",), out=tmp_path / "out")
        assert caught.value.remedy
    assert not list((tmp_path / "out").glob("*.gguf"))
    with pytest.raises(UsageError):
        export_model(models["qwen2"], to=("modelfile",), out=tmp_path / "out")


def test_overflow_names_another_type_and_k_quants_still_work(models: dict[str, Path], tmp_path: Path) -> None:
    """A weight beyond F16 stops F16 with a remedy; four bits are then made from F32."""
    folder = _broken(models, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="65504") as caught:
        export_model(folder, quants=("F16",), out=tmp_path / "out")
    assert "BF16" in caught.value.remedy
    assert not list((tmp_path / "out").glob(".*"))
    made = export_model(folder, quants=("Q4_K_M",), out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == [Path(made.files[0].path).name]


def test_interruption_leaves_the_old_file(models: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C while a file is written or quantised keeps what was there and removes the half file."""
    old = tmp_path / "llama-tied-Q4_K_M.gguf"
    old.write_bytes(b"old")

    def interrupt(text: str) -> None:
        if "quantising" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(models["llama-tied"], quants=("Q4_K_M",), out=tmp_path, on_progress=interrupt)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_killed_export_leaves_no_half_file(models: dict[str, Path], tmp_path: Path) -> None:
    """After SIGKILL in the middle of a file its name is free, and the next export writes it whole."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from advisor.export import export_model, gguf_file\n"
        "write = gguf_file._Stream.tofile\n"
        "def killed(self, file):\n"
        "    write(self, file); file.flush()\n"
        "    if 'blk.0' in self.tensor.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "gguf_file._Stream.tofile = killed\n"
        "export_model(Path(sys.argv[1]), quants=('F16',), out=Path(sys.argv[2]))\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-c", code, str(models["llama-tied"]), str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.gguf"))
    assert [path.stat().st_size > 0 for path in tmp_path.iterdir()] == [True]
    made = export_model(models["llama-tied"], quants=("F16",), out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {Path(made.files[0].path).name, "export.json"}
    assert verify_gguf(Path(made.files[0].path), against=models["llama-tied"]).passed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_leaves_nothing(models: dict[str, Path], tmp_path: Path, number: int) -> None:
    """`kill` and a closed terminal in the middle of a file end the command as Ctrl-C does."""
    code = (
        "import os, sys; from advisor.cli.main import main; from advisor.export import gguf_file\n"
        "write = gguf_file._Stream.tofile\n"
        "def ended(self, file):\n"
        "    write(self, file)\n"
        f"    if 'blk.0' in self.tensor.name: os.kill(os.getpid(), {int(number)})\n"
        "gguf_file._Stream.tofile = ended\n"
        "main()\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    arguments = ["export", str(models["llama-tied"]), "--quant", "F16", "--no-verify", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=False)
    assert done.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """When the disk fills up while writing, the error says so and the folder is as before."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "from advisor.errors import DiskError; from advisor.export import export_model\n"
        "source, out, to, quant = sys.argv[1:]\n"
        "try: export_model(Path(source), to=(to,), quants=(quant,), out=Path(out))\n"
        "except DiskError as error: print(error)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    for target, quant in (("gguf", "F16"), ("gguf", "Q4_K_M"), ("merged", "F16")):
        command = [sys.executable, "-c", code, str(models["llama-tied"]), str(tmp_path), target, quant]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert "Cannot write" in done.stdout, done.stderr
        assert not list(tmp_path.iterdir())


def test_last_words_of_llama_cpp_are_told(tmp_path: Path) -> None:
    """What llama.cpp says before it gives up becomes the error, and its process is gone."""
    source = tmp_path / "source.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ExportError, match="choose"):
        run_llama({"do": "choose", "source": str(source), "quants": ["Q4_K_M"]})


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_llama_cpp_does_not_outlive_who_asked(tmp_path: Path) -> None:
    """After SIGKILL of the command its llama.cpp process is gone as well."""
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)  # nobody writes into it: it is opened for ever
    code = (
        "import sys; from advisor.export.native import run_llama\n"
        "run_llama({'do': 'choose', 'source': sys.argv[1], 'quants': ['Q4_K_M'], 'importance': False})\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    with subprocess.Popen([sys.executable, "-c", code, str(pipe)], env=environment) as asked:
        child = _child_of(asked.pid)
        asked.kill()
        try:
            child.wait(20)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _child_of(parent: int) -> psutil.Process:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in psutil.Process(parent).children():
            return child
        time.sleep(0.05)
    raise AssertionError("no process was started")


def test_verify_refuses_what_is_no_gguf(models: dict[str, Path], tmp_path: Path) -> None:
    """A missing file, a folder and a text file are named for what they are."""
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    for path, told in (
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path, "folder"),
        (text, "not a GGUF"),
    ):
        with pytest.raises(InputError, match=told):
            verify_gguf(path, against=models["qwen2"])


def test_held_out_rows_are_found_and_scored(
    models: dict[str, Path], exported: Export, tmp_path: Path
) -> None:
    """Rows beside the run are what logits are compared on."""
    said = [
        {"role": "user", "content": "Tell me about the weather."},
        {"role": "assistant", "content": "It rains. " * 20},
    ]
    (tmp_path / "heldout.jsonl").write_text("\n".join(json.dumps({"messages": said}) for _ in range(6)))
    rows = heldout_rows(tmp_path)
    assert [path.name for path in rows] == ["heldout.jsonl"]
    proof = verify_gguf(_file(exported, "F32"), against=models["llama-tied"], rows=rows)
    assert proof.passed
    assert int(_check(proof, "logits").measured["positions"] or 0) > 200


# --- chat ---------------------------------------------------------------------------------------------


def test_chat_streams_remembers_and_forgets(exported: Export, capfd: pytest.CaptureFixture[str]) -> None:
    """An answer comes in pieces, is remembered, and llama.cpp says nothing on the terminal."""
    session = ChatSession(_file(exported, "F16"), system="Be brief.", max_tokens=12)
    pieces = list(session.reply("Hello"))
    assert len(pieces) > 1
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    assert session.messages[-1]["content"] == "".join(pieces)
    again = list(session.reply("Hello"))
    session.reset()
    assert list(session.reply("Hello")) == pieces
    assert again
    assert session.context_tokens == 512
    session.close()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_long_conversation_drops_its_oldest_turns(exported: Export) -> None:
    """The context never overflows; the system prompt stays; one text that is too long is refused."""
    session = ChatSession(_file(exported, "Q8_0"), system="Be brief.", max_tokens=8)
    for number in range(30):
        list(session.reply(f"Question number {number}, with some words to fill the context up"))
    assert session.messages[0]["role"] == "system"
    assert len(session.messages) < 61
    before = list(session.messages)
    with pytest.raises(InputError, match="tokens"):
        list(session.reply("word " * 700))
    assert session.messages == before


def test_adapter_at_run_time_equals_the_merged_file(
    adapters: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    """A LoRA-GGUF on its base says what the merged file says, also with patterns and rsLoRA."""
    base = export_model(models["llama-untied"], quants=("F32",), out=tmp_path / "base")
    made = export_model(
        adapters["patterns"], to=("gguf", "lora-gguf"), quants=("F32",), out=tmp_path / "lora"
    )
    lora = next(Path(file.path) for file in made.files if file.kind == "lora_gguf")
    on_base = ChatSession(_file(base, "F32"), lora=lora, max_tokens=24)
    text = "".join(on_base.reply("Hello"))
    assert text == answer_once(_file(made, "F32"), "Hello", max_tokens=24)
    alone = answer_once(_file(base, "F32"), "Hello", max_tokens=24)
    assert text != alone
    for scales, expected in (({}, alone), ({lora: 1.0}, text), ({lora: 0.0}, alone)):
        on_base.use_adapters(scales)
        on_base.reset()
        assert "".join(on_base.reply("Hello")) == expected
    on_base.close()
    with pytest.raises(InputError, match="holds no whole model"):
        ChatSession(lora)


@pytest.mark.parametrize("name", ["dora", "norms", "embedding", "head"])
def test_what_is_no_sum_of_products_is_no_lora_file(
    adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """llama.cpp would ignore or mis-scale these, or crash: they are refused with the reason."""
    with pytest.raises(ExportError, match="cannot be a LoRA-GGUF"):
        export_model(adapters[name], to=("lora-gguf",), out=tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_adapter_folder_can_be_handed_on(
    adapters: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    """peft loads it by itself, it answers as the trained one, and its card names no folder of here."""
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = export_model(adapters["patterns"], to=("adapter",), out=tmp_path)
    folder = Path(made.files[0].path).parent
    assert folder.name == "patterns-adapter"
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["llama-untied"]), adapters["patterns"]
    )
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, trained(ids).logits)
    card = (folder / "README.md").read_text()
    assert "An adapter of llama-untied, a model folder: LORA, rank" in card
    assert str(tmp_path.parents[1]) not in card
    with pytest.raises(ExportError, match="whole model was trained"):
        export_model(models["qwen2"], to=("adapter",), out=tmp_path)
    export_model(adapters["patterns"], to=("adapter",), out=tmp_path)
    for other in ("notes.txt", "README.md"):
        (folder / other).write_text("mine")
        with pytest.raises(DiskError, match=f"also holds {other}"):
            export_model(adapters["patterns"], to=("adapter",), out=tmp_path)
        (folder / other).unlink()


@pytest.mark.parametrize("target", ["gguf", "lora-gguf", "merged", "adapter"])
def test_adapter_that_is_no_number_is_refused(adapters: dict[str, Path], target: str, tmp_path: Path) -> None:
    """A training that diverged becomes no file of any kind, and the tensor is named."""
    broken = Path(shutil.copytree(adapters["patterns"], tmp_path / "broken"))
    weights = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("lora_B.weight"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="infinite or undefined"):
        export_model(broken, to=(target,), quants=("F16",), out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_chat_says_what_is_wrong_with_a_file(
    exported: Export, models: dict[str, Path], tmp_path: Path
) -> None:
    """Missing, empty, foreign, cut short, and an adapter that is none or belongs elsewhere."""
    good = _file(exported, "F16")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "other.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(good.read_bytes()[:-200_000])
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, told in (
        ("none", "does not exist"),
        ("empty", "empty"),
        ("other", "not a GGUF"),
        ("short", "bounds"),
        ("pipe", "no ordinary file"),
    ):
        with pytest.raises(InputError, match=told):
            ChatSession(tmp_path / f"{name}.gguf")
    with pytest.raises(InputError, match="no LoRA adapter"):
        ChatSession(good, lora=good)


def test_two_files_answer_side_by_side(exported: Export) -> None:
    """The same question goes to both."""
    first, second = compare(_file(exported, "F32"), _file(exported, "F16"), "Hello", max_tokens=8)
    assert first == second


def test_forgotten_session_ends_silently(exported: Export) -> None:
    """A program that never closes its session prints nothing when it ends."""
    code = (
        "import sys; from pathlib import Path; from advisor.chat import ChatSession\n"
        "session = ChatSession(Path(sys.argv[1]), max_tokens=4); list(session.reply('Hello'))\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-c", code, str(_file(exported, "Q8_0"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_importance_reaches_the_quantiser(models: dict[str, Path], tmp_path: Path) -> None:
    """Columns weigh what the model multiplies them by; the bytes are those of llama.cpp's own quantiser."""
    from tokenizers import Tokenizer

    from advisor.verify.importance import measure_importance

    texts = [f"Water {number} runs from the hills to the sea; it is wild in March." for number in range(40)]
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = measure_importance(models["llama-tied"], (rows,), offline=True, on_progress=print)
    weights = load_file(models["llama-tied"] / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(models["llama-tied"] / "tokenizer.json"))
    ids = [i for text in texts[20:] for i in tokenizer.encode(text).ids]
    read = weights["model.embed_tokens.weight"][ids].astype(np.float64)
    read *= weights["model.layers.0.input_layernorm.weight"] / np.sqrt((read**2).mean(1) + 1e-5)[:, None]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (found.rows, found.tokens) == (20, len(ids))
    np.testing.assert_allclose(found.columns[name], (read**2).mean(0), rtol=1e-4)

    made = export_model(models["llama-tied"], quants=("F32", "Q3_K_M"), importance=found, out=tmp_path)
    theirs = tmp_path / "theirs.gguf"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    _quantise(
        _file(made, "F32"), theirs, {names.get_name(k, (".weight",)): v for k, v in found.columns.items()}
    )
    ours, want = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(p).tensors}
        for p in (_file(made, "Q3_K_M"), theirs)
    )
    plain = export_model(models["llama-tied"], quants=("Q3_K_M",), out=tmp_path / "plain").files[0].path
    assert ours == want
    assert ours != {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(plain).tensors}
    fields = gguf.GGUFReader(_file(made, "Q3_K_M")).fields
    assert fields["quantize.imatrix.dataset"].contents() == "texts.jsonl"
    assert "quantize.imatrix.dataset" not in gguf.GGUFReader(_file(made, "F32")).fields
    rows.write_text(json.dumps({"text": texts[0]}) + "\n")
    with pytest.raises(InputError, match="at least 256"):
        measure_importance(models["llama-tied"], (rows,), offline=True, on_progress=print)


def _quantise(source: Path, target: Path, importance: dict[Any, Any]) -> None:
    """Let llama.cpp quantise a file with an importance matrix."""
    import ctypes

    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.imatrix = llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M, entries
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
