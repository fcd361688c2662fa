"""One row as a conversation with normalised roles, whatever form it came in.

Goes in: a row, its kind and mapping. Comes out: `Conversation`, or `RowProblem` with a code. Never does:
repair a row silently; render a template; cut anything off.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import orjson

from advisor.rows.tables import names_to_role
from advisor.types import DataKind, Record

Message = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content`; with `tool_calls` where the assistant calls."""
Row = Mapping[str, object]


class RowProblem(Exception):
    """Something that makes one row unusable; `code` is stable, `message` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Conversation(Record, frozen=True, kw_only=True):
    """What a row says; which fields are filled depends on the kind."""

    messages: list[Message] = []
    """The whole conversation, answers included, of every kind that has them."""
    prompt: list[Message] = []
    """What comes before the answer, of preferences, marked answers and prompts."""
    chosen: list[Message] = []
    rejected: list[Message] = []
    completion: list[Message] = []
    """The marked answer."""
    label: bool | str | int | None = None
    text: str | None = None
    """Of raw text and classification."""
    reference: str | None = None
    """The answer to check against."""
    tools: list[dict[str, Any]] | None = None


def to_messages(row: Row, kind: DataKind, mapping: Mapping[str, str]) -> Conversation:
    """Turn one row into a conversation.

    Args:
        row: as read.
        kind: of the whole dataset.
        mapping: canonical role -> column, from `infer_mapping` or the recipe.

    Raises:
        RowProblem: no_prompt, no_assistant_turn, empty_answer, unknown_role, content_not_text, empty_text,
            bad_label, bad_tool_call, same_answers or not_a_conversation.
    """
    if kind == "preference":
        return _preference(row, mapping)
    if kind == "unpaired_preference":
        return _unpaired(row, mapping)
    if kind in ("raw_text", "documents"):
        return Conversation(text=_filled(row, mapping, "text", "empty_text"))
    if kind == "classification":
        return _classification(row, mapping)
    if kind in ("prompts", "prompts_with_answers"):
        return _prompt_only(row, mapping)
    messages = _conversation(row, mapping)
    check_answers(messages)
    return Conversation(messages=messages, tools=_tools(row, mapping))


def check_answers(messages: list[Message]) -> None:
    """Refuse a conversation that teaches nothing.

    Raises:
        RowProblem: no assistant turn, or one without text and calls.
    """
    answered = False
    for message in messages:
        if message["role"] == "assistant":
            answered = True
            if not message["content"].strip() and not message.get("tool_calls"):
                raise RowProblem("empty_answer", "an answer is empty")
    if not answered:
        raise RowProblem("no_assistant_turn", "no turn is the assistant's, so there is nothing to learn")


def consecutive_turns(messages: list[Message]) -> bool:
    """Tell whether two user or two assistant turns follow each other, which some templates refuse."""
    last = ""
    for message in messages:
        role = message["role"]
        if role == last and role in ("user", "assistant"):
            return True
        last = role
    return False


def _conversation(row: Row, mapping: Mapping[str, str]) -> list[Message]:
    """The turns of a chat column, or a pair of columns as two turns."""
    column = mapping.get("messages")
    if column is not None:
        turns = _turns(row.get(column))
        _put_system(turns, row, mapping)
        _put_reasoning(turns, row, mapping)
        return turns
    turns = _prompt_turns(row, mapping)
    answer = _text(row, mapping, "answer")
    if answer is None or not answer.strip():
        raise RowProblem("empty_answer", f"the column {mapping.get('answer')} is empty")
    turns.append({"role": "assistant", "content": answer})
    _put_reasoning(turns, row, mapping)
    return turns


def _prompt_turns(row: Row, mapping: Mapping[str, str]) -> list[Message]:
    value = row.get(mapping["prompt"]) if "prompt" in mapping else None
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = _turns(value)
    else:
        prompt = _filled(row, mapping, "prompt", "no_prompt")
        context = _text(row, mapping, "context")
        content = f"{prompt}\n{context}" if context else prompt
        turns = [*_history(row, mapping), {"role": "user", "content": content}]
    _put_system(turns, row, mapping)
    return turns


def _history(row: Row, mapping: Mapping[str, str]) -> list[Message]:
    value = row.get(mapping["history"]) if "history" in mapping else None
    if not value:
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value
    ):
        raise RowProblem("not_a_conversation", "the history is not a list of [question, answer] pairs")
    turns: list[Message] = []
    for question, answer in value:
        turns += [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
    return turns


def _put_system(turns: list[Message], row: Row, mapping: Mapping[str, str]) -> None:
    if "system" in mapping and (system := _text(row, mapping, "system")) and turns[:1]:
        if turns[0]["role"] == "system":
            return
        turns.insert(0, {"role": "system", "content": system})


def _put_reasoning(turns: list[Message], row: Row, mapping: Mapping[str, str]) -> None:
    """Reasoning becomes part of the answer, in the tags that every template of a reasoning model reads."""
    if "reasoning" not in mapping or not turns or turns[-1]["role"] != "assistant":
        return
    thought = _text(row, mapping, "reasoning")
    if thought and "<think>" not in turns[-1]["content"]:
        turns[-1]["content"] = _with_thought(thought, turns[-1]["content"])


def _with_thought(thought: str, answer: str) -> str:
    return f"<think>\n{thought.strip()}\n</think>\n\n{answer.lstrip()}"


def _turns(value: object) -> list[Message]:
    if isinstance(value, str) and value[:1] == "[":
        value = _parsed(value, "not_a_conversation", "the conversation is not valid JSON")
    if not isinstance(value, list) or not value:
        raise RowProblem("not_a_conversation", "the conversation is not a list of turns, or is empty")
    roles = names_to_role("columns", "turns")
    return [_turn(turn, roles) for turn in value]


def _turn(turn: object, roles: Mapping[str, str]) -> Message:
    if type(turn) is dict and len(turn) == 2 and type(content := turn.get("content")) is str:
        # nearly every turn of nearly every file; the checks below cost three times as much
        role = roles.get(turn["role"]) if type(turn.get("role")) is str else None
        if role is not None and role != "function_call":
            return {"role": role, "content": content}
    if not isinstance(turn, dict):
        raise RowProblem("not_a_conversation", "a turn is not an object with a role and a content")
    given = turn.get("role") if "role" in turn else turn.get("from")
    role = roles.get(given) or roles.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise RowProblem("unknown_role", f"the role {given!r} is not known")
    content = turn.get("content") if "content" in turn else turn.get("value")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    calls = turn.get("tool_calls")
    if not isinstance(content, str):
        content = _joined_parts(content, may_lack=bool(calls))
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = _calls(calls)
    thought = turn.get("reasoning_content")
    if thought and isinstance(thought, str) and "<think>" not in content:
        message["content"] = _with_thought(thought, content)
    for key in ("name", "tool_call_id"):
        if role == "tool" and isinstance(turn.get(key), str):
            message[key] = turn[key]
    return message


def _joined_parts(content: object, *, may_lack: bool) -> str:
    """Join a content that is a list of text parts; a call may come without content."""
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
        raise RowProblem("content_not_text", "a turn holds pictures, sound or other parts that are not text")
    what = "missing" if content is None else type(content).__name__
    raise RowProblem("content_not_text", f"the content of a turn is {what}, not text")


def _calls(value: object) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, whatever form they came in; arguments become objects."""
    if isinstance(value, str):
        value = _parsed(value, "bad_tool_call", "a tool call is not valid JSON")
    items = value if isinstance(value, list) else [value]
    calls = []
    for item in items:
        if not isinstance(item, dict):
            raise RowProblem("bad_tool_call", "a tool call is not an object")
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowProblem("bad_tool_call", "a tool call has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(
                arguments or "{}", "bad_tool_call", "the arguments of a call are not valid JSON"
            )
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        if isinstance(item.get("id"), str):
            call["id"] = item["id"]
        calls.append(call)
    return calls


