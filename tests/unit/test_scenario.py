"""What was declared is read exactly, and a mistake is named together with what is valid."""

from __future__ import annotations

import pytest

from advisor.errors import UnknownNameError, UsageError
from advisor.knowledge import load
from advisor.scenario import declared_hardware, decode_scenario, name_model, spec_for
from advisor.units import GIB
from cases import scenario

K = load()
GOOD = {"hardware": {"accelerator": "RTX 4090"}, "model": "auto"}


def test_only_hardware_and_model_are_needed() -> None:
    """A scenario of two keys is whole."""
    made = decode_scenario(GOOD, K)
    assert made.datasets == ()
    assert made.hardware.accelerators[0].memory_bytes == 24 * GIB
    assert made.hardware.origin == "declared"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modle": "auto"}, "model"),
        ({"goal": {"txt": "x"}}, "text"),
        ({"hardware": {"acelerator": "RTX 4090"}}, "accelerator"),
        ({"datasets": [{"kind": "chat", "row": 3}]}, "rows"),
    ],
)
def test_an_unknown_key_names_the_nearest(change: dict[str, object], named: str) -> None:
    """A misspelt key at any depth is refused with the key that was meant."""
    with pytest.raises(UnknownNameError) as caught:
        decode_scenario({**GOOD, **change}, K)
    assert repr(named) in caught.value.message
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"datasets": [{"kind": "chat", "rows": -1}]}, "rows"),
        ({"datasets": [{"kind": "poems", "rows": 1}]}, "kind"),
        ({"datasets": [{"kind": "chat", "duplicate_fraction": 1.5}]}, "duplicate_fraction"),
        ({"goal": {"max_hours": 0}}, "max_hours"),
        ({"model": 7}, "model"),
        ({"model_state": "frozen"}, "model_state"),
    ],
)
def test_a_wrong_value_names_its_key(change: dict[str, object], named: str) -> None:
    """Negative rows, unknown kinds and shares above one are usage errors that name the key."""
    with pytest.raises(UsageError) as caught:
        decode_scenario({**GOOD, **change}, K)
    assert named in caught.value.message


@pytest.mark.parametrize("data", [None, [], "RTX 4090", 3])
def test_anything_but_a_table_is_refused(data: object) -> None:
    """An empty or flat file is a usage error, not a crash."""
    with pytest.raises(UsageError):
        decode_scenario(data, K)


def test_dataset_names_do_not_depend_on_their_order() -> None:
    """The same datasets in another order decode to the same scenario."""
    first = {"kind": "chat", "rows": 5}
    second = {"kind": "chat", "rows": 9}
    assert scenario(first, second) == scenario(second, first)
    assert sorted(d.name for d in scenario(first, second).datasets) == ["chat", "chat-2"]


@pytest.mark.parametrize(
    ("text", "gib", "count"),
    [
        ("RTX 3060", 12, 1),
        ("A10G", 24, 1),
        ("8xH100", 80, 8),
        ("2x RTX 3090", 24, 2),
        ("24GB", 24, 1),
        ("2 x 16 GiB", 16, 2),
    ],
)
def test_hardware_in_one_phrase(text: str, gib: int, count: int) -> None:
    """A name, a count before it, or a bare size are understood."""
    card = declared_hardware(text, K).accelerators[0]
    assert (card.memory_bytes, card.count) == (gib * GIB, count)


@pytest.mark.parametrize("text", ["none", "CPU", "no gpu"])
def test_no_accelerator(text: str) -> None:
    """Several ways of saying that there is none."""
    assert declared_hardware(text, K).accelerators == ()


def test_apple_gives_training_a_share_of_its_memory() -> None:
    """Unified memory is shared with the rest of the machine."""
    card = declared_hardware({"accelerator": "M2", "vendor": "apple", "ram_gib": 16}, K).accelerators[0]
    assert card.vendor == "apple"
    assert card.memory_bytes == 16 * GIB
    assert card.free_bytes < card.memory_bytes


@pytest.mark.parametrize(
    ("given", "key", "gib"),
    [
        ("M2 16GB", "apple-m2", 16),
        ("GH200 480GB", "gh200-96gb", 96),
        ("4060 ti 16gb", "rtx-4060-ti-16gb", 16),
        ({"accelerator": "RTX 3080", "memory_gib": 12}, "rtx-3080-12gb", 12),
        ({"accelerator": "RTX 3060", "memory_gib": 8}, "rtx-3060", 8),
    ],
)
def test_a_stated_memory_tells_cards_of_one_name_apart(given: object, key: str, gib: int) -> None:
    """A size in the name or beside it picks the card, and Apple's is that of the whole machine."""
    (found,) = declared_hardware(given, K).accelerators
    assert (found.kb_id, found.memory_bytes) == (key, gib << 30)


