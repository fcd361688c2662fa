"""Whatever is wrong with what was given: a clear error, the next step, the right exit code, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import make_tiny_model

GOOD = {"instruction": "Say hello", "input": "", "output": "Hello there."}


def ftadvisor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "advisor", *arguments], capture_output=True, text=True, cwd=cwd, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def _plan(cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return ftadvisor("plan", "--hardware", "RTX 3060", "--offline", *more, cwd=cwd)


def _assert_error(answer: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert answer.returncode == status, answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr
    lines = answer.stderr.splitlines()
    (error,) = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    assert lines[error + 1].startswith("Next:  "), answer.stderr
    for word in words:
        assert word in answer.stderr, answer.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny whole model folder."""
    return make_tiny_model(tmp_path / "model")


DATA = {
    "empty": (b"", "empty"),
    "blank": (b"\n\n  \n", "empty"),
    "broken-line": (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "line 2"),
    "latin-1": (json.dumps(GOOD).encode().replace(b"hello", b"h\xe9llo"), "iconv"),
    "utf-16": (json.dumps([GOOD]).encode("utf-16"), "iconv"),
    "binary": (bytes(range(256)) * 20, "data"),
    "one-column": (b'{"instruction": "a"}\n{"instruction": "b"}\n', "instruction"),
    "unknown-columns": (b'{"foo": 1, "bar": 2}\n', "foo"),
    "no-assistant": (b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 12, "assistant"),
    "a-docx": (b"PK\x03\x04" + bytes(64), "save it as .txt"),
    "a-gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
}


@pytest.mark.parametrize(("content", "word"), DATA.values(), ids=DATA.keys())
def test_bad_data(tmp_path: Path, content: bytes, word: str) -> None:
    """A data file that cannot be trained on is refused with what is wrong in it."""
    (tmp_path / "data.jsonl").write_bytes(content)
    answer = ftadvisor("inspect", "data.jsonl", cwd=tmp_path)
    _assert_error(answer, 1, word)


def test_missing_data(tmp_path: Path) -> None:
    """A path that is not there is named."""
    _assert_error(_plan(tmp_path, "--data", "nothing.jsonl"), 1, "nothing.jsonl")


def test_no_data_at_all(tmp_path: Path) -> None:
    """A run folder needs data; the error says which option gives it."""
    _assert_error(_plan(tmp_path), 1, "--data")


def test_five_rows(tmp_path: Path) -> None:
    """Five rows are not trained on, but the advice says what to do instead."""
    (tmp_path / "data.json").write_text(json.dumps([GOOD] * 5))
    answer = _plan(tmp_path, "--data", "data.json", "--out", "run")
    _assert_error(answer, 3)
    assert not (tmp_path / "run").exists()


def test_labels_of_one_kind(tmp_path: Path) -> None:
    """The next step is to mend just that, not another advice of the plan."""
    marked = [{"prompt": f"Say {n}.", "completion": f"It is {n}.", "label": True} for n in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, marked)))
    answer = _plan(tmp_path, "--data", "data.jsonl", "--model", "starter", "--method", "kto")
    _assert_error(answer, 3, "Next:  Collect answers of the other kind", ", kto) as it is, add --force")


def test_unknown_hardware_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt accelerator is a usage error with the one that was meant."""
    _assert_error(ftadvisor("plan", "--hardware", "RTX 3600", "--dry-run", cwd=tmp_path), 2, "RTX 3060")


def test_unknown_method_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt method is a usage error with the one that was meant."""
    _assert_error(ftadvisor("plan", "--method", "qlroa", "--dry-run", cwd=tmp_path), 2, "qlora")


def test_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt setting is a usage error with the one that was meant."""
    (tmp_path / "data.json").write_text(json.dumps([GOOD] * 60))
    answer = _plan(tmp_path, "--data", "data.json", "--set", "learning_rat=1e-4", "--out", "run")
    _assert_error(answer, 2, "learning_rate")


def test_model_folder_incomplete(tmp_path: Path, model: Path) -> None:
    """A folder without weights is refused before anything else is done."""
    (model / "model.safetensors").unlink()
    (tmp_path / "data.json").write_text(json.dumps([GOOD] * 60))
    _assert_error(_plan(tmp_path, "--model", str(model), "--data", "data.json"), 1, "weights")


def test_unknown_architecture(tmp_path: Path, model: Path) -> None:
    """A model of a kind that is not known is named, with what is."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": ["StrangeForCausalLM"], "model_type": "strange"})
    )
    (tmp_path / "data.json").write_text(json.dumps([GOOD] * 60))
    _assert_error(_plan(tmp_path, "--model", str(model), "--data", "data.json"), 1, "StrangeFor", "LlamaFor")