def _tools(row: Row, mapping: Mapping[str, str]) -> list[dict[str, Any]] | None:
    value = row.get(mapping["tools"]) if "tools" in mapping else None
    if not value:
        return None
    if isinstance(value, str):
        value = _parsed(value, "bad_tools", "the tools are not valid JSON")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowProblem("bad_tools", "the tools are not a list of descriptions")
    return value


def _parsed(text: str, code: str, message: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as problem:
        raise RowProblem(code, message) from problem


def _preference(row: Row, mapping: Mapping[str, str]) -> Conversation:
    chosen, rejected = (_answer(row.get(mapping.get(role, "")), role) for role in ("chosen", "rejected"))
    if "messages" in mapping:
        prompt = _conversation(row, {k: v for k, v in mapping.items() if k != "reasoning"})
    elif "prompt" in mapping and not (chosen and chosen[0]["role"] != "assistant"):
        prompt = _prompt_turns(row, mapping)
    else:
        prompt = _common_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _put_system(prompt, row, mapping)
    if not prompt:
        raise RowProblem("no_prompt", "the two conversations have no common start")
    for answer in (chosen, rejected):
        check_answers(answer)
    if chosen == rejected:
        raise RowProblem("same_answers", "the chosen and the rejected answer are the same")
    return Conversation(prompt=prompt, chosen=chosen, rejected=rejected, tools=_tools(row, mapping))


def _answer(value: object, role: str) -> list[Message]:
    """A preferred or rejected answer: a text, one turn, a list of turns, or a transcript."""
    if isinstance(value, str):
        return _transcript(value) or [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return _turns([value])
    if isinstance(value, list):
        return _turns(value)
    raise RowProblem("empty_answer", f"the {role} answer is missing")


def _transcript(text: str) -> list[Message]:
    """Turns of a text that marks them with Human: and Assistant:, as some preference data does."""
    if not text.startswith("\n\nHuman:"):
        return []
    turns: list[Message] = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def _common_start(first: list[Message], second: list[Message]) -> list[Message]:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], second[:-1], strict=False))
    return [message for message, _ in same]


