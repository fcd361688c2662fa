"""A wish in plain words becomes task, place, wishes and requests, each with the phrase behind it."""

from __future__ import annotations

import pytest

from advisor.errors import UnknownNameError
from advisor.goals import find_phrase, normalise, understand
from advisor.knowledge import load
from advisor.types import Goal, UnderstoodGoal
from advisor.units import GIB

K = load()


def heard(text: str = "", **more: object) -> UnderstoodGoal:
    """Understand one goal."""
    return understand(Goal(text=text, **more), K)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("route tickets to the right team", "classification"),
        ("an agent that calls our functions: function calling", "tool_calling"),
        ("grade-school maths accuracy", "reasoning"),
        ("multilingual poet", "style"),
        ("invoices to JSON", "extraction"),
        ("internal assistant", "chat"),
        ("answer factual questions with citations", "facts"),
        ("learn a new language", "language"),
        ("just convert to gguf, nothing else", "export"),
        ("", "instruction"),
        ("qwertz", "instruction"),
    ],
)
def test_the_task(text: str, task: str) -> None:
    """Synonyms lead to a task; no words lead to plain instructions."""
    assert heard(text).task == task


@pytest.mark.parametrize(
    ("deploy", "place", "gib"),
    [
        ("offline on laptops via llama.cpp / Ollama", "laptop", 16),
        ("android phone with 4 GB", "phone", 4),
        ("a laptop with 8GB", "laptop", 8),
        ("vLLM in our cloud", "server", None),
        ("Raspberry Pi", "edge", 8),
        ("", "unstated", None),
    ],
)
def test_the_place(deploy: str, place: str, gib: int | None) -> None:
    """Where it must run, and the memory there, said or usual."""
    goal = heard(deploy=deploy)
    assert goal.deploy == place
    assert goal.device_bytes == (None if gib is None else gib * GIB)


def test_llama_cpp_wants_a_gguf_and_a_server_does_not() -> None:
    """The place decides about the file."""
    assert heard(deploy="ollama").wants_gguf
    assert not heard(deploy="vLLM server").wants_gguf


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("paid app", "commercial"),
        ("new format; general benchmarks must not drop", "must_not_forget"),
        ("lean assistant", "small"),
        ("prices that change weekly", "changing_facts"),
    ],
)
def test_wishes_in_the_text(text: str, wish: str) -> None:
    """Constraints are heard in ordinary words."""
    assert wish in heard(text).wishes


def test_priorities_count_as_words() -> None:
    """`low_latency` and `max quality` of the priorities are wishes."""
    assert {"low_latency", "best"} <= set(heard(priorities=("low_latency", "max quality")).wishes)


def test_a_flag_beats_the_words() -> None:
    """Commercial use that was denied is not heard from the text."""
    assert "commercial" not in heard("our startup", commercial=False).wishes


@pytest.mark.parametrize(
    ("asked", "method", "objective"),
    [
        ("bitfit", "bitfit", None),
        ("Prompt Tuning", "prompt_tuning", None),
        ("QLoRA", "qlora", None),
        ("full", "full", None),
        ("orpo", None, "orpo"),
        ("lora+dpo", "lora", "dpo"),
        ("ppo", None, "rloo"),
    ],
)
def test_a_requested_method(asked: str, method: str | None, objective: str | None) -> None:
    """A tuner, an objective, or both may be asked for."""
    goal = heard(requested_method=asked)
    assert (goal.requested_method, goal.requested_objective) == (method, objective)


def test_a_method_in_the_text_counts() -> None:
    """`please use QLoRA` is a request; the word `full` alone is not."""
    assert heard("please use QLoRA").requested_method == "qlora"
    assert heard("a full report").requested_method is None
    assert heard("full fine-tuning please").requested_method == "full"


def test_an_unknown_method_names_the_nearest() -> None:
    """`dop` is answered with `dpo`."""
    with pytest.raises(UnknownNameError) as caught:
        heard(requested_method="dop")
    assert "'dpo'" in caught.value.message


def test_every_reading_names_its_phrase() -> None:
    """What was heard can be echoed back with the words that led to it."""
    goal = heard("brand tone chat", deploy="on my phone")
    assert goal.phrases["style"]
    assert goal.phrases["deploy:phone"] == "phone"


def test_what_was_not_said_is_listed() -> None:
    """The plan must be able to say what it assumed."""
    assert len(heard().unclear) == 3
    assert not heard("assistant", deploy="ollama", commercial=True).unclear


@pytest.mark.parametrize("text", ["no chat", "not a chatbot", "without tools", "rather than code"])
def test_a_negated_word_is_not_a_wish(text: str) -> None:
    """`no chat` does not mean chat."""
    assert heard(text).task == "instruction"


