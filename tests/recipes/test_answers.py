"""Only answers are trained on, each with its end, and every row is accounted for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import CHATML, make_tiny_model
from training import SETTINGS, rows, write_rows

pytest.importorskip("torch")
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from advisor.errors import DataError, ModelError
from advisor.rows import to_messages
from advisor.templates import TemplateRefusalError, end_of_turn
from advisor.train.answers import Template, read_template, render_answers, rewritten_answers
from advisor.train.data import IGNORED, Prepared, Row, mix, prepare, split
from advisor.train.model import apply_ending, settle_ending
from advisor.train.settings import SftSettings
from advisor.types import RecipeDataset

UNMARKED = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
END_OUTSIDE = CHATML.replace(
    "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
)
FORGETS_THOUGHTS = UNMARKED.replace(
    "message['content'] + '<|im_end|>' -}}",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) + '<|im_end|>' -}}",
    1,
)
THOUGHT = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Tea?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Milk?"},
    {"role": "assistant", "content": "No, thanks."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), hidden=64)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """Its tokenizer, fresh for each test."""
    return AutoTokenizer.from_pretrained(folder)


def settings(**changes: Any) -> SftSettings:
    """Settings of a recipe."""
    return SftSettings(**{**SETTINGS, "weight_bits": 32, **changes})


def prepared(tokenizer: Any, path: Path, *, kind: str = "instruction", **changes: Any) -> Prepared:
    """Prepare a file with a tokenizer's template."""
    one = RecipeDataset(name="data", path=str(path), kind=kind)  # type: ignore[arg-type]
    return prepare((one,), tokenizer, read_template(tokenizer, "tiny"), settings(**changes))


def trained_text(tokenizer: Any, row: dict[str, Any]) -> str:
    """Return what is trained on, the rest as a bar."""
    return "".join(
        tokenizer.decode([token]) if label != IGNORED else "|"
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )


@pytest.mark.parametrize(
    "template", [CHATML, UNMARKED, END_OUTSIDE], ids=["marked", "unmarked", "end-outside"]
)
def test_only_answers_and_their_ends_are_trained_on(tokenizer: Any, tmp_path: Path, template: str) -> None:
    """Whatever the template marks, the trained tokens are the answers with <|im_end|>, and no other token."""
    tokenizer.chat_template = template
    path = write_rows(tmp_path / "d.jsonl", [{"messages": CHAT}])
    made = prepared(tokenizer, path, kind="chat", heldout_fraction=0.0)
    text = trained_text(tokenizer, made.train[0])
    assert [piece for piece in text.split("|") if piece] == [
        "Yes.<",
        "im_end",
        ">",
        "No, thanks.<",
        "im_end",
        ">",
    ]
    assert made.account.end_trained_rows == made.account.rows == 1
    shown = "".join(piece["text"] for piece in made.account.sample if piece["trained"])
    assert shown == "Yes.<|im_end|>No, thanks.<|im_end|>"
    assert tokenizer.decode(made.train[0]["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_the_prompt_is_what_the_model_will_be_given(tokenizer: Any, tmp_path: Path) -> None:
    """The tokens before the answer equal those of the prompt with its generation header."""
    made = prepared(tokenizer, write_rows(tmp_path / "d.jsonl", rows(5)), heldout_fraction=0.0)
    for row, given_row in zip(made.train, rows(5), strict=True):
        first = next(n for n, label in enumerate(row["labels"]) if label != IGNORED)
        asked = [{"role": "user", "content": given_row["instruction"]}]
        assert row["input_ids"][:first] == tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False
        )
    assert made.account.prompts_checked == 5


def test_an_answer_that_the_template_rewrites_becomes_a_row(tokenizer: Any, tmp_path: Path) -> None:
    """Where a template drops the thoughts of earlier answers, each is trained on as it was written: as the
    end of what was said before it."""
    tokenizer.chat_template = FORGETS_THOUGHTS
    path = write_rows(tmp_path / "d.jsonl", [{"messages": [*CHAT[:2], THOUGHT, *CHAT[3:]]}])
    made = prepared(tokenizer, path, kind="chat", heldout_fraction=0.0)
    shown = [trained_text(tokenizer, row).strip("|") for row in made.train]
    assert shown == ["<think>Hm.</think>Yes.<|im_end|>", "No, thanks.<|im_end|>"]
    assert "Hm." not in tokenizer.decode(made.train[1]["input_ids"])
    plain = prepared(tokenizer, path, kind="chat", heldout_fraction=0.0, loss_on="all")
    assert len(plain.train) == 1


CALLS_END = UNMARKED.replace(
    "message['content'] + '<|im_end|>' -}}",
    "message['content'] + ((message.tool_calls | tojson + '<|endoftext|>') if message.tool_calls "
    "else '<|im_end|>') -}}",
    1,
)
TOOL_ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "name": "look", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "tools": [{"type": "function", "function": {
        "name": "look", "description": "Looks out.", "parameters": {"type": "object"}}}],
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "llama3_1", "gptoss", "phi3"])
def test_templates_of_real_families_mark_thoughts_and_calls(family: str) -> None:
    """Thoughts and tool calls are part of what is trained on, questions and results of tools are not, and
    every answer ends with the family's own end token, a call of gpt-oss with one of its own."""
    source = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    end = end_of_turn(source, bos_token="<|begin|>", eos_token="<|endoftext|>")
    assert end == {"llama3_1": "<|eot_id|>", "gptoss": "<|return|>", "phi3": "<|end|>"}.get(
        family, "<|im_end|>"
    )
    call_end = "<|call|>" if family == "gptoss" else None
    template = Template(
        source=source, end=end, marked=False, call_end=call_end, bos="<|begin|>", eos="<|endoftext|>"
    )
    for row, wanted in (
        ({"messages": [*CHAT[:4], THOUGHT]}, ["Yes.", "<think>"]),
        (TOOL_ROW, ["Rome", "It is sunny."]),
    ):
        if "tools" in row and family == "phi3":
            continue  # no form for them
        said = to_messages(row, "chat", {name: name for name in row})
        whole = render_answers(template, said.messages, said.tools)
        parts = (*rewritten_answers(template, said.messages, said.tools, whole), whole)
        answers = [part.text[start:stop] for part in parts for start, stop in part.spans]
        assert len(answers) == len(wanted)
        assert all(word in answer for word, answer in zip(wanted, answers, strict=True))
        called = call_end if call_end and "tools" in row else end
        assert answers[0].endswith(called)
        assert answers[1].endswith(end)
        assert not any("sunny" in answer for answer in answers[:-1])


