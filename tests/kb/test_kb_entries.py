"""Models and accelerators agree with arithmetic, with llama.cpp's names and with themselves."""

from __future__ import annotations

import re

import pytest

from advisor.knowledge import read
from advisor.probe.accelerators import match_accelerator
from advisor.resources import kb_dir
from advisor.types import AcceleratorFacts, ModelFacts
from advisor.units import from_gib

KNOWN = read(kb_dir())

NOMINAL = {
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma4_text",
    "granitemoehybrid",
    "gpt_oss",
    "lfm2",
    "qwen3_moe",
}
"""Model types whose layers this arithmetic does not describe."""
DENSE = [key for key, model in KNOWN.models.items() if model.model_type not in NOMINAL]


def _computed(model: ModelFacts) -> int:
    """Parameters of a dense decoder without its norms, from the published dimensions."""
    query, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = model.hidden * (2 * query + 2 * keys)
    gated = 2 if model.model_type == "gpt2" else 3
    biases = query + 2 * keys if model.attention_bias else 0
    block = attention + biases + gated * model.hidden * model.intermediate
    positions = model.context_tokens * model.hidden if model.model_type == "gpt2" else 0
    tables = model.vocab * model.hidden * (1 if model.tied else 2)
    return model.layers * block + tables + positions


@pytest.mark.parametrize("key", DENSE)
def test_the_count_follows_from_the_dimensions(key: str) -> None:
    """The parameter count is what the dimensions give, within half a per cent for norms and the like."""
    model = KNOWN.models[key]
    assert _computed(model) == pytest.approx(model.parameters, rel=0.005)


def test_most_counts_are_recomputed() -> None:
    """The arithmetic covers nearly all models, so that a wrong dimension cannot hide."""
    assert len(DENSE) >= 90


@pytest.mark.parametrize(
    ("key", "billions"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen3-4B-Instruct-2507", 4.022),
        ("Qwen/Qwen3-32B", 32.762),
        ("microsoft/phi-4", 14.660),
        ("google/gemma-2-9b-it", 9.242),
        ("HuggingFaceTB/SmolLM3-3B", 3.075),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.532),
    ],
)
def test_counts_are_the_published_ones(key: str, billions: float) -> None:
    """Some counts stand in the makers' own papers."""
    assert KNOWN.models[key].parameters / 1e9 == pytest.approx(billions, abs=0.002)


@pytest.mark.parametrize("key", KNOWN.models)
def test_a_model_is_possible(key: str) -> None:
    """Dimensions fit together, and the id names an owner."""
    model = KNOWN.models[key]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", key)
    assert model.heads % model.kv_heads == 0
    assert (model.full_attention_layers or 0) <= model.layers
    assert model.sliding_window is None or model.full_attention_layers is not None
    assert bool(model.experts) == bool(model.experts_per_token)
    assert (model.active_parameters or model.parameters) <= model.parameters
    assert model.experts == 0 or model.active_parameters
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", model.released)
    assert len(set(model.languages)) == len(model.languages) > 0


@pytest.mark.parametrize("key", [key for key, model in KNOWN.models.items() if model.base_of])
def test_a_base_model_has_the_shape_of_its_twin(key: str) -> None:
    """`base_of` names an instruct model that we know, of the same size and licence."""
    base = KNOWN.models[key]
    twin = KNOWN.models[base.base_of or ""]
    assert twin.instruct
    assert not base.instruct
    assert (base.parameters, base.licence, base.gated) == (twin.parameters, twin.licence, twin.gated)


