"""Renders a chat template as transformers does, and asks it where answers lie and how they end.

Goes in: the Jinja source and messages. Comes out: text, or character spans of the answers. What is to be
known about a template is found by rendering it, not by searching its source. Never does: load transformers;
run a template outside the sandbox.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from advisor.errors import InputError, ModelError

# Unicode noncharacters: no text holds them, so they can mark where generated text begins and ends.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_QUESTION, _ANSWER, _SECOND = "QUESTIONq7", "ANSWERa7", "SECONDs7"
Messages = Sequence[Mapping[str, Any]]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` encloses what the assistant says; here it leaves marks around it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Dict:
    """`dict(...)` for templates, without access to the class."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict())
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as problem:
        raise ModelError(
            f"The chat template is not valid Jinja (line {problem.lineno}): {problem.message}",
            "Take chat_template.jinja from the original model.",
            code="chat_template",
        ) from problem


class TemplateRefusalError(ModelError):
    """The template refuses these messages, or fails on them."""

    code = "template_refuses"


def _render_marked(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
) -> str:
    # transformers drops keys without a value: many templates would print "None"
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(template).render(
            messages=plain,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except jinja2.TemplateError as problem:
        raise TemplateRefusalError(
            f"The chat template refuses the conversation: {problem}", "Mend the turns, or leave the row out."
        ) from problem
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as problem:
        raise TemplateRefusalError(
            f"The chat template fails on the conversation: {type(problem).__name__}: {problem}",
            "Mend the turns, or leave the row out.",
        ) from problem


def render(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """Return the text of a conversation, equal to what transformers' `apply_chat_template` gives.

    Raises:
        ModelError: the template is not valid Jinja.
        TemplateRefusalError: it refuses these messages.
    """
    marked = _render_marked(
        template,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    return marked.replace(_BEGIN, "").replace(_END, "")


def render_with_spans(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = "",
    eos_token: str = "",
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and the character spans [start, end) of its generation blocks."""
    marked = _render_marked(
        template, messages, tools=tools, add_generation_prompt=False, bos_token=bos_token, eos_token=eos_token
    )
    spans, text, begin = [], [], 0
    length = 0
    for piece in re.split(f"([{_BEGIN}{_END}])", marked):
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            spans.append((begin, length))
        else:
            text.append(piece)
            length += len(piece)
    return "".join(text), spans


def newest_turns(
    turns: Sequence[dict[str, str]], tokens: Callable[[list[dict[str, str]]], list[int]], *, room: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Return the conversation and its token ids; the oldest questions with their answers make room, a system
    prompt and the last question stay.

    Args:
        turns: oldest first, perhaps a system prompt before them.
        tokens: gives the token ids of a conversation.
        room: the most tokens.

    Raises:
        InputError: what has to stay does not fit.
    """
    kept = int(turns[0]["role"] == "system")
    left = list(turns)
    while len(ids := tokens(left)) > room:
        if len(left) <= kept + 1:
            raise InputError(
                f"The text has {len(ids)} tokens; this model has room for {room} beside its answer.",
                "Shorten it.",
            )
        del left[kept : kept + 2]
    return left, ids


def has_generation_markers(template: str) -> bool:
    """Tell whether the template marks what the assistant says."""
    return _GENERATION_TAG.search(template) is not None


def strip_generation_markers(template: str) -> str:
    """Return a template that renders the same without the `generation` tag, which llama.cpp does not know.

    The tags become `if true` and `endif`, so that they trim white space exactly as before.
    """
    return _GENERATION_TAG.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template
    )


def end_of_turn(template: str, *, bos_token: str = "", eos_token: str = "") -> str | None:
    """Return the text that the template writes right after an answer, without white space.

    It is what an answer at the end and one followed by another question have in common, or what follows the
    one at the end where they have nothing; None when the template writes nothing after an answer or refuses
    a plain conversation.
    """
    asked = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        last = render(template, asked, bos_token=bos_token, eos_token=eos_token)
    except TemplateRefusalError:
        return None
    ending = last.rpartition(_ANSWER)[2]
    with contextlib.suppress(TemplateRefusalError):
        more = [*asked, {"role": "user", "content": _SECOND}]
        inside = render(template, more, bos_token=bos_token, eos_token=eos_token).rpartition(_ANSWER)[2]
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ending, inside, strict=False))
        same = "".join(left for left, _ in alike)
        # What follows may begin alike (<|user|> and <|endoftext|>): a token that has only begun is none.
        if same.rfind("<") > same.rfind(">"):
            same = same[: same.rfind("<")]
        ending = same.strip() or ending
    return ending.strip() or None


def end_of_call(template: str, *, bos_token: str = "", eos_token: str = "") -> str | None:
    """Return the text that the template writes after the arguments of a tool call, without white space.

    None when the template refuses calls or does not show them.
    """
    call = {"type": "function", "function": {"name": "look", "arguments": {"text": _ANSWER}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = render(template, turns, bos_token=bos_token, eos_token=eos_token)
    except TemplateRefusalError:
        return None
    return text.rpartition(_ANSWER)[2].strip() if _ANSWER in text else None


def refuses_consecutive_turns(template: str, *, bos_token: str = "", eos_token: str = "") -> bool:
    """Tell whether the template refuses two user turns in a row."""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "user", "content": _SECOND}]
    try:
        render(
            template,
            [*turns, {"role": "assistant", "content": _ANSWER}],
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except TemplateRefusalError:
        return True
    return False