def test_code_of_the_models_own_is_said(tmp_path: Path, model: Path) -> None:
    """Looking at a model and planning with it both say that it brings code which was not read."""
    config = json.loads((model / "config.json").read_text())
    own = {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    (tmp_path / "data.json").write_text(json.dumps([{**GOOD, "output": f"Hello {n}"} for n in range(60)]))
    looked = ftadvisor("inspect", "--model", str(model), "--offline", cwd=tmp_path)
    assert "modeling_odd" in looked.stdout, looked.stderr
    made = _plan(tmp_path, "--model", str(model), "--data", "data.json", "--dry-run", "--json")
    warnings = {one["code"]: one["message"] for one in json.loads(made.stdout)["warnings"]}
    assert "modeling_odd" in warnings["model_partly_unknown"]
    _assert_error(ftadvisor("inspect", cwd=tmp_path), 2, "--model")


def test_gguf_as_base(tmp_path: Path) -> None:
    """A GGUF cannot be trained; the original weights are asked for."""
    (tmp_path / "base.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    _assert_error(ftadvisor("plan", "--model", "base.gguf", "--dry-run", cwd=tmp_path), 1, "original")


def test_the_same_rows_twice(tmp_path: Path) -> None:
    """One file under two names would count twice without a word, so it is refused."""
    rows = [GOOD | {"instruction": f"Say hello {i}"} for i in range(60)]
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    _assert_error(_plan(tmp_path, "--data", "a.json", "--data", "b.json"), 2, "twice")


def test_folder_in_use(tmp_path: Path) -> None:
    """A second plan into a used folder is refused and leaves it as it was."""
    (tmp_path / "data.json").write_text(
        json.dumps([GOOD | {"instruction": f"Say hello {i}"} for i in range(300)])
    )
    first = _plan(tmp_path, "--data", "data.json", "--out", "run")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    _assert_error(_plan(tmp_path, "--data", "data.json", "--out", "run"), 3, "run")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_not_writable(tmp_path: Path) -> None:
    """A place that cannot be written is said to be that."""
    (tmp_path / "data.json").write_text(json.dumps([GOOD] * 300))
    (tmp_path / "locked").mkdir(mode=0o500)
    _assert_error(_plan(tmp_path, "--data", "data.json", "--out", "locked/run"), 1, "locked")


def test_output_below_a_file(tmp_path: Path) -> None:
    """An output folder below a file cannot be made, whoever asks."""
    (tmp_path / "data.json").write_text(
        json.dumps([GOOD | {"instruction": f"Say hello {i}"} for i in range(300)])
    )
    _assert_error(_plan(tmp_path, "--data", "data.json", "--out", "data.json/run"), 1, "data.json")


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["run", "nowhere"], 1, "nowhere"),
        (["export", "nowhere"], 1, "nowhere"),
        (["verify", "nowhere.gguf", "--against", "."], 1, "nowhere.gguf"),
        (["chat", "nowhere.gguf", "--prompt", "hi"], 1, "nowhere.gguf"),
        (["chat", "model/config.json", "--prompt", "hi"], 1, "GGUF"),
        (["export", "model", "--quant", "Q4_K_X"], 2, "Q4_K_M"),
        (["export", "model", "--to", "gguuf"], 2, "gguf"),
        (["explain", "qlroa"], 2, "qlora"),
        (["plan", "--scenario", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["plan", "--set", "novalue"], 2, "novalue"),
        (["plan", "--max-hours", "-5"], 2, "--max-hours"),
        (["runs", "nowhere"], 1, "nowhere"),
        (["estimate"], 2, "--model"),
        (["nonsense"], 2, "nonsense"),
        (["plan", "--nonsense"], 2, "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_command_names_what_is_wrong(
    tmp_path: Path, model: Path, arguments: list[str], status: int, word: str
) -> None:
    """Every command answers a wrong argument with the argument, and under --json with the error envelope."""
    _assert_error(ftadvisor(*arguments, cwd=tmp_path), status, word)
    answer = ftadvisor(*arguments, "--json", cwd=tmp_path)
    assert answer.returncode == status
    envelope = json.loads(answer.stdout)
    assert envelope["schema"] == "ftadvisor.error/1"
    assert envelope["ok"] is False
    assert envelope["code"]
    assert envelope["message"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("hardware: {accelerator: RTX 3060}\nmodel: auto\ngoals: {}\n", "goal"),
        ("hardware: {accelerator: RTX 3060}\nmodel: auto\ndatasets: [{kind: chat, rows: -5}]\n", "rows"),
        ("hardware: {accelerator: RTX 3060}\nmodel: auto\ndatasets: [{kind: chatt, rows: 5}]\n", "chat"),
        ("model: auto\n", "hardware"),
        ("[1, 2]\n", "scenario"),
        ("hardware: {accelerator: [\n", "YAML"),
    ],
)
def test_bad_scenario(tmp_path: Path, content: str, word: str) -> None:
    """A scenario file with an unknown key, a wrong value or no hardware is a usage error naming it."""
    (tmp_path / "scenario.yaml").write_text(content)
    _assert_error(ftadvisor("plan", "--scenario", "scenario.yaml", "--dry-run", cwd=tmp_path), 2, word)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """Who asks for it gets the traceback."""
    answer = ftadvisor("explain", "qlroa", "--debug", cwd=tmp_path)
    assert "Traceback" in answer.stderr


def test_several_machines_side_by_side(tmp_path: Path) -> None:
    """One wish, several machines: a plan for each, nothing written; an unknown one is named."""
    (tmp_path / "case.yaml").write_text(
        "{hardware: {accelerator: none}, model: Qwen/Qwen3-14B, datasets: [{kind: chat, rows: 3000}]}"
    )
    asked = ("plan", "--scenario", "case.yaml", "--hardware")
    answer = ftadvisor(*asked, "RTX 3060, RTX 4090, 2xA100", "--json", cwd=tmp_path)
    found = json.loads(answer.stdout)
    assert (found["schema"], list(found["plans"])) == (
        "ftadvisor.comparison/1", ["RTX 3060", "RTX 4090", "2xA100"],
    )  # fmt: skip
    assert [one["method"] for one in found["plans"].values()] == ["qlora", "qlora", "lora"]
    shown = ftadvisor(*asked, "RTX 3060, RTX 4090", cwd=tmp_path)
    assert all(word in shown.stdout for word in ("RTX 3060", "RTX 4090", "change model", "would be possible"))
    assert [path.name for path in tmp_path.iterdir()] == ["case.yaml"]
    _assert_error(ftadvisor(*asked, "RTX 3060, RTX 4091", cwd=tmp_path), 2, "RTX 4091", "RTX 4090")


def test_model_without_chat_template(tmp_path: Path, model: Path) -> None:
    """A model that does not say how it marks turns is given a plain template, and the plan says so."""
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "data.json").write_text(
        json.dumps([GOOD | {"instruction": f"Say hello {i}"} for i in range(300)])
    )
    answer = _plan(tmp_path, "--model", str(model), "--data", "data.json", "--out", "run")
    assert answer.returncode == 0, answer.stderr
    assert "no chat template: it is given a plain one" in answer.stdout
    assert (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "--hardware", "0xH100", "--dry-run"], "0xH100"),
        (["estimate", "--model", "starter", "--optimizer", "adamv"], "adamv"),
        (["estimate", "--model", "starter", "--objective", "sfd"], "sft"),
        (["estimate", "--model", "starter", "--target", "nothing"], "nothing"),
    ],
)
def test_no_confident_answer_to_nonsense(tmp_path: Path, arguments: list[str], word: str) -> None:
    """A count of no devices and unknown names are usage errors."""
    _assert_error(ftadvisor(*arguments, cwd=tmp_path), 2, word)


def test_brackets_in_a_name_are_text(tmp_path: Path) -> None:
    """What looks like markup in a file name is printed as it is."""
    _assert_error(ftadvisor("inspect", "[/red].jsonl", cwd=tmp_path), 1, "[/red].jsonl")


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    """A named pipe is refused instead of waited for."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    _assert_error(ftadvisor("inspect", "pipe.jsonl", cwd=tmp_path), 1, "pipe.jsonl")
