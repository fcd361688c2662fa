"""The time estimate: steps as the trainer counts them, monotone, banded, near rates that others measured."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from advisor import knowledge
from advisor.estimate.time import estimate_time, expected_longest
from advisor.types import (
    AcceleratorFacts,
    Hardware,
    Histogram,
    MatrixBench,
    MemorySettings,
    ModelSpec,
    TimeEstimate,
)
from tests.unit.estimate_cases import LLAMA_1B, LLAMA_3B, LLAMA_8B

RULES = knowledge.load().rules["time"]
A100 = AcceleratorFacts(
    name="A100", vendor="nvidia", generation="Ampere", memory_gib=80, bf16=True, flash_attention=True,
    bitsandbytes=True, tflops=312, bandwidth_gb_per_s=2039, source="test", checked="2026-11-25",
)  # fmt: skip
LAPTOP = Hardware(ram_bytes=16 << 30, ram_free_bytes=8 << 30, cpu_cores=4)


def seconds(
    model: ModelSpec = LLAMA_1B, settings: MemorySettings | None = None, **given_: Any
) -> TimeEstimate:
    arguments = {
        "rows": 1000, "epochs": 1.0, "effective_batch": 16, "max_steps": None, "mean_tokens": 300.0,
        "lengths": None, "accelerator": A100, "hardware": LAPTOP,
    }  # fmt: skip
    return estimate_time(model, settings or MemorySettings(), rules=RULES, **{**arguments, **given_})


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "limit", "steps"),
    [
        (1000, 1, 16, None, 63),
        (1000, 3, 16, None, 189),
        (1000, 0.5, 16, None, 32),
        (10, 2, 16, None, 2),
        (1000, 3, 16, 50, 50),
        (1000, 1, 16, -1, 63),
        (0, 1, 16, None, 0),
        (0, 1, 16, 50, 0),
        (100, 1, 16, 50, 50),
    ],
)
def test_steps(rows: int, epochs: float, batch: int, limit: int | None, steps: int) -> None:
    """Batches are rounded up in every epoch; max_steps counts, whatever the epochs say."""
    assert seconds(rows=rows, epochs=epochs, effective_batch=batch, max_steps=limit).steps == steps


def test_shards_are_fetched_over_the_link() -> None:
    """Two sharded cards on a slow bus take more than half the time of one, on a fast link about half."""
    bus = A100
    fast = msgspec.structs.replace(A100, name="A100 SXM")
    two = MemorySettings(gpus=2, shard="fsdp", seq_len=512)
    one = seconds(settings=MemorySettings(seq_len=512), accelerator=bus).seconds_per_step.expected
    slow = seconds(settings=two, accelerator=bus).seconds_per_step.expected
    quick = seconds(settings=two, accelerator=fast).seconds_per_step.expected
    assert quick < 0.6 * one
    assert slow > quick * 1.2


def test_packing_joins_rows_into_fewer_sequences() -> None:
    """1,000 rows of 256 tokens fill 125 sequences of 2,048."""
    packed = MemorySettings(packed=True, seq_len=2048)
    assert seconds(settings=packed, mean_tokens=256, effective_batch=5).steps == 25


@budget(deadline=None)
@given(
    tuner=st.sampled_from(["full", "lora", "ia3", "prompt_tuning"]),
    bits=st.sampled_from([4, 16, 32]),
    micro=st.integers(1, 16),
    length=st.integers(16, 8192),
    objective=st.sampled_from(["sft", "dpo", "reward", "grpo", "kto"]),
    device=st.sampled_from(["cuda", "cpu", "mps"]),
    known=st.booleans(),
    checkpointing=st.booleans(),
)
def test_the_band_is_ordered_and_longer_rows_take_longer(
    tuner: str,
    bits: Any,
    micro: int,
    length: int,
    objective: str,
    device: Any,
    known: bool,
    checkpointing: bool,
) -> None:
    """low <= expected <= high for anything, and a row of twice the length never takes less time."""
    settings = MemorySettings(
        tuner=tuner, weight_bits=bits, micro_batch=micro, seq_len=16384, objective=objective, device=device,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    device_facts = A100 if known and device == "cuda" else None
    one = seconds(settings=settings, mean_tokens=length, accelerator=device_facts)
    two = seconds(settings=settings, mean_tokens=2 * length, accelerator=device_facts)
    for band in (one.seconds_per_step, one.seconds, one.tokens_per_second):
        assert 0 < band.low <= band.expected <= band.high
    assert two.seconds_per_step.expected > one.seconds_per_step.expected


def test_a_larger_model_takes_longer_and_adapters_less_than_all_weights() -> None:
    """8B > 3B > 1B, and full > LoRA."""
    times = [seconds(model).seconds_per_step.expected for model in (LLAMA_1B, LLAMA_3B, LLAMA_8B)]
    assert times == sorted(times)
    assert seconds(settings=MemorySettings(tuner="full")).seconds_per_step.expected > times[0]


def test_an_unknown_device_is_said_and_widens_the_band() -> None:
    """Nothing is guessed in silence."""
    known, unknown = seconds(), seconds(accelerator=None)
    assert unknown.notes
    assert not known.notes
    spread = unknown.seconds.high / unknown.seconds.low
    assert spread > known.seconds.high / known.seconds.low


@pytest.mark.parametrize(("device", "threads"), [("cuda", 0), ("cpu", 4)])
def test_what_was_measured_here_counts_before_what_is_known(device: Any, threads: int) -> None:
    """Twice the measured rates take less time, and the estimate says when they were measured."""
    settings = MemorySettings(device=device, seq_len=512)
    bench = MatrixBench(
        device="this", threads=threads, flops={"bf16": 1e12}, copy_bytes_per_second=2e10, seconds=4.0,
        date="2026-11-28", torch="2.15.0",
    )  # fmt: skip
    fast = msgspec.structs.replace(bench, flops={"bf16": 2e12}, copy_bytes_per_second=4e10)
    slow, quick = (
        seconds(settings=settings, hardware=msgspec.structs.replace(LAPTOP, rates=rates), accelerator=None)
        for rates in (bench, fast)
    )
    assert quick.seconds_per_step.expected < 0.9 * slow.seconds_per_step.expected
    assert slow.source.startswith("measured here on 2026-11-28 (torch 2.15.0")
    assert not slow.notes


def test_what_was_measured_of_another_device_or_precision_does_not_count() -> None:
    """A card's rates say nothing of the processor beside it, nor those of bf16 of fp32."""
    bench = MatrixBench(device="card", flops={"bf16": 1e15}, copy_bytes_per_second=2e12, seconds=4.0)
    here = msgspec.structs.replace(LAPTOP, rates=bench)
    for settings in (MemorySettings(device="cpu"), MemorySettings(precision="fp32")):
        assert seconds(settings=settings, hardware=here) == seconds(settings=settings)


