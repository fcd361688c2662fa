"""`explain` finds a topic in any spelling, with its sources, or names the nearest."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import UnknownNameError
from advisor.explain import SECTIONS, explain
from advisor.knowledge import Knowledge, read
from advisor.resources import kb_dir
from advisor.types import Explanation

KNOWN = read(kb_dir())
WITHOUT_THINGS: Knowledge = msgspec.structs.replace(KNOWN, accelerators={}, models={})
TERMS = [
    "fine-tuning", "sft", "instruction tuning", "lora", "qlora", "full", "dpo", "kto", "orpo", "simpo",
    "reward", "reward model", "rlhf", "rloo", "grpo", "cpt", "osf", "ia3", "bitfit", "prompt tuning",
    "p-tuning", "prefix tuning", "adapter", "layer-norm tuning", "classifier head", "multi-task",
    "continual learning", "forgetting", "replay", "rag", "quantisation", "gguf", "Q4_K_M",
    "kl-divergence", "perplexity", "learning_rate", "lora_r", "lora_alpha", "target", "epochs",
    "max_steps", "micro_batch", "effective_batch", "max_seq_len", "warmup_ratio", "scheduler",
    "weight_decay", "max_grad_norm", "optimizer", "precision", "weight_bits", "double_quant",
    "gradient_checkpointing", "packing", "attention", "loss", "loss_on", "heldout_fraction", "beta",
    "replay_fraction", "mixing_cap", "mixing_temperature", "num_generations", "kl_beta",
    "max_completion_length", "undesirable_over_desirable_weight", "per_step_batch", "chat template",
    "eos token", "pad token", "memory", "vram", "bf16", "fp16", "scenario", "tool calling", "reasoning",
    "classification", "preserved_share",
]  # fmt: skip
LISTS = [
    "topics", "methods", "objectives", "tuners", "models", "hardware", "quantisations", "warnings",
    "failures", "sources",
]  # fmt: skip


def _text(found: Explanation) -> str:
    return " ".join([found.title, found.plain, found.exact, *(part for fact in found.facts for part in fact)])


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_explained_twice(term: str) -> None:
    """Every usual term has plain words, and exact ones or figures, and a source."""
    found = explain(term, KNOWN)
    assert len(found.plain) > 40
    assert found.exact or found.facts
    assert found.sources


@pytest.mark.parametrize("section", SECTIONS)
def test_everything_in_the_knowledge_base_can_be_explained(section: str) -> None:
    """An entry of any section is found under its section's word and its own name, with its source."""
    keys = list(getattr(KNOWN, section))
    for key in keys[:: 1 + len(keys) // 40]:
        found = explain(f"{SECTIONS[section]} {key}", KNOWN)
        assert found.title
        assert found.sources
        assert "{" not in found.plain
        assert all(label and value for label, value in found.facts)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("learning_rate", "Learning Rate"),
        ("qlora", "QLoRA"),
        ("quantisation", "quantization"),
        ("dpo", "direct preference optimization"),
        ("ia3", "(IA)³"),
        ("q4_k_m", "Q4-K-M"),
        ("rtx 3060", "NVIDIA GeForce RTX 3060"),
        ("Qwen/Qwen3-8B", "qwen3 8b"),
        ("loss-nan", "loss nan"),
        ("adapter", "Bottleneck adapter"),
    ],
)
def test_spelling_does_not_matter(first: str, second: str) -> None:
    """Case, dashes, underscores, spaces and American spelling lead to the same explanation."""
    assert explain(first, KNOWN).plain == explain(second, KNOWN).plain


@pytest.mark.parametrize("name", LISTS)
def test_lists_show_everything(name: str) -> None:
    """A list names all that it lists, and each list is named on the page of topics."""
    found = explain(name, KNOWN)
    text = _text(found)
    sections = {"methods": ("objectives", "tuners"), "hardware": ("accelerators",)}.get(name, (name,))
    for section in sections:
        for key, entry in getattr(KNOWN, section).items():
            assert (entry.name if section == "accelerators" else key) in text, key
    assert name == "topics" or name in _text(explain("topics", KNOWN))


