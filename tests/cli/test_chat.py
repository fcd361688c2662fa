"""Conversations with a tiny file on a real terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from terminal import ENTER, Terminal

from advisor.cli.main import run
from advisor.cli.output import print_next
from advisor.export import export_model
from tiny import make_tiny_model

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("talked") / "model")


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    return Path(export_model(model, quants=("F32",)).files[0].path)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRA-GGUF files of the same name in folders of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    source = folder / "tea"
    source.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(model)}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    rows = np.random.default_rng(0).normal(size=(width, 4)).astype(np.float32)
    pair = {f"{place}A.weight": np.ascontiguousarray(rows.T), f"{place}B.weight": rows}
    save_file(pair, source / "adapter_model.safetensors")
    made = [export_model(source, to=("lora-gguf",), out=folder / name) for name in ("a", "b")]
    first, second = (Path(one.files[0].path) for one in made)
    return first.rename(first.with_name("tea.gguf")), second.rename(second.with_name("tea.gguf"))


def test_whatever_is_typed_the_conversation_goes_on(
    gguf: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """Lines pasted together are one question, a long one arrives whole and is refused in words, adapters of
    one name are told apart and take a strength, a slip of the pen is not sent to the model."""
    first, second = (f"--lora={path}" for path in adapters)
    terminal = Terminal(["chat", str(gguf), first, second, "--max-tokens=8"], tmp_path, columns=60)
    terminal.wait_for("you>")
    terminal.send("\x1b[200~first line\n\nthird line 👩‍🚀\x1b[201~")
    terminal.wait_for("third line")
    assert terminal.text().count("you>") == 1
    terminal.send(ENTER)
    terminal.wait_for("you>", times=2)
    for asked, told in (
        ("/adapter b/tea=0.5", "adapter: a/tea, [b/tea=0.5], all, base"),
        ("/adapter a/tea=nan", "'nan' is no strength"),
        ("/adapter c/tea", "Unknown adapter 'c/tea'"),
        ("/help", "/new starts again"),
        ("many words " * 400, "Shorten it."),
    ):
        terminal.send(asked)
        time.sleep(0.2)
        terminal.send(ENTER)
        terminal.wait_for(told, times=2 if asked == "/help" else 1)
    assert "2816 tokens" in terminal.text()
    terminal.send("Hello" + ENTER)
    terminal.wait_for("you> Hello")
    terminal.send("/quit" + ENTER)
    assert terminal.wait_end() == 0


def test_what_cannot_be_a_conversation_is_told_before_loading(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal there is none, whatever the file; two GGUF files are no run folders."""
    assert run(["chat", str(tmp_path / "not looked at.gguf")]) == 2
    assert "A conversation needs a terminal" in capsys.readouterr().err
    assert run(["chat", str(gguf), str(gguf)]) == 2
    assert f"ftadvisor chat {gguf} --compare {gguf}" in capsys.readouterr().err


def test_memory_that_is_not_set_aside_is_told(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More context than the model was trained on is not given, and one is told so."""
    assert run(["chat", str(gguf), "--context", "100000", "--prompt", "Hello", "--max-tokens", "2"]) == 0
    assert "more are not set aside" in capsys.readouterr().err


def test_command_to_copy_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """However long its path is, what comes next is not broken into lines."""
    command = f"ftadvisor chat {'runs of last year/' * 20}tea.gguf"
    print_next(command, "open report.html")
    assert capsys.readouterr().out == f"Next: {command}\n      open report.html\n"
