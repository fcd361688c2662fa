"""What holds for the advice on any machine, data and wish: over two thousand random cases."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.recommend import Advice, advise
from advisor.scenario import decode_scenario
from advisor.storage import encode_json
from advisor.types import Plan, Scenario
from cases import plan, rows

K = load()
MANY = settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOME = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

CAPABILITIES = st.sampled_from([("6.1", False), ("7.5", False), ("8.0", True), ("8.6", True), ("9.0", True)])
KINDS = [
    "instruction", "chat", "prompt_completion", "preference", "unpaired_preference", "raw_text", "documents",
    "qa", "classification", "tool_calling", "reasoning_chat", "prompts", "prompts_with_answers",
]  # fmt: skip
MODELS = [
    "auto", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.3-70B-Instruct", "ChatGPT",
    "Qwen/Qwen2.5-3B-Instruct", "google/gemma-3-1b-it", "HuggingFaceTB/SmolLM2-135M-Instruct",
    "openai-community/gpt2",
    "unsloth/Qwen3-4B-GGUF", "openai/gpt-oss-20b", "acme/Road-13B", "something small",
]  # fmt: skip
METHODS = [
    None, "full", "lora", "qlora", "ia3", "bitfit", "prompt_tuning", "prefix_tuning", "adapter", "ln_tuning",
    "p_tuning", "classifier_head", "dpo", "kto", "orpo", "simpo", "grpo", "rloo", "reward", "cpt", "sft",
    "none_rag",
]  # fmt: skip
WORDS = [
    "brand tone", "classify tickets", "maths", "our docs, prices change weekly", "a new language", "paid app",
    "", "export only", "nothing may be lost: must not forget", "agent with tools",
]  # fmt: skip
WISHES = ["small", "adapter", "low_latency", "max quality"]
ROWS = [0, 3, 30, 200, 2000, 60000, 700000]
PLACES = ["", "ollama", "android phone with 4 GB", "a laptop with 8GB", "vLLM server"]


def _optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


@st.composite
def machines(draw: st.DrawFn) -> dict[str, Any]:
    """A graphics card of any size and age, several of them, a Mac, or none."""
    kind = draw(st.sampled_from(["card", "card", "card", "apple", "none"]))
    ram = draw(st.integers(4, 1024))
    if kind == "none":
        return {"accelerator": "none", "ram_gib": ram, "cpu_cores": draw(st.integers(1, 64))}
    if kind == "apple":
        return {"accelerator": "M2", "vendor": "apple", "memory_gib": draw(st.sampled_from([8, 16, 32, 64]))}
    capability, bf16 = draw(CAPABILITIES)
    return {
        "accelerator": "Card", "vendor": "nvidia", "memory_gib": draw(st.floats(1, 100)), "bf16": bf16,
        "compute_capability": capability, "count": draw(st.sampled_from([1, 1, 1, 2, 4, 8])), "ram_gib": ram,
    }  # fmt: skip


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, Any]:
    """One dataset of any kind and state."""
    share = st.floats(0, 1)
    made: dict[str, Any] = {
        "kind": draw(st.sampled_from(KINDS)), "rows": draw(st.sampled_from(ROWS)),
        "mean_tokens": draw(_optional(st.integers(1, 20000))),
        "size_mb": draw(_optional(st.floats(0.1, 20000))),
        "duplicate_fraction": draw(_optional(share)), "positive_fraction": draw(_optional(share)),
        "pair_similarity": draw(_optional(share)), "baseline_pass_rate": draw(_optional(share)),
        "on_policy": draw(_optional(st.booleans())), "holdout_rows": draw(_optional(st.integers(0, 100))),
        "tasks": draw(_optional(st.integers(1, 300))), "tenants": draw(_optional(st.integers(1, 90))),
        "classes": draw(_optional(st.integers(2, 200))), "mixed_templates": draw(st.booleans()),
        "has_tools_column": draw(_optional(st.booleans())),
        "role": draw(st.sampled_from(["train", "train", "train", "earlier_task"])),
        "languages": draw(st.lists(st.sampled_from(["en", "fr", "sw", "th"]), max_size=3, unique=True)),
    }  # fmt: skip
    mean = made["mean_tokens"]
    made["p95_tokens"] = draw(_optional(st.integers(mean, mean * 4))) if mean else None
    return {key: value for key, value in made.items() if value is not None}


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """A whole scenario file."""
    return {
        "hardware": draw(machines()), "model": draw(st.sampled_from(MODELS)),
        "model_state": draw(st.sampled_from([None, None, "own_sft", "merged", "has_adapter"])),
        "datasets": draw(st.lists(datasets(), max_size=3)),
        "goal": {
            "text": draw(st.sampled_from(WORDS)), "deploy": draw(st.sampled_from(PLACES)),
            "requested_method": draw(st.sampled_from(METHODS)), "force": draw(st.booleans()),
            "priorities": draw(st.lists(st.sampled_from(WISHES), max_size=2)),
            "commercial": draw(_optional(st.booleans())), "must_not_forget": draw(st.booleans()),
            "max_hours": draw(_optional(st.floats(0.1, 100))),
            "storage_per_task_kb": draw(_optional(st.sampled_from([10, 2000, 100000]))),
            "context_tokens": draw(_optional(st.sampled_from([2048, 32768]))),
        },
    }  # fmt: skip


def decoded(entry: dict[str, Any]) -> Scenario:
    """The scenario of an entry."""
    return decode_scenario(entry, K)


@MANY
@given(entries())
def test_what_always_holds(entry: dict[str, Any]) -> None:
    """It fits, the data allow it, later stages learn gently, and every word has its ground."""
    case = decoded(entry)
    made = make_plan(case, K)
    _fits(made, case)
    _data_allow_it(made, entry)
    _rates_fall(made)
    _grounds(made)
    assert (made.method.startswith("none")) == (not made.stages)
    assert [c.verdict for c in made.candidates].count("chosen") <= 1
    msgspec.json.decode(encode_json(made), type=Plan)


def _fits(made: Plan, case: Scenario) -> None:
    cards = case.hardware.accelerators
    free = cards[0].free_bytes if cards else case.hardware.ram_free_bytes
    for stage in made.stages:
        assert stage.estimate.peak_bytes.high <= free, "the first choice exceeds the device"


def _data_allow_it(made: Plan, entry: dict[str, Any]) -> None:
    kinds = {d["kind"] for d in entry["datasets"] if d.get("role", "train") == "train"}
    objectives = {stage.objective for stage in made.stages}
    if "preference" not in kinds:
        assert not objectives & {"dpo", "orpo", "simpo", "reward"}
    if not kinds & {"preference", "unpaired_preference"}:
        assert "kto" not in objectives
    if not kinds & {"raw_text", "documents"}:
        assert "cpt" not in objectives
    if not kinds & {"prompts", "prompts_with_answers", "preference"}:
        assert not objectives & {"grpo", "rloo"}


def _rates_fall(made: Plan) -> None:
    rates = {stage.objective: float(str(stage.settings["learning_rate"])) for stage in made.stages}
    for objective, rate in rates.items():
        if "sft" in rates and objective in ("dpo", "kto", "orpo", "simpo", "grpo", "rloo", "reward"):
            assert rate < rates["sft"]


def _grounds(made: Plan) -> None:
    for stage in made.stages:
        assert set(stage.why) == set(stage.settings)
        assert all(why.reason and why.source in K.sources for why in stage.why.values())
    for warning in made.warnings:
        assert warning.remedy
        assert warning.source in K.sources
        assert "{" not in warning.message + warning.remedy
    assert len({w.code for w in made.warnings}) == len(made.warnings)
    assert all(candidate.reasons for candidate in made.candidates)


@SOME
@given(entries(), st.randoms(use_true_random=False))
def test_order_of_datasets_and_repetition_change_nothing(entry: dict[str, Any], chance: Any) -> None:
    """The same input in any order gives the same bytes."""
    first = encode_json(make_plan(decoded(entry), K))
    shuffled = dict(entry, datasets=chance.sample(entry["datasets"], len(entry["datasets"])))
    assert encode_json(make_plan(decoded(shuffled), K)) == first
    case = decoded(entry)
    turned = msgspec.structs.replace(case, datasets=tuple(reversed(case.datasets)))
    assert encode_json(make_plan(turned, K)) == first


def _standing(advice: Advice) -> tuple[bool, bool, float]:
    """(something is trained, on the model asked for, its score): larger is better."""
    if advice.chosen is None:
        return (False, False, 0.0)
    return (True, advice.model_refused is None, round(advice.chosen.score, 6))


@SOME
@given(entries(), st.floats(1, 60), st.floats(1.01, 8))
def test_more_memory_never_makes_the_advice_worse(entry: dict[str, Any], gib: float, factor: float) -> None:
    """With more memory on the device the choice stays or moves up, everything else the same."""
    entry["goal"].update(requested_method=None, max_hours=None)
    card = {
        "accelerator": "Card", "vendor": "nvidia", "compute_capability": "8.6", "bf16": True, "ram_gib": 256,
        "count": entry["hardware"].get("count", 1),
    }  # fmt: skip
    small = advise(decoded(dict(entry, hardware={**card, "memory_gib": gib})), K)
    large = advise(decoded(dict(entry, hardware={**card, "memory_gib": gib * factor})), K)
    assert _standing(large) >= _standing(small)


@pytest.mark.parametrize("gib", [4, 8, 12, 16, 24, 48, 80])
def test_every_size_of_card_gets_an_answer(gib: int) -> None:
    """From a small laptop card to a data centre something is trained."""
    card = {
        "accelerator": "Card",
        "vendor": "nvidia",
        "memory_gib": gib,
        "compute_capability": "8.6",
        "bf16": True,
    }
    made = plan(rows(), hardware=card, model="auto")
    assert made.verdict == "train"
    assert made.stages