def _unpaired(row: Row, mapping: Mapping[str, str]) -> Conversation:
    marks = names_to_role("columns", "marks")
    label = row.get(mapping.get("label", ""))
    mark = marks.get(str(label).strip().lower())
    if mark is None:
        raise RowProblem("bad_label", f"the label {label!r} is neither true nor false")
    if "messages" in mapping:
        turns = _conversation(row, mapping)
        cut = len(turns) - 1
        while cut > 0 and turns[cut - 1]["role"] == "assistant":
            cut -= 1
        prompt, completion = turns[:cut], turns[cut:]
    else:
        prompt, completion = (
            _prompt_turns(row, mapping),
            _answer(row.get(mapping.get("answer", "")), "marked"),
        )
    if not prompt:
        raise RowProblem("no_prompt", "there is nothing before the answer")
    check_answers(completion)
    return Conversation(
        prompt=prompt, completion=completion, label=mark == "wanted", tools=_tools(row, mapping)
    )


def _classification(row: Row, mapping: Mapping[str, str]) -> Conversation:
    text = _filled(row, mapping, "text", "empty_text")
    label = row.get(mapping.get("label", ""))
    if not isinstance(label, (str, int)) or (isinstance(label, str) and not label.strip()):
        raise RowProblem("bad_label", f"the label {label!r} is neither a word nor a number")
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": str(label)}]
    return Conversation(messages=turns, text=text, label=label)


def _prompt_only(row: Row, mapping: Mapping[str, str]) -> Conversation:
    if "messages" in mapping:
        prompt = _turns(row.get(mapping["messages"]))
        _put_system(prompt, row, mapping)
    else:
        prompt = _prompt_turns(row, mapping)
    answer = _filled(row, mapping, "answer", "empty_answer") if "answer" in mapping else None
    if "reference" in mapping:
        reference: str | None = _filled(row, mapping, "reference", "empty_answer")
    else:
        reference = answer.rsplit("####", 1)[-1].strip() if answer is not None else None
    messages = [*prompt, {"role": "assistant", "content": answer}] if answer is not None else []
    return Conversation(messages=messages, prompt=prompt, reference=reference)


def _text(row: Row, mapping: Mapping[str, str], role: str) -> str | None:
    """The text in the column of a role; numbers count as text, because tables turn answers into them."""
    value = row.get(mapping[role]) if role in mapping else None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise RowProblem(
        "content_not_text", f"the column {mapping[role]} holds a {type(value).__name__}, not text"
    )


def _filled(row: Row, mapping: Mapping[str, str], role: str, code: str) -> str:
    value = _text(row, mapping, role)
    if value is None or not value.strip():
        raise RowProblem(code, f"the column {mapping.get(role)} is empty")
    return value
