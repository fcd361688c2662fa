"""Chat templates render as transformers renders them, and tell where answers lie and how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import ModelError
from advisor.templates import (
    TemplateRefusalError,
    end_of_turn,
    has_generation_markers,
    refuses_consecutive_turns,
    render,
    render_with_spans,
    strip_generation_markers,
)
from tiny import CHATML, make_tiny_model

CHATML_BLOCKS = """{%- if tools %}
<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}{% if message.tool_calls %}
{{ message.tool_calls | tojson(indent=2) }}{% endif %}<|im_end|>
{% endgeneration %}
    {%- else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA_3 = (
    "{{- bos_token }}{%- set ns = namespace(first=true) -%}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}{%- set ns.first = false -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% if loop.last and role == 'never' %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "blocks": CHATML_BLOCKS,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [
        {"role": "user", "content": "Tea & <cake>?"},
        {"role": "assistant", "content": " Yes, é 你好 "},
    ],
    "two turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n"},
        {"role": "assistant", "content": "d"},
    ],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Köln"}}}],
        },
    ],
}
BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of transformers, to render with."""
    from transformers import PreTrainedTokenizerFast

    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "look"}}]])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_renders_as_transformers_does(
    tokenizer: Any,
    template: str,
    chat: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> None:
    """Every template, chat and option gives the very text that transformers gives."""
    expected = tokenizer.apply_chat_template(
        chat, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ours = render(
        template,
        chat,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos_token=BOS,
        eos_token=EOS,
    )
    assert ours == expected


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["chatml", "blocks"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_answer_spans_are_those_of_transformers(template: str, chat: list[dict[str, Any]]) -> None:
    """The spans of the generation blocks are the ones that transformers masks the loss by."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, indices = render_jinja_template(
        conversations=[chat], chat_template=template, return_assistant_tokens_mask=True
    )
    text, spans = render_with_spans(template, chat)
    assert text == rendered[0]
    assert spans == [tuple(pair) for pair in indices[0]]
    assert all(text[start:end].strip().endswith("<|im_end|>") for start, end in spans)


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["chatml", "blocks"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_stripped_template_renders_the_same(template: str, chat: list[dict[str, Any]]) -> None:
    """Without its generation markers a template is plain Jinja and renders the same text."""
    stripped = strip_generation_markers(template)
    assert has_generation_markers(template)
    assert not has_generation_markers(stripped)
    assert "generation %}" not in stripped
    assert render(stripped, chat) == render(template, chat)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML_BLOCKS, "<|im_end|>"),
        (LLAMA_3, "<|eot_id|>"),
        (MISTRAL, EOS),
        (GEMMA, "<end_of_turn>"),
    ],
    ids=TEMPLATES,
)
def test_end_of_turn_is_found_by_rendering(template: str, expected: str) -> None:
    """The end of turn is what stands after an answer, wherever the answer stands."""
    assert end_of_turn(template, bos_token=BOS, eos_token=EOS) == expected


def test_template_without_end_of_turn_has_none() -> None:
    """A template that writes nothing after an answer has no end of turn."""
    assert end_of_turn("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}") is None


def test_refusal_is_told_apart_from_a_broken_template() -> None:
    """A template may refuse a conversation; one that is not Jinja is an error of the model."""
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(TemplateRefusalError, match="must alternate"):
        render(MISTRAL, turns)
    assert refuses_consecutive_turns(MISTRAL)
    assert not refuses_consecutive_turns(CHATML)
    with pytest.raises(ModelError, match="not valid Jinja"):
        render("{% for %}", turns)


def test_template_cannot_leave_the_sandbox() -> None:
    """Templates come from strangers: attributes that lead to Python's internals are refused."""
    with pytest.raises(TemplateRefusalError):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}", CHATS["one turn"])
    with pytest.raises(TemplateRefusalError):
        render("{{ messages.append(1) }}", CHATS["one turn"])
