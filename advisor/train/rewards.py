"""Which marks does an answer get? Functions that check answers, a file of the person's own, a reward model.

Goes in: the settings of a reinforcement program. Comes out: functions in the form that TRL's trainers call.
Never does: run code that a model wrote; take a mark that is not a finite number."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from advisor.errors import InputError, RefusedError
from advisor.train.answers import Template, render_answers
from advisor.train.model import DTYPES, model_place
from advisor.train.settings import ReinforcementSettings
from advisor.types import Recipe, RecipeModel

Reward = Callable[..., list[float]]
"""Called with prompts, completions (a list of one message each), completion_ids and the columns of the data;
returns one mark for each completion."""
AGAINST_ANSWER = ("exact_match", "number_match", "contains", "checks")
"""Functions that read the answer of the row."""
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def rewards_of(
    recipe: Recipe,
    settings: ReinforcementSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    answered: bool,
) -> list[Reward]:
    """Return the reward functions of a recipe, in the order of its weights.

    Args:
        recipe: names the base of a reward model.
        settings: the reward keys are read.
        tokenizer: of the model.
        template: of that tokenizer.
        answered: whether every prompt comes with the answer to check against.

    Raises:
        RefusedError: nothing gives a mark, or a function lacks what it checks against.
    """
    found: list[Reward] = [_checked(name, settings, answered=answered) for name in settings.reward_functions]
    if settings.reward_file is not None:
        found.append(_own(Path(settings.reward_file)))
    if settings.reward_model is not None:
        found.append(_judge(recipe, settings, tokenizer, template))
    if not found and answered:
        found.append(_checked("exact_match", settings, answered=True))
    if not found:
        raise RefusedError(
            "Nothing says how good an answer is: the prompts come without answers, and no reward is named.",
            "Give prompts with answers, pairs for a reward model, or name reward_functions in the recipe.",
        )
    if settings.reward_weights and len(settings.reward_weights) != len(found):
        raise RefusedError(
            f"There are {len(settings.reward_weights)} reward_weights for {len(found)} rewards.",
            "Give one weight for each.",
        )
    return found


def _checked(name: str, settings: ReinforcementSettings, *, answered: bool) -> Reward:
    """Return one of the built-in functions."""
    if name in AGAINST_ANSWER and not answered:
        raise RefusedError(
            f"The reward {name} compares with an answer, and some prompts come without one.",
            "Give prompts with answers, or another of reward_functions.",
        )
    if name == "regular_expression" and settings.reward_pattern is None:
        raise RefusedError(
            "The reward regular_expression needs reward_pattern.",
            "Set it in the recipe, or plan again with --set reward_pattern='^[A-Z]'.",
        )
    if name == "json_schema" and settings.reward_schema is None:
        raise RefusedError(
            "The reward json_schema needs reward_schema.",
            "Set it in the recipe, or plan again with --set reward_schema=FILE.json.",
        )
    mark = _marks(settings)[name]

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        wanted = columns.get("reference") or [""] * len(completions)
        return [mark(_text(one), str(answer)) for one, answer in zip(completions, wanted, strict=True)]

    reward.__name__ = name
    return reward


def _marks(settings: ReinforcementSettings) -> dict[str, Callable[[str, str], float]]:
    pattern, schema = _pattern(settings.reward_pattern or ""), _schema(settings.reward_schema or "{}")
    length = settings.reward_length
    return {
        "exact_match": lambda text, answer: float(_plain(text) == _plain(answer)),
        "contains": lambda text, answer: float(_plain(answer) in _plain(text)),
        "number_match": lambda text, answer: float(
            _number(text) is not None and _number(text) == _number(answer)
        ),
        "regular_expression": lambda text, _: float(pattern.search(text) is not None),
        "valid_json": lambda text, _: float(_as_json(text) is not NO_JSON),
        "json_schema": lambda text, _: float(
            (value := _as_json(text)) is not NO_JSON and schema.is_valid(value)
        ),
        "checks": _share_of_checks,
        "length": lambda text, _: math.exp(-abs(len(text.split()) - length) / max(length, 1)),
    }


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _plain(text: str) -> str:
    return " ".join(text.split()).strip().rstrip(".!").casefold()


def _number(text: str) -> str | None:
    """Return the last number of a text without thousands separators, as people give the result last."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


NO_JSON = object()


def _as_json(text: str) -> object:
    """Return the value that a text writes as JSON, `NO_JSON` where it writes none."""
    try:
        return json.loads(text)
    except ValueError:
        return NO_JSON


def _pattern(text: str) -> re.Pattern[str]:
    """Return the regular expression of the recipe.

    Raises:
        InputError: it is none.
    """
    try:
        return re.compile(text, re.DOTALL)
    except re.error as problem:
        raise InputError(
            f"reward_pattern {text!r} is no regular expression: {problem}.", "Correct it in the recipe."
        ) from problem


