"""The tracer runs the installed libraries on the meta device, and the closed form agrees with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from advisor import knowledge
from advisor.errors import InputError
from advisor.estimate.memory import estimate_memory, traced_estimate
from advisor.run import traced
from advisor.types import MemorySettings, ModelSpec, TracedPeaks
from tests.unit.estimate_cases import spec

RULES = knowledge.load().rules["memory"]
WIDE = {"layers": 4, "hidden": 1024, "intermediate": 3072, "head_dim": 64, "vocab": 32000}
LLAMA = spec(heads=16, kv_heads=4, **WIDE)
CASES: tuple[tuple[ModelSpec, dict[str, Any]], ...] = (
    (LLAMA, {}),
    (LLAMA, {"weight_bits": 4, "double_quant": False}),
    (LLAMA, {"weight_bits": 4, "adapter_bits": 16, "gradient_checkpointing": False}),
    (LLAMA, {"gradient_checkpointing": False, "micro_batch": 4, "loss": "full_logits", "target": "q_v"}),
    (LLAMA, {"tuner": "full", "weight_bits": 32}),
    (LLAMA, {"tuner": "full", "optimizer": "adamw_torch_fused", "accumulate": False, "micro_batch": 4}),
    (LLAMA, {"tuner": "full", "autocast": False, "gradient_checkpointing": False, "loss": "full_logits"}),
    (spec("qwen3", heads=16, kv_heads=8, **WIDE), {"gradient_checkpointing": False, "micro_batch": 2}),
    (spec("gemma2", heads=8, kv_heads=4, **WIDE), {"tuner": "full", "weight_bits": 32, "seq_len": 1024}),
    (spec("gemma3_text", heads=8, kv_heads=1, **WIDE), {"micro_batch": 4, "gradient_checkpointing": False}),
    (spec("phi3", heads=16, kv_heads=16, tied=False, **WIDE), {"micro_batch": 2}),
    (LLAMA, {"objective": "dpo", "tuner": "full", "weight_bits": 32, "micro_batch": 2, "seq_len": 1024}),
    (LLAMA, {"objective": "reward", "micro_batch": 2, "gradient_checkpointing": False}),
    (LLAMA, {"objective": "orpo", "loss": "full_logits", "micro_batch": 2, "seq_len": 1024}),
    (LLAMA, {"objective": "kto", "micro_batch": 4, "seq_len": 1024}),
    (LLAMA, {"tuner": "ia3", "micro_batch": 4, "gradient_checkpointing": False}),
    (LLAMA, {"tuner": "osf", "weight_bits": 32, "seq_len": 256, "loss": "full_logits"}),
    (LLAMA, {"weight_bits": 32, "seq_len": 256, "loss": "full_logits"}),
    (LLAMA, {"tuner": "prefix_tuning", "virtual_tokens": 20, "gradient_checkpointing": False}),
    (spec("olmo2", heads=16, kv_heads=16, tied=False, **WIDE), {"tuner": "full", "micro_batch": 2}),
    (spec("olmo2", heads=16, kv_heads=16, tied=False, **WIDE), {"objective": "reward", "weight_bits": 4}),
    (LLAMA, {"tuner": "dora", "target": "mlp", "micro_batch": 2, "seq_len": 512}),
    (spec("phi3", heads=16, kv_heads=16, tied=False, **WIDE), {"tuner": "dora", "weight_bits": 32}),
    (LLAMA, {"tuner": "dora", "precision": "fp32", "weight_bits": 32, "gradient_checkpointing": False}),
    (
        spec("gemma2", heads=8, kv_heads=4, **WIDE),
        {"tuner": "full", "objective": "orpo", "loss": "full_logits"},
    ),
)


SMALL = {"layers": 3, "hidden": 256, "intermediate": 768, "head_dim": 64, "vocab": 4000}
STEP = {"device": "cpu", "seq_len": 256, "micro_batch": 2}
REAL: tuple[tuple[ModelSpec, dict[str, Any]], ...] = (
    (spec(heads=4, kv_heads=2, **SMALL), {**STEP, "tuner": "full", "weight_bits": 32, "precision": "fp32"}),
    (spec(heads=4, kv_heads=2, **SMALL), {**STEP, "gradient_checkpointing": False}),
    (
        spec("qwen3", heads=4, kv_heads=2, **SMALL),
        {**STEP, "weight_bits": 32, "precision": "fp32", "loss": "full_logits"},
    ),
)


TRACER = """
import sys
import msgspec
from advisor.train import trace_alone
trace_alone.keep_out()
from advisor.errors import RefusedError
from advisor.train.trace import Question, extrapolate, trace
for line in sys.stdin.buffer:
    asked = msgspec.json.decode(line, type=Question)
    try:
        answers = [trace(asked.spec, asked.settings)]
        if asked.spec.shape.layers == 20:
            answers.append(extrapolate(asked.spec, asked.settings))
        print(msgspec.json.encode(answers).decode())
    except RefusedError as error:
        print(error)