def test_an_unknown_accelerator_names_the_nearest() -> None:
    """A typing mistake in a card's name is answered with the card."""
    with pytest.raises(UnknownNameError) as caught:
        declared_hardware("RTX 30600", K)
    assert "3060" in caught.value.message


def test_an_unknown_accelerator_with_its_size_is_taken() -> None:
    """A vGPU slice that nobody lists is planned for by its declared figures."""
    entry = {"accelerator": "Slice-8Q", "memory_gib": 8, "compute_capability": "7.5", "bf16": False}
    card = declared_hardware(entry, K).accelerators[0]
    assert (card.name, card.supports_bf16, card.vendor) == ("Slice-8Q", False, "nvidia")


@pytest.mark.parametrize(
    "text",
    ["Qwen/Qwen3-8B", "qwen/qwen3-8b", "Qwen3-8B", "unsloth/Qwen3-8B", "Qwen3 8B"],
)
def test_a_model_by_any_of_its_names(text: str) -> None:
    """Case, organisation and dashes do not matter."""
    spec = spec_for(text, K)
    assert spec is not None
    assert spec.id == "Qwen/Qwen3-8B"


def test_a_base_twin_is_known_by_its_instruct_model() -> None:
    """A base model that has no table of its own takes the shape of its twin."""
    spec = spec_for("microsoft/Phi-4-mini", K)
    assert spec is not None
    assert not spec.instruct
    assert spec.id == "microsoft/Phi-4-mini"


@pytest.mark.parametrize("text", ["ChatGPT", "GPT-4o mini", "Claude Sonnet", "Gemini 2.5 Flash", "o3-mini"])
def test_hosted_models_are_closed(text: str) -> None:
    """Models that nobody can download are recognised."""
    assert name_model(text, K).how == "closed"


@pytest.mark.parametrize("text", ["openai/gpt-oss-20b", "gpt2", "google/gemma-3-1b-it"])
def test_open_models_of_the_same_makers_are_not(text: str) -> None:
    """gpt-oss, GPT-2 and Gemma are open."""
    assert name_model(text, K).how == "known"


@pytest.mark.parametrize(
    "text",
    ["unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf", "someone/Qwen3-8B-AWQ", "x/Qwen3-8B-GPTQ-Int4",
     "unsloth/Qwen3-8B-unsloth-bnb-4bit"],
)  # fmt: skip
def test_quantised_weights_lead_to_their_original(text: str) -> None:
    """A file that cannot be trained names the model that can."""
    named = name_model(text, K)
    assert named.how == "quantised"
    assert named.spec is not None
    assert named.spec.id == "Qwen/Qwen3-8B"


def test_an_unknown_id_is_sized_by_its_name() -> None:
    """A hub id that kb/ does not know is planned for by the size it carries, marked as a guess."""
    named = name_model("acme/Road-13B-Instruct", K)
    assert named.how == "guessed"
    assert named.spec is not None
    assert named.spec.parameters == 13_000_000_000
    assert not named.spec.verified


def test_an_unknown_id_without_a_size_stays_unknown() -> None:
    """Nothing is guessed from a name that says nothing."""
    assert name_model("acme/road", K).how == "unknown"


def test_other_words_leave_the_choice_free() -> None:
    """A wish in words is not an error: the model is chosen."""
    assert name_model("something for poems", K).how == "words"


@pytest.mark.parametrize(
    ("text", "how", "billions"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", "quantised", 7),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "guessed", 46.7),
        ("deepseek-ai/DeepSeek-V3", "guessed", 671), ("acme/Own-4x2B", "guessed", 8),
        ("bartowski/Meta-Llama-3.1-8B-Instruct-GGUF", "quantised", 8.03),
        ("NousResearch/Meta-Llama-3.1-8B-Instruct", "known", 8.03),
    ],
)  # fmt: skip
def test_names_that_tell_a_size_in_their_own_way(text: str, how: str, billions: float) -> None:
    """Quantised copies, mixtures of experts and well-known names without a figure are sized."""
    named = name_model(text, K)
    assert named.how == how
    assert named.spec is not None
    assert named.spec.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_known_non_commercial_maker_counts_without_an_entry() -> None:
    """The licence of a model that is not in kb/ is known by its name where its maker forbids selling."""
    spec = name_model("CohereForAI/aya-expanse-8b", K).spec
    assert spec is not None
    assert spec.commercial is False