def test_a_call_that_ends_otherwise_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    """Where a template ends tool calls with a token of their own, it is found, trained on, and generation
    stops at it."""
    tokenizer.chat_template = CALLS_END
    template = read_template(tokenizer, "tiny")
    assert (template.end, template.call_end) == ("<|im_end|>", "<|endoftext|>")
    only_call = {**TOOL_ROW, "messages": TOOL_ROW["messages"][:2]}
    path = write_rows(tmp_path / "d.jsonl", [TOOL_ROW, only_call])
    made = prepared(tokenizer, path, kind="tool_calling", heldout_fraction=0.0)
    assert made.account.left_out == {}
    assert made.account.end_trained_rows == 2
    asked, called = (trained_text(tokenizer, row) for row in made.train)
    assert "Rome" in asked
    assert "It is sunny." in asked
    assert "Rome" in called
    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)
    ending = settle_ending(tokenizer, template.end, rows=512, call_end=template.call_end)
    apply_ending(model, ending)
    ids = [tokenizer.convert_tokens_to_ids(end) for end in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ids


def test_all_tokens_are_trained_on_when_asked(tokenizer: Any, tmp_path: Path) -> None:
    """loss_on: all leaves nothing out."""
    made = prepared(tokenizer, write_rows(tmp_path / "d.jsonl", rows(3)), loss_on="all", heldout_fraction=0.0)
    assert made.train[0]["labels"] == made.train[0]["input_ids"]


def test_long_rows_keep_whole_answers_or_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    """A cut never loses an end token, and what is cut or left out is counted with its place."""
    long = [*CHAT, {"role": "user", "content": "Why? " * 40}, {"role": "assistant", "content": "So. " * 40}]
    only_long = [{"role": "user", "content": "Why? " * 80}, {"role": "assistant", "content": "So."}]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": long}, {"messages": only_long}])
    made = prepared(tokenizer, path, kind="chat", max_seq_len=100, heldout_fraction=0.0)
    assert (made.account.rows, made.account.rows_cut, made.account.rows_read) == (2, 1, 3)
    assert made.account.left_out == {"too_long": 1}
    assert made.account.examples == {"too_long": ["data row 3"]}
    assert "row 3" in made.account.warning()
    assert made.account.end_trained_rows == 2
    assert made.account.longest <= 100
    with pytest.raises(DataError, match="max_seq_len"):
        prepared(tokenizer, path, kind="chat", max_seq_len=8)


def test_rows_without_answers_are_counted_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Empty answers are left out with their row numbers; when nothing is left, training is refused."""
    empty = {"instruction": "Why?", "output": " "}
    made = prepared(tokenizer, write_rows(tmp_path / "d.jsonl", [*rows(3), empty]), heldout_fraction=0.0)
    assert (made.account.rows, made.account.left_out) == (3, {"empty_answer": 1})
    assert made.account.examples["empty_answer"] == ["data row 4"]
    assert made.account.supervised_min > 0
    with pytest.raises(DataError, match="None of the 2 rows") as caught:
        prepared(tokenizer, write_rows(tmp_path / "e.jsonl", [empty, empty]))
    assert caught.value.code == "no_supervised_tokens"


def test_a_template_without_an_end_is_refused(tokenizer: Any) -> None:
    """Nothing after an answer, or an end of several tokens: the model could not learn to stop."""
    for source, says in (("{{ messages[-1].content }}", "nothing after"),
                         (UNMARKED.replace("<|im_end|>", " the end."), "tokens")):  # fmt: skip
        tokenizer.chat_template = source
        with pytest.raises(ModelError, match=says) as caught:
            read_template(tokenizer, "tiny")
        assert caught.value.code == "chat_template"


def test_a_base_model_is_given_a_template(tokenizer: Any) -> None:
    """Answers are trained with the tokenizer's own end token and nothing else; tools have no form in it."""
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    template = read_template(tokenizer, "tiny")
    assert (template.given, template.end, tokenizer.chat_template) == (True, "<|endoftext|>", template.source)
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip
    found = render_answers(template, turns, None)
    assert [found.text[start:stop] for start, stop in found.spans] == [
        "So.<|endoftext|>",
        "Yes.<|endoftext|>",
    ]
    assert found.text.startswith("Be brief.\n\n### User:\nWhy?\n\n### Assistant:\nSo.")
    assert found.prompt == found.text[: found.spans[-1][0]]
    with pytest.raises(TemplateRefusalError, match="no form for tools"):
        render_answers(template, turns, [{"type": "function", "function": {"name": "f"}}])


def test_the_end_of_turn_becomes_the_end_token(tokenizer: Any) -> None:
    """A tokenizer that names another end token is corrected, and padding is never the end token."""
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_end|>"
    ending = settle_ending(tokenizer, read_template(tokenizer, "tiny").end, rows=512)
    assert tokenizer.eos_token == ending.end == "<|im_end|>"
    assert (tokenizer.pad_token, ending.pad) == ("<|pad|>", "<|pad|>")
    assert ending.pad_id != ending.end_id
    assert len(ending.changed) == 2


def test_padding_takes_a_spare_row_or_stays() -> None:
    """Without a token that fits, a new one is added only where the embedding has a row for it."""
    for spare in (1, 0):
        other = _without_padding()
        ending = settle_ending(other, "<|im_end|>", rows=len(other) + spare)
        assert (ending.pad_id != ending.end_id) == bool(spare)
        assert ending.pad_id < len(other) + spare


def _without_padding() -> Any:
    """Return a tokenizer whose only special token is the end of turn."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>")


def test_an_unfinished_answer_is_not_found() -> None:
    """A span without its end token is not used."""
    template = Template(
        source="{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} {% endfor %}",
        end="<e>",
        marked=True,
    )
    assert render_answers(template, [{"role": "assistant", "content": "x"}], None).spans == ()


def _row(key: str, dataset: str = "one") -> Row:
    return Row(tokens=np.array([1]), labels=np.array([1]), key=key, dataset=dataset, content=b"{}", cut=False)


@given(
    keys=st.lists(st.text("abcdef0123456789", min_size=4, max_size=4), min_size=2, max_size=60),
    fraction=st.floats(0.0, 0.5),
    seed=st.integers(0, 5),
)
def test_the_split_depends_on_rows_not_on_their_order(keys: list[str], fraction: float, seed: int) -> None:
    """Shuffled rows give the same split, equal rows lie on one side, and something is left to train on."""
    heldout, train = split([_row(key) for key in keys], fraction)
    shuffled = list(keys)
    random.Random(seed).shuffle(shuffled)
    again, _ = split([_row(key) for key in shuffled], fraction)
    assert sorted(row.key for row in heldout) == sorted(row.key for row in again)
    assert not {row.key for row in heldout} & {row.key for row in train}
    assert len(heldout) + len(train) == len(keys)
    assert train
    assert bool(heldout) == (fraction > 0 and len(set(keys)) > 1)


def test_one_dataset_is_not_mixed() -> None:
    """Cap and temperature are about several datasets."""
    rows = [_row(f"{i:04}") for i in range(20)]
    assert mix(rows, cap=5, temperature=2.0) == rows


@given(
    big=st.integers(1, 200),
    small=st.integers(1, 200),
    cap=st.integers(0, 100),
    temperature=st.floats(1.0, 50.0),
)
def test_mixing_evens_out_and_never_repeats(big: int, small: int, cap: int, temperature: float) -> None:
    """No dataset has more than its rows or the cap; a temperature never lowers the smaller one's share."""
    sizes = {"a": big, "b": small}
    rows = [_row(f"{name}{i:04}", name) for name, size in sizes.items() for i in range(size)]
    mixed = mix(rows, cap=cap, temperature=temperature)
    kept = {name: sum(row.dataset == name for row in mixed) for name in sizes}
    assert len({row.key for row in mixed}) == len(mixed)
    assert all(kept[name] <= min(size, cap or size) for name, size in sizes.items())
    plain = mix(rows, cap=cap, temperature=1.0)
    fewer = min(sizes, key=lambda name: sizes[name])
    before = sum(row.dataset == fewer for row in plain) / len(plain)
    assert kept[fewer] / len(mixed) >= before - 1 / len(mixed) - 1e-9
    assert mix(list(reversed(rows)), cap=cap, temperature=temperature) == list(reversed(mixed))