"""
"""Starts as `python -m advisor.train.trace_alone` does, and traces deep models in both ways."""
PHI = spec("phi3", heads=16, kv_heads=16, tied=False, **WIDE)
REFUSED: tuple[tuple[ModelSpec, dict[str, Any], str], ...] = (
    (LLAMA, {"tuner": "adapter"}, "prompt_tuning"),
    (PHI, {"tuner": "ln_tuning"}, "PEFT names no layers of phi3"),
    (LLAMA, {"gpus": 4, "shard": "fsdp"}, "shard = fsdp is not traced; valid for shard: none"),
    (LLAMA, {"weight_bits": 8}, "valid for weight_bits: 4, 16, 32"),
    (LLAMA, {"optimizer": "adafactor"}, "adamw_torch_fused"),
    (LLAMA, {"checkpoint_every": 2}, "checkpoint_every = 2"),
    (spec(heads=16, kv_heads=4, experts=8, **WIDE), {}, "mixture of experts"),
)
DEEP: tuple[tuple[ModelSpec, dict[str, Any]], ...] = (
    (spec(heads=4, kv_heads=2, **{**SMALL, "layers": 20}), {"seq_len": 256}),
    (
        spec(heads=4, kv_heads=2, **{**SMALL, "layers": 20}),
        {"tuner": "full", "accumulate": False, "loss": "full_logits", "gradient_checkpointing": False},
    ),
)


def real_peaks(cases: tuple[tuple[ModelSpec, dict[str, Any]], ...]) -> list[int]:
    """Train two real steps of each case, and return the bytes that the second one held."""
    from real_step import measure

    return [measure(model, MemorySettings(**given), "cpu").peak for model, given in cases]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """A line for each case, those of a card before those of a processor; all from one process of its own, as
    everyone must: the tracer replaces functions of torch."""
    refused = ((model, given) for model, given, _ in REFUSED)
    lines = [
        msgspec.json.encode({"spec": model, "settings": MemorySettings(**given)})
        for model, given in (*CASES, *REAL, *DEEP, *refused)
    ]
    answer = subprocess.run(
        [sys.executable, "-c", TRACER], input=b"\n".join(lines), capture_output=True, check=True
    )
    found = answer.stdout.decode().splitlines()
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def traces(said: list[str]) -> list[TracedPeaks]:
    """What the tracer holds to be the peaks of CASES and REAL."""
    return [msgspec.json.decode(line, type=list[TracedPeaks])[0] for line in said[: len(CASES) + len(REAL)]]


@pytest.mark.slow
def test_the_closed_form_agrees_with_the_tracer(traces: list[TracedPeaks]) -> None:
    """Six families, tuners, precisions and losses: each within 5%, half of them within 1%."""
    errors = []
    for (model, given), peaks in zip(CASES, traces[: len(CASES)], strict=True):
        closed = estimate_memory(model, MemorySettings(**given), RULES)
        told = traced_estimate(model, MemorySettings(**given), RULES, peaks)
        assert told.engine == "trace"
        assert sum(part.bytes for part in told.parts) == told.peak_bytes.expected
        errors.append(abs(closed.allocated_bytes.expected / told.allocated_bytes.expected - 1))
    assert max(errors) < 0.05, errors
    assert sorted(errors)[len(errors) // 2] < 0.01, errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_tracer_agrees_with_real_steps(traces: list[TracedPeaks]) -> None:
    """Three small models train two real steps on the processor: within 2% of what the profiler counts, also
    where the same process was asked of a card before."""
    for (model, given), peaks, real in zip(REAL, traces[len(CASES) :], real_peaks(REAL), strict=True):
        assert peaks.fullest[1] == pytest.approx(real, rel=0.02), (model.model_type, given)


@pytest.mark.slow
def test_a_deep_model_is_extrapolated_from_smaller_depths(said: list[str]) -> None:
    """What 4, 8 and 12 blocks hold says what 20 hold, to a thousandth, wherever the peak moves to."""
    first = len(CASES) + len(REAL)
    for line in said[first : first + len(DEEP)]:
        whole, some = msgspec.json.decode(line, type=list[TracedPeaks])
        assert some.backward == pytest.approx(whole.backward, rel=0.001)
        assert some.optimizer == pytest.approx(whole.optimizer, rel=0.001)
        assert some.traced_blocks == (4, 8, 12)


@pytest.mark.slow
def test_what_is_not_traced_is_refused(said: list[str]) -> None:
    """What the tracer does not follow is refused with what it does, not traced as something else; so is
    layer-norm tuning of a family for which PEFT names no layers."""
    for line, (_, _, wanted) in zip(said[-len(REFUSED) :], REFUSED, strict=True):
        assert wanted in line


@pytest.mark.parametrize(
    ("error", "asked"), [("ImportError('moved')", 2), ("SystemExit('advisor.errors.RefusedError: no')", 1)]
)
def test_the_whole_tracer_is_asked_where_the_light_one_fails(
    error: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a failure, that is; a refusal is told at once."""
    peaks = {"steady": 1 << 30, "forward": 2 << 30, "backward": 3 << 30, "optimizer": 2 << 30}
    (tmp_path / "light.py").write_text(f"open({str(tmp_path / 'asked')!r}, 'a').write('1')\nraise {error}\n")
    (tmp_path / "whole.py").write_text(
        f"open({str(tmp_path / 'asked')!r}, 'a').write('1')\nprint({json.dumps(peaks)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(traced, "TRACERS", ("light", "whole"))
    if asked == 1:
        with pytest.raises(InputError, match="The tracer cannot answer: no"):
            traced.trace(LLAMA, MemorySettings(), knowledge.load(), tmp_path)
    else:
        found = traced.trace(LLAMA, MemorySettings(), knowledge.load(), tmp_path)
        assert found.engine == "trace"
    assert len((tmp_path / "asked").read_text()) == asked


def test_an_extrapolated_trace_says_so() -> None:
    """The estimate names the depths that were traced."""
    peaks = TracedPeaks(steady=10, forward=20, backward=30, optimizer=25, traced_blocks=(4, 8, 12))
    found = traced_estimate(LLAMA, MemorySettings(), RULES, peaks)
    assert any("extrapolated: traced with 4, 8, 12 blocks" in note for note in found.notes)
    assert found.phase == "backward"