@pytest.mark.parametrize(
    ("given_name", "near"), [("dop", "dpo"), ("qlra", "qlora"), ("learning_rat", "learning_rate")]
)
def test_an_unknown_topic_names_the_nearest(given_name: str, near: str) -> None:
    """A slip of the pen gets the right word and the command that lists all."""
    with pytest.raises(UnknownNameError) as failure:
        explain(given_name, KNOWN)
    assert f"'{near}'" in failure.value.message
    assert "ftadvisor explain topics" in failure.value.remedy


@pytest.mark.parametrize("given_name", ["", "  ", "-", "xyzzy plugh", "3"])
def test_nonsense_gets_the_lists(given_name: str) -> None:
    """Where nothing is near, the lists are offered."""
    with pytest.raises(UnknownNameError, match="warnings"):
        explain(given_name, KNOWN)


def test_a_shared_name_says_so() -> None:
    """A topic that is also a warning and a failure says how to reach those."""
    also = dict(explain("forgetting", KNOWN).facts)["also"]
    assert also == "warning forgetting, failure forgetting"
    assert dict(explain("warning forgetting", KNOWN).facts)["severity"] == "must"


def test_the_learning_rate_is_listed_for_every_objective() -> None:
    """For a specialist, each objective's rates stand with their ranges and all their sources."""
    found = explain("learning_rate", KNOWN)
    labels = {label for label, _ in found.facts}
    sources = set(found.sources)
    for name, objective in KNOWN.objectives.items():
        for group, rate in objective.learning_rate.items():
            assert f"{name}, {group}" in labels
            assert KNOWN.sources[rate.source] in sources


def test_a_setting_shows_its_defaults() -> None:
    """A setting's default is the one that the methods carry, not a copy of it."""
    tuner = msgspec.structs.replace(KNOWN.tuners["lora"], settings={"lora_r": 77})
    changed = msgspec.structs.replace(KNOWN, tuners={**KNOWN.tuners, "lora": tuner})
    assert dict(explain("lora_r", changed).facts)["default, lora"] == "77"


def test_links_lead_somewhere() -> None:
    """Everything a topic refers to can be explained."""
    for topic in KNOWN.topics.values():
        for name in topic.see:
            assert explain(name, WITHOUT_THINGS).title


def test_what_is_not_verified_says_so() -> None:
    """An entry from memory is shown as one."""
    unverified = next(key for key, model in KNOWN.models.items() if not model.verified)
    assert "not verified" in dict(explain(unverified, KNOWN).facts)["standing"]
    assert "standing" not in dict(explain("Qwen/Qwen3-8B", KNOWN).facts)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.sampled_from(TERMS).map(lambda term: term + "\x00{}")))
def test_any_text_is_answered_or_refused(text: str) -> None:
    """No text breaks it: there is an explanation, or the error that names the nearest."""
    with contextlib.suppress(UnknownNameError):
        assert explain(text, WITHOUT_THINGS).title


@pytest.mark.parametrize(
    ("asked", "other"), [("PPO", "rloo"), ("ipo", "dpo"), ("rank-stabilized LoRA", "lora")]
)
def test_a_method_that_is_not_offered_names_its_stand_in(asked: str, other: str) -> None:
    """What people read about elsewhere is answered with what is done here instead, and why."""
    found = explain(asked, KNOWN)
    assert dict(found.facts)["stands in"] == other
    assert found.sources


def test_every_setting_of_every_program_is_explained() -> None:
    """What can be set can be asked about: from kb/ where it stands there, else from the program's file."""
    assert KNOWN.programs
    for program in KNOWN.programs.values():
        for key in program.keys:
            assert explain(key, KNOWN).plain
    facts = dict(explain("lora_dropout", KNOWN).facts)
    assert facts["type"] == "float"
    assert "sft" in facts["read by"]