def test_mixed_lengths_cost_more_than_equal_ones() -> None:
    """A batch is padded to its longest row: the same mean with a long tail takes more time a row."""
    tail = Histogram(edges=(64, 128, 2048), counts=(600, 300, 100))
    settings = MemorySettings(micro_batch=8)
    mean = 0.6 * 32 + 0.3 * 96 + 0.1 * 1088
    mixed = seconds(settings=settings, mean_tokens=mean, lengths=tail)
    equal = seconds(settings=settings, mean_tokens=mean)
    assert mixed.seconds.expected > 1.5 * equal.seconds.expected
    assert mixed.tokens_per_second.expected < equal.tokens_per_second.expected


def test_the_longest_of_one_row_is_the_mean() -> None:
    """Drawing one row is no selection; drawing many finds the longest."""
    lengths = Histogram(edges=(100, 200), counts=(1, 1))
    assert expected_longest(lengths, 1, 10_000) == pytest.approx(100)
    assert expected_longest(lengths, 1000, 10_000) == pytest.approx(150)
    assert expected_longest(lengths, 1000, 120) == pytest.approx(120)


def test_instruction_sets_and_cores_speed_a_processor_up() -> None:
    """bf16 units help in bf16, and more cores help, but not in proportion."""
    settings = MemorySettings(device="cpu", micro_batch=4)
    plain, units = (
        seconds(
            settings=settings, hardware=Hardware(ram_bytes=0, ram_free_bytes=0, cpu_cores=4, cpu_features=f)
        )
        for f in ((), ("avx512f", "avx512_bf16"))
    )
    assert units.seconds.expected < plain.seconds.expected
    one = seconds(settings=settings, hardware=Hardware(ram_bytes=0, ram_free_bytes=0, cpu_cores=1))
    assert 1 < one.seconds.expected / plain.seconds.expected < 4


