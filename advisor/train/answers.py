"""Where are the answers in a rendered conversation, and do they end as the model must learn to end them?

Goes in: a chat template and messages. Comes out: the text and the character span of each answer, its
end-of-turn token included and nothing after it. Never does: change the template; guess a span that it cannot
verify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from advisor.errors import ModelError
from advisor.resources import base_chat_template
from advisor.rows import Message
from advisor.templates import (
    TemplateRefusalError,
    end_of_call,
    end_of_turn,
    has_generation_markers,
    render,
    render_with_spans,
)
from advisor.types import Record

Tools = list[dict[str, Any]] | None
MOST_REWRITTEN = 4
"""Answers of one conversation that become rows of their own."""


class Template(Record, frozen=True, kw_only=True):
    """A chat template with what is to be known to train with it."""

    source: str
    end: str
    """The token that ends an answer."""
    marked: bool
    """Whether the template itself says where answers are."""
    call_end: str | None = None
    """The token that ends a tool call, where it is another one."""
    bos: str = ""
    eos: str = ""
    given: bool = False
    """The model had none and was given a plain one, which is saved with the result."""


class Rendered(Record, frozen=True, kw_only=True):
    """A conversation as the model sees it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character span [start, end) of each answer that was found."""
    prompt: str
    """What the model is given before it writes the last answer."""
    missed: tuple[int, ...] = ()
    """Numbers of the messages whose answers were not found."""


def read_template(tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    """Examine the tokenizer's chat template; a base model without one is given a plain one.

    Raises:
        ModelError: answers do not end with one token, so that the model could not learn to stop.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    given = not source
    if not source:
        begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
        # Named only where there is one: llama.cpp puts another token in place of one that is not there.
        source = tokenizer.chat_template = ("{{- bos_token -}}" if begins else "") + base_chat_template()
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    end = end_of_turn(source, bos_token=bos, eos_token=eos)
    ids = [] if end is None else tokenizer.encode(end, add_special_tokens=False)
    if end is None or len(ids) != 1:
        what = (
            "writes nothing after an answer"
            if end is None
            else f"ends an answer with {end!r}, which is {len(ids)} tokens"
        )
        raise ModelError(
            f"The chat template of {name} {what}; a model trained so would not learn to stop.",
            "Take chat_template.jinja from an instruction-tuned model of the same family.",
            code="chat_template",
        )
    after_call = end_of_call(source, bos_token=bos, eos_token=eos) or ""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return Template(
        source=source,
        end=end,
        marked=has_generation_markers(source),
        call_end=next((one for one in special if one != end and after_call.endswith(one)), None),
        bos=bos,
        eos=eos,
        given=given,
    )


def render_answers(template: Template, messages: list[Message], tools: Tools) -> Rendered:
    """Render a conversation and find its answers.

    Without markers an answer is what the template adds to the prompt before it; that holds only where the
    prompt is a true beginning of the whole text, otherwise the answer is left out.

    Raises:
        TemplateRefusalError: the template refuses the conversation.
    """
    missed: list[int] = []
    if template.marked:
        text, found = render_with_spans(
            template.source, messages, tools=tools, bos_token=template.bos, eos_token=template.eos
        )
        spans = [span for one in found if (span := _with_end(template, text, one)) is not None]
    else:
        text, spans = _render(template, messages, tools), []
        for number in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
            one = _by_prefix(template, messages, tools, text, number)
            span = None if one is None else _with_end(template, text, one)
            if span is None:
                missed.append(number)
            else:
                spans.append(span)
    prompt = _prompt(template, messages, tools)
    return Rendered(text=text, spans=tuple(spans), prompt=prompt, missed=tuple(missed))


def rewritten_answers(
    template: Template, messages: list[Message], tools: Tools, whole: Rendered
) -> Iterator[Rendered]:
    """Yield the conversation up to each answer that `whole` shows otherwise than the model would have written
    it, with this answer alone to train on; the newest ones, since each costs all that was said before it.

    Some templates leave the thoughts of earlier answers away, or put an empty thought before the last one: a
    tool call that is not the last turn would never be trained on."""
    for number in whole.missed[-MOST_REWRITTEN:]:
        if number + 1 == len(messages):
            continue
        try:
            found = render_answers(template, messages[: number + 1], tools)
        except TemplateRefusalError:
            continue
        if number not in found.missed:
            yield msgspec.structs.replace(found, spans=found.spans[-1:])


def render_prompt(template: Template, messages: list[Message]) -> str:
    """Return what the model is given before it answers.

    Raises:
        TemplateRefusalError: the template refuses the conversation.
    """
    return _render(template, messages, None, prompt=True)


def _by_prefix(
    template: Template, messages: list[Message], tools: Tools, text: str, number: int
) -> tuple[int, int] | None:
    """Return where the answer lies that the template adds to the prompt before it, if it does just that."""
    try:
        before = _render(template, messages[:number], tools, prompt=True)
        until = _render(template, messages[: number + 1], tools)
    except TemplateRefusalError:
        return None
    if text.startswith(before) and text.startswith(until.rstrip()) and len(until) > len(before):
        return len(before), len(until)
    return None


def _with_end(template: Template, text: str, span: tuple[int, int]) -> tuple[int, int] | None:
    """Return the span up to and with its end token; None when there is none in it or right behind it."""
    start, stop = span
    ends = [template.end] if template.call_end is None else [template.end, template.call_end]
    inside = [found + len(end) for end in ends if (found := text.rfind(end, start, stop)) >= 0]
    if inside:
        return start, max(inside)
    behind = text[stop:].lstrip()
    following = next((end for end in ends if behind.startswith(end)), None)
    return None if following is None else (start, len(text) - len(behind) + len(following))


def _prompt(template: Template, messages: list[Message], tools: Tools) -> str:
    last = max(
        (n for n, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages)
    )
    return _render(template, messages[:last], tools, prompt=True)


def _render(template: Template, messages: list[Message], tools: Tools, *, prompt: bool = False) -> str:
    return render(
        template.source,
        messages,
        tools=tools,
        add_generation_prompt=prompt,
        bos_token=template.bos,
        eos_token=template.eos,
    )