def test_llama_cpp_has_the_architectures() -> None:
    """Every named GGUF architecture is one of the format's own list."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    names = {model.gguf_architecture for model in KNOWN.models.values()} - {None}
    assert names <= set(gguf.MODEL_ARCH_NAMES.values())


def test_what_is_chosen_by_itself_can_be_used() -> None:
    """A model for `auto` can become a GGUF and may be sold; one of each size is free of a gate."""
    chosen = {key: model for key, model in KNOWN.models.items() if model.recommend}
    for key, model in chosen.items():
        assert model.gguf_architecture, key
        assert not model.experts, key
        assert model.commercial, key
        assert model.verified, key
    free = [model.parameters for model in chosen.values() if model.instruct and not model.gated]
    for low, high in ((2e8, 7e8), (1e9, 2e9), (3e9, 5e9), (7e9, 9e9), (1.3e10, 1.6e10), (3e10, 3.5e10)):
        assert any(low <= size <= high for size in free), (low, high)


def test_families_that_overflow_are_marked() -> None:
    """Gemma 2 and 3 overflow in half precision, a research licence forbids selling."""
    for key, model in KNOWN.models.items():
        assert model.fp16_safe == (not key.startswith("google/gemma")), key
    assert not KNOWN.models["Qwen/Qwen2.5-3B-Instruct"].commercial
    assert KNOWN.models["Qwen/Qwen2.5-7B-Instruct"].commercial


# --- accelerators --------------------------------------------------------------------------------

MEMORY = re.compile(r"\b\d+ ?gb\b", re.IGNORECASE)


def _plain(name: str) -> str:
    words = re.sub(r"\b(nvidia|geforce|amd|intel|apple|gpu|grid)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9+]", "", words)


def _kind(card: AcceleratorFacts) -> tuple[str, ...]:
    """What may not differ between two cards of one name."""
    return (MEMORY.sub("", card.name).strip(), card.generation, str(card.compute_capability), str(card.bf16))


def test_no_alias_means_two_accelerators() -> None:
    """A name means one card; where variants differ in memory alone, the smaller one is listed first."""
    owners: dict[str, list[AcceleratorFacts]] = {}
    for key, card in KNOWN.accelerators.items():
        for name in {_plain(name) for name in (key, card.name, *card.aliases)}:
            owners.setdefault(name, []).append(card)
    for name, cards in owners.items():
        assert len({_kind(card) for card in cards}) == 1, name
        sizes = [card.memory_gib for card in cards]
        assert sizes == sorted(set(sizes)), name


def test_capability_decides_what_nvidia_cards_can_do() -> None:
    """bfloat16, FlashAttention and bitsandbytes agree with the limits in kb/rules/platform.toml."""
    limits = KNOWN.rules["platform"]["nvidia"]
    for key, card in KNOWN.accelerators.items():
        if card.vendor != "nvidia":
            continue
        assert card.compute_capability, key
        capability = float(card.compute_capability)
        assert card.bf16 == (capability >= limits["bf16_from"]), key
        assert card.flash_attention == (capability >= limits["flash_from"]), key
        assert card.bitsandbytes == (capability >= limits["bitsandbytes_from"]), key


@pytest.mark.parametrize("key", KNOWN.accelerators)
def test_an_accelerator_is_possible(key: str) -> None:
    """Memory, rate and bandwidth lie where such devices lie."""
    card = KNOWN.accelerators[key]
    assert 4 <= card.memory_gib <= 512
    assert card.tflops is None or 1 <= card.tflops <= 3000
    assert card.bandwidth_gb_per_s is None or 50 <= card.bandwidth_gb_per_s <= 10_000


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA GeForce RTX 3060", 12, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6, "rtx-3060-laptop"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-sxm-80gb"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("Tesla T4", 14.6, "t4"),
        ("GRID T4-8Q", 8, "t4"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32gb"),
        ("NVIDIA RTX 6000 Ada Generation", 47.9, "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx-4060-ti-16gb"),
        ("AMD Instinct MI300X OAM", 192, "mi300x"),
        ("Apple M2 Max", 96, "apple-m2-max"),
    ],
)
def test_names_as_drivers_report_them(name: str, gib: float, key: str) -> None:
    """What a driver calls a card leads to its entry."""
    assert match_accelerator(name, from_gib(gib), KNOWN) == key
