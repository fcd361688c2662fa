"""Finds and renders the chat template of a model folder: what ends a turn, whether it is ChatML.

Goes in: the folder, or the Jinja source. Comes out: text. Never does: run a template outside the sandbox.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from advisor.errors import ModelError
from advisor.export.checkpoint import read_json

_ANSWER = "ANSWERTEXT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages to render, and whether the assistant speaks next."""

    messages: tuple[dict[str, str], ...]
    generation_prompt: bool = True

    @staticmethod
    def single() -> Conversation:
        """Return one question."""
        return Conversation(messages=({"role": "user", "content": "Hello"},))

    @staticmethod
    def samples() -> tuple[Conversation, ...]:
        """Return the shapes that a template must get right: single, several turns, system, finished."""
        user, more = {"role": "user", "content": "Hello"}, {"role": "user", "content": "And  then?\nTell me."}
        answer = {"role": "assistant", "content": "Good morning to you."}
        system = {"role": "system", "content": "Be brief."}
        return (
            Conversation(messages=(user,)),
            Conversation(messages=(user, answer, more)),
            Conversation(messages=(system, user)),
            Conversation(messages=(system, user, answer, more, answer), generation_prompt=False),
        )


def strip_generation_markers(template: str) -> str:
    """Remove the markers that only training needs.

    A comment takes the place of each, because it trims the white space around it just as the marker did.
    """
    return re.sub(r"\{%([+-]?)\s*(?:end)?generation\s*([+-]?)%\}", r"{#\1 \2#}", template)


def read_template(folder: Path) -> str | None:
    """Return the Jinja source of a folder's chat template, or None.

    Raises:
        ModelError: several templates and none of them is the default.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, str):
            return found
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            if "default" not in named:
                raise ModelError(
                    f"{folder / name} has the chat templates {', '.join(named)} and no default.",
                    "Name one of them default.",
                )
            return str(named["default"])
    return None


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else 0).decode()


def render(template: str, settings: dict[str, Any], conversation: Conversation) -> str:
    """Render a template as transformers does.

    Args:
        template: Jinja source without generation markers.
        settings: tokenizer_config.json, whose special tokens the template may use.
        conversation: what was said.

    Raises:
        ModelError: the template refuses this conversation or is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    tokens = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and value
    }
    try:
        return environment.from_string(template).render(
            messages=list(conversation.messages),
            add_generation_prompt=conversation.generation_prompt,
            tools=None,
            documents=None,
            **tokens,
        )
    except jinja2.TemplateError as problem:
        raise ModelError(
            f"The chat template cannot be rendered: {problem}", "Mend the template."
        ) from problem


def end_of_turn(template: str, settings: dict[str, Any], tokens: Iterable[str]) -> str | None:
    """Return the token that the template puts right after an answer, the longest that fits, or None."""
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER})
    text = render(template, settings, Conversation(messages=messages, generation_prompt=False))
    _, found, after = text.rpartition(_ANSWER)
    after = after.lstrip()
    if not found or not after:
        return None
    fitting = [token for token in tokens if len(token) > 2 and after.startswith(token)]
    return max(fitting, key=len, default=None)


def is_chatml(template: str, settings: dict[str, Any]) -> bool:
    """Whether the template renders the sample conversations as plain ChatML."""
    try:
        return all(
            render(template, settings, sample) == _chatml(sample.messages, prompt=sample.generation_prompt)
            for sample in Conversation.samples()
        )
    except ModelError:
        return False


def _chatml(messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
    said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return said + ("<|im_start|>assistant\n" if prompt else "")