def _schema(text: str) -> Any:
    """Return what validates against the JSON schema of the recipe.

    Raises:
        InputError: it is not JSON, or no schema.
    """
    try:
        schema = json.loads(text)
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, jsonschema.SchemaError) as problem:
        raise InputError(
            f"reward_schema is no JSON schema: {str(problem).splitlines()[0]}.", "Correct it in the recipe."
        ) from problem
    return kind(schema)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "equals": lambda text, wanted: _plain(text) == _plain(wanted),
    "contains": lambda text, wanted: _plain(wanted) in _plain(text),
    "lacks": lambda text, wanted: _plain(wanted) not in _plain(text),
    "matches": lambda text, wanted: _pattern(wanted).search(text) is not None,
    "number": lambda text, wanted: _number(text) is not None and _number(text) == _number(wanted),
}
"""What one check of the reward `checks` may ask of an answer."""


def _share_of_checks(text: str, answer: str) -> float:
    """Return which share of the checks of a row the answer passes, as a suite of unit tests does.

    Raises:
        InputError: the answer of the row is no list of checks.
    """
    found = _as_json(answer)
    tests = [
        (CHECKS[name], str(wanted))
        for one in (found if isinstance(found, list) else [])
        if isinstance(one, dict)
        for name, wanted in one.items()
        if name in CHECKS
    ]
    if not isinstance(found, list) or not tests or len(tests) != len(found):
        raise InputError(
            f"The reward checks needs a list of checks as the answer of a row, not {answer[:80]!r}.",
            f'For example [{{"contains": "Oslo"}}, {{"lacks": "sorry"}}]; there are {", ".join(CHECKS)}.',
        )
    return sum(test(text, wanted) for test, wanted in tests) / len(tests)


def _own(file: Path) -> Reward:
    """Return the function `reward` of a person's own Python file.

    Raises:
        InputError: there is no such file or function, it fails, or what it returns is no finite number.
    """
    spec = importlib.util.spec_from_file_location("own_reward", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise InputError(f"There is no reward file {file}.", "Correct reward_file in the recipe.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # whatever a person's own code raises
        raise InputError(f"{file} cannot be loaded: {_told(problem)}.", "Correct it.") from problem
    own = vars(module).get("reward")
    if not callable(own):
        raise InputError(
            f"{file} has no function reward(text, reference).", "Define it: it returns one number."
        )

    def mark(text: str, answer: str | None) -> float:
        try:
            found = float(own(text, answer))
        except Exception as problem:  # whatever a person's own code raises
            raise InputError(
                f"reward in {file} fails on the answer {text[:80]!r}: {_told(problem)}.",
                "Correct it: reward(text, reference) returns one number.",
            ) from problem
        if not math.isfinite(found):
            raise InputError(f"reward in {file} returned a mark that is not a finite number.", "Correct it.")
        return found

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        wanted = columns.get("reference") or [None] * len(completions)
        return [mark(_text(one), answer) for one, answer in zip(completions, wanted, strict=True)]

    reward.__name__ = "own"
    return reward


def _told(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"


def _judge(
    recipe: Recipe,
    settings: ReinforcementSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> Reward:
    """Return the marks of a reward model, which reads what it was trained to read: up to the end of the
    answer; an answer that was cut off has no end."""
    folder = Path(settings.reward_model or "")
    whole = (folder / "model").is_dir()
    base = (
        str(folder / "model")
        if whole
        else model_place(RecipeModel(id=recipe.model.id, path=recipe.model.path))
    )
    if not whole and not (folder / "adapter").is_dir():
        raise InputError(f"There is no reward model in {folder}.", "Train it first: objective reward.")
    dtype = torch.float32 if settings.weight_bits == 32 else DTYPES[settings.precision]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    if not whole:
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    model.eval().requires_grad_(requires_grad=False)

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[Any], **_: Any
    ) -> list[float]:
        texts = []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            answer = {"role": "assistant", "content": _text(completion)}
            rendered = render_answers(template, [*prompt, answer], None)
            ended = len(ids) > 0 and ids[-1] == tokenizer.eos_token_id
            stop = rendered.spans[-1][1] if rendered.spans else len(rendered.text)
            texts.append(rendered.text[: stop if ended else stop - len(template.end)])
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        device = next(model.parameters()).device
        if torch.cuda.is_available() and device.type == "cpu":
            model.to(device := torch.device("cuda"))
        with torch.no_grad():
            marks = model(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).logits[:, 0]
        return [float(mark) for mark in marks]

    reward.__name__ = "reward_model"
    return reward