def test_what_is_done_beside_the_steps_takes_time() -> None:
    """KTO scores mismatched answers in each step and its reference before; a model that answers is asked
    questions, a reward model is not; rows that are only scored are padded even where training packs."""
    sft, kto, reward = (
        seconds(settings=MemorySettings(objective=name, loss="chunked")) for name in ("sft", "kto", "reward")
    )
    assert kto.seconds_per_step.expected > 1.2 * sft.seconds_per_step.expected
    assert kto.seconds.expected > sft.seconds.expected * 1.2
    no_steps = reward.seconds.expected - reward.steps * reward.seconds_per_step.expected
    asked = sft.seconds.expected - sft.steps * sft.seconds_per_step.expected
    assert asked > no_steps + 1
    scored = {"heldout_rows": 100, "evaluations": 5, "max_steps": 1}
    packed, padded = (
        seconds(settings=MemorySettings(packed=one), **scored).seconds.expected
        - seconds(settings=MemorySettings(packed=one), **{**scored, "heldout_rows": 0}).seconds.expected
        for one in (True, False)
    )
    assert packed == pytest.approx(padded)


def test_generated_answers_take_time() -> None:
    """Online reinforcement generates before it learns, and the notes say how uncertain that is."""
    short, long = (
        seconds(settings=MemorySettings(objective="grpo", completion_tokens=tokens, generations=8))
        for tokens in (64, 1024)
    )
    assert long.seconds_per_step.expected > short.seconds_per_step.expected
    assert long.notes


@pytest.mark.parametrize(
    ("model", "settings", "batch", "measured"),
    [
        (LLAMA_3B, {"tuner": "full", "gradient_checkpointing": False}, 2, 8998),
        (LLAMA_3B, {"tuner": "full", "gradient_checkpointing": True}, 2, 7210),
        (LLAMA_3B, {"tuner": "lora", "gradient_checkpointing": True}, 2, 8210),
        (LLAMA_3B, {"tuner": "lora", "weight_bits": 4, "gradient_checkpointing": True}, 2, 8035),
    ],
    ids=["full", "full-recomputed", "lora", "qlora"],
)
def test_rates_that_torchtune_published(
    model: ModelSpec, settings: dict[str, Any], batch: int, measured: float
) -> None:
    """Tokens a second on an A100, packed to 4,096: within 25%, and inside the band."""
    packed = MemorySettings(packed=True, seq_len=4096, micro_batch=batch, **settings)
    found = seconds(model, packed, effective_batch=batch, mean_tokens=4096).tokens_per_second
    assert found.expected == pytest.approx(measured, rel=0.25)
    assert found.low <= measured <= found.high


def test_a_call_takes_less_than_five_milliseconds() -> None:
    """The planner compares many candidates."""
    seconds(LLAMA_8B)
    begin = time.process_time()
    for _ in range(20):
        seconds(LLAMA_8B)
    assert (time.process_time() - begin) / 20 < 0.005
