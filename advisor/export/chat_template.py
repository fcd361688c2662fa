"""Finds the chat template of a model folder and asks it about sample conversations.

Goes in: the folder, or the Jinja source. Comes out: text. Never does: run a template outside the sandbox.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from advisor import templates
from advisor.errors import ModelError
from advisor.export.checkpoint import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages to render, and whether the assistant speaks next."""

    messages: tuple[dict[str, str], ...]
    generation_prompt: bool = True

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


def token_text(settings: dict[str, Any], name: str) -> str | None:
    """Return the text of `bos_token` and its like in tokenizer_config.json."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def render(template: str, settings: dict[str, Any], conversation: Conversation) -> str:
    """Render a conversation with the special tokens of tokenizer_config.json.

    Raises:
        ModelError: the template refuses this conversation or is no Jinja.
    """
    return templates.render(
        template,
        conversation.messages,
        add_generation_prompt=conversation.generation_prompt,
        bos_token=token_text(settings, "bos_token") or "",
        eos_token=token_text(settings, "eos_token") or "",
    )


def end_of_turn(template: str, settings: dict[str, Any], tokens: Iterable[str]) -> str | None:
    """Return the token that the template puts right after an answer, the longest that fits, or None."""
    after = templates.end_of_turn(
        template,
        bos_token=token_text(settings, "bos_token") or "",
        eos_token=token_text(settings, "eos_token") or "",
    )
    fitting = [token for token in tokens if len(token) > 2 and (after or "").startswith(token)]
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