def test_only_whole_words_match() -> None:
    """`start` does not contain the wish `art`."""
    assert find_phrase(normalise("a startup"), ["start"]) is None


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("I want a bot that talks like Shakespeare", "style"), ("give replies in pirate speak", "style"),
        ("answer emails the way I do", "style"), ("make it funnier", "style"), ("write haiku", "style"),
        ("sort incoming tickets into 12 categories", "classification"),
        ("fraud detection", "classification"),
        ("is this review positive or negative", "classification"), ("clasify emails", "classification"),
        ("sentimnt of posts", "classification"), ("convert free text to XML", "extraction"),
        ("get it to call my API", "tool_calling"),
        ("better at logic", "reasoning"), ("SQL assistant", "code"),
        ("autocomplete for our codebase", "code"), ("translate Finnish to English", "translation"),
        ("shorten news articles", "summarisation"), ("teach it medical knowledge", "facts"),
        ("Q&A over company documents", "facts"), ("stop it from refusing harmless things", "preference"),
        ("every month a new task comes", "continual"), ("do not train, only convert to GGUF", "export"),
        ("not for coding, just poems", "style"),
        ("I don't want a chatbot, I want a classifier", "classification"),
        ("assistant that classifies tickets: triage", "classification"),
    ],
)  # fmt: skip
def test_any_phrasing_of_a_task(text: str, task: str) -> None:
    """Everyday words, negations and slips of the finger are understood; mere talk gives way to the task."""
    assert understand(Goal(text=text), K).task == task


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("must run on my phone", "phone"), ("for my old ThinkPad", "laptop"),
        ("no internet access", "offline"),
        ("not on a server, on my laptop", "laptop"), ("classify phone reviews", "unstated"),
        ("support for customers who repair PCs", "unstated"), ("a story about a robot", "unstated"),
    ],
)  # fmt: skip
def test_a_device_is_a_place_only_where_something_runs_on_it(text: str, place: str) -> None:
    """In free text `on my phone` says where, `phone reviews` does not."""
    assert understand(Goal(text=text), K).deploy == place


@pytest.mark.parametrize(
    ("text", "wish", "there"),
    [
        ("latency does not matter", "low_latency", False), ("must answer within 200 ms", "low_latency", True),
        ("not small", "small", False), ("not only small but fast answers", "small", True),
        ("prices change daily", "changing_facts", True), ("facts that never change", "changing_facts", False),
        ("life-changing stories", "changing_facts", False), ("refreshed every night", "changing_facts", True),
        ("keep what it can already do", "must_not_forget", True), ("research only", "commercial", False),
        ("an adapter for each customer", "tenants", True), ("as good as possible", "best", True),
    ],
)  # fmt: skip
def test_wishes_and_their_denials(text: str, wish: str, there: bool) -> None:
    """A wish counts unless it is denied before or dismissed behind."""
    assert (wish in understand(Goal(text=text), K).wishes) is there


@pytest.mark.parametrize(
    ("asked", "tuner", "objective", "said"),
    [
        ("ppo", None, "rloo", "PPO is not offered"), ("dora", "lora", None, "use_dora"),
        ("ipo", None, "dpo", "IPO"), ("galore", "full", None, "8-bit"), ("dapo", None, "grpo", "GRPO"),
    ],
)  # fmt: skip
def test_a_method_under_another_name(asked: str, tuner: str | None, objective: str | None, said: str) -> None:
    """A known relative is not an error: what stands in for it is taken and told."""
    goal = understand(Goal(requested_method=asked), K)
    assert (goal.requested_method, goal.requested_objective) == (tuner, objective)
    assert any(said in note for note in goal.unclear)


def test_names_of_people_are_no_methods() -> None:
    """Dora and Vera ask for nothing; `not LoRA but full fine-tuning` asks for one thing."""
    assert understand(Goal(text="a persona called Dora, friend of Vera"), K).requested_method is None
    assert understand(Goal(text="not LoRA but full fine-tuning"), K).requested_method == "full"


def test_contradicting_wishes_are_told() -> None:
    """The smallest and the best at once: what was taken is said."""
    goal = understand(Goal(text="poems", priorities=("small", "max quality")), K)
    assert any("contradict" in note for note in goal.unclear)


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("recognise defects in photos", "vision"), ("generate pictures", "pictures"),
        ("speech to text", "speech"), ("create embeddings for search", "embeddings"),
        ("forecast sales", "forecasting"), ("write prompts about an image", None),
        ("no OCR, only text", None),
    ],
)  # fmt: skip
def test_wishes_beyond_text(text: str, scope: str | None) -> None:
    """What no text model can do is recognised."""
    assert understand(Goal(text=text), K).out_of_scope == scope
