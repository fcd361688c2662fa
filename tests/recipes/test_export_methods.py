"""Each way of training that becomes a GGUF, on two architectures, against the live PEFT model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

from advisor.chat import ChatSession, answer_once
from advisor.errors import ExportError, InputError, RefusedError, UsageError
from advisor.export import export_model
from advisor.running import plan_running
from advisor.serve import serve
from advisor.verify import verify_gguf
from families import make_family
from methods import METHODS, make_adapter

pytestmark = [
    pytest.mark.slow,
    # peft, making adapters: names that transformers renames, advice on shared embeddings.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
TESTED = ("rslora", "dora", "tokens", "ia3", "ln", "prompt", "p-tuning")
BASES = {"qwen2": {"tied": True}, "gpt2": {"tied": False}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {name: make_family(root / name, name, **more) for name, more in BASES.items()}
    return made | {name: make_family(root / name, name) for name in ("gemma3", "llama")}


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", TESTED)
def test_method_is_exported_exactly(bases: dict[str, Path], tmp_path: Path, method: str, base: str) -> None:
    """The file answers as base and live adapter do: logits, ids, template, tensors."""
    adapter = make_adapter(bases[base], METHODS[method], tmp_path / "adapter")
    file = export_model(adapter, quants=("F32",), out=tmp_path).files[0]
    proof = verify_gguf(Path(file.path), against=adapter)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]


def test_prompt_before_scaled_embeddings(bases: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3 multiplies what it looks up, which a trained prompt never passed; chat begins with it."""
    adapter = make_adapter(bases["gemma3"], METHODS["prompt"], tmp_path / "adapter")
    file = export_model(adapter, quants=("F32",), out=tmp_path).files[0]
    assert verify_gguf(Path(file.path), against=adapter).passed
    session = ChatSession(Path(file.path), max_tokens=8)
    assert "<|vp_" not in "".join(session.reply("Hello"))
    session.close()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_adapter_on_scaled_embeddings(bases: dict[str, Path], tmp_path: Path, targets: Any) -> None:
    """Gemma 3's shared embedding is expected as it is used, trained by an adapter or not."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapter = make_adapter(bases["gemma3"], config, tmp_path / "adapter", size=0.02)
    file = export_model(adapter, quants=("Q4_K_M",), out=tmp_path).files[0]
    proof = verify_gguf(Path(file.path), against=adapter)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]


def test_prefix_is_a_state_beside_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """The base with the state answers as the live adapter does; without it, or with another, nothing does."""
    adapter = make_adapter(bases["llama"], METHODS["prefix"], tmp_path / "adapter")
    made = export_model(adapter, quants=("F32",), out=tmp_path)
    state, file = (Path(one.path) for one in made.files)
    proof = verify_gguf(file, against=adapter)
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]
    session = ChatSession(file, max_tokens=4)
    first = "".join(session.reply("Hello"))
    session.reset()
    assert "".join(session.reply("Hello")) == first
    assert answer_once(file, "Hello", max_tokens=4) == first
    with pytest.raises(UsageError, match="LoRA"):
        session.use_adapters({})
    session.close()
    other = export_model(
        make_adapter(bases["llama"], METHODS["prefix"], tmp_path / "other", seed=2),
        to=("prefix-state",),
        out=tmp_path / "o",
    ).files[0]
    wrong = verify_gguf(file, against=adapter, prefix=Path(other.path))
    assert {check.name for check in wrong.checks if not check.passed} >= {"prefix", "logits"}
    with pytest.raises(RefusedError, match="prefix"):
        serve(file, running=plan_running(file, context_tokens=None, cache=None), port=0, adapters={},
              api_key=None, on_ready=print)  # fmt: skip
    for data, said in ((Path(other.path).read_bytes(), "is not the trained prefix"), (None, "not beside it")):
        state.unlink() if data is None else state.write_bytes(data)
        with pytest.raises(InputError, match=said):
            ChatSession(file)
    Path(other.path).write_bytes(Path(other.path).read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        ChatSession(file, prefix=Path(other.path))


def test_full_disk_leaves_no_prefix(bases: dict[str, Path], tmp_path: Path) -> None:
    """When the disk fills up while the state is written, the error says so and nothing is left."""
    adapter = make_adapter(bases["llama"], METHODS["prefix"], tmp_path / "adapter")
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom advisor.export import export_model\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "export_model(Path(sys.argv[1]), to=('prefix-state',), out=Path(sys.argv[2]))\n"
    )
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(adapter), str(out)], capture_output=True, text=True, check=False
    )
    assert "DiskError" in ended.stderr
    assert list(out.iterdir()) == []


def test_what_cannot_be_a_gguf_says_what_to_do(bases: dict[str, Path], tmp_path: Path) -> None:
    """Bottleneck adapters are refused, and a prefix where one file must do; nothing is written."""
    prefix = make_adapter(bases["llama"], METHODS["prefix"], tmp_path / "prefix")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(
        json.dumps({"peft_type": "BOTTLENECK", "base_model_name_or_path": str(bases["llama"])})
    )
    with pytest.raises(ExportError, match="cannot be merged") as caught:
        export_model(other, out=tmp_path / "out")
    assert "lora" in caught.value.remedy
    for to in (("merged",), ("gguf", "modelfile"), ("lora-gguf",)):
        with pytest.raises(ExportError):
            export_model(prefix, to=to, out=tmp_path / "out")
    with pytest.raises(ExportError, match="no trained prefix"):
        export_model(bases["llama"], to=("prefix-state",), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
