"""`ftadvisor estimate` on a known model: memory, seconds of a step, and the tracer beside the closed form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _estimate(cwd: Path, *arguments: str) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, "-m", "advisor", "estimate", "--offline", *arguments, "--json"],
        capture_output=True, text=True, cwd=cwd, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout
    made: dict[str, Any] = json.loads(answer.stdout)
    return made


def test_seconds_of_a_step_belong_to_the_named_machine(tmp_path: Path) -> None:
    """A faster card takes less time for the same step, and the same memory."""
    common = ("--model", "Qwen/Qwen3-4B", "--method", "lora", "--hardware")
    slow, fast = (_estimate(tmp_path, *common, name) for name in ("RTX 3060", "H100 80GB SXM"))
    assert slow["peak_bytes"] == fast["peak_bytes"]
    assert slow["seconds_per_step"]["expected"] > 3 * fast["seconds_per_step"]["expected"]


def test_an_unknown_architecture_is_said_and_widens_the_band(tmp_path: Path) -> None:
    """A config.json of a strange class gives an estimate that names what it was counted as."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1024, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    strange = {**config, "architectures": ["StrangeForCausalLM"], "model_type": "strange"}
    widths = []
    for number, content in enumerate((config, strange)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
        made = _estimate(tmp_path, "--model", str(file))
        widths.append(made["peak_allocated_bytes"]["high"] / made["peak_allocated_bytes"]["low"])
        assert bool(made["notes"]) is bool(number)
    assert "StrangeForCausalLM is not known: counted as LlamaForCausalLM" in made["notes"][0]
    assert widths[1] > 1.3 * widths[0]


@pytest.mark.slow
def test_the_tracer_answers_and_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine `trace` agrees with the closed form within 5%; the second answer comes from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = ("--model", "starter", "--method", "lora", "--seq-len", "512")
    closed, traced = (_estimate(tmp_path, *common, "--engine", name) for name in ("closed_form", "trace"))
    assert traced["engine"] == "trace"
    assert traced["peak_allocated_bytes"]["expected"] == pytest.approx(
        closed["peak_allocated_bytes"]["expected"], rel=0.05
    )
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text().replace('"backward":', '"backward":9'))
    again = _estimate(tmp_path, *common, "--engine", "trace")
    assert again["peak_allocated_bytes"]["expected"] > 2 * traced["peak_allocated_bytes"]["expected"]
