"""The wizard's questions as data; each has a flag and an answers-file key of the same name.

Goes in: nothing. Comes out: QUESTIONS in the order they are asked. Never does: ask.
"""

from __future__ import annotations

from typing import Literal

from advisor.errors import UnknownNameError, UsageError
from advisor.inputs import Inputs
from advisor.types import Record

Answer = str | bool | None


class Choice(Record, frozen=True, kw_only=True):
    """One answer to choose: what is shown and what it means."""

    title: str
    value: str


class Question(Record, frozen=True, kw_only=True):
    """One question: `key` is the answers-file key, and the flag with dashes."""

    key: str
    text: str
    why: str
    kind: Literal["text", "path", "select", "confirm"]
    hint: str = ""
    """What may be answered, in one line."""

    default: str | bool = ""
    choices: tuple[Choice, ...] = ()
    required: bool = False
    free: bool = False
    """Any words will do: an answer that was questioned stands when it is not changed."""
    flag: str | None = None
    """The flag, where it is not `--key`; an empty text where only the wizard has it."""

    @property
    def shown_flag(self) -> str:
        """The flag that gives the same answer on the command line."""
        return f"--{self.key.replace('_', '-')}" if self.flag is None else self.flag


QUESTIONS: tuple[Question, ...] = (
    Question(
        key="hardware",
        text="Which machine will train?",
        why="Memory and number formats decide which methods fit.",
        hint="Enter: this one; or a name such as RTX 3060, 2x A100, none.",
        kind="text",
    ),
    Question(
        key="data",
        text="Where is your data?",
        why="What the rows hold decides which training is possible at all.",
        hint="A file, a folder or a hub id; several with commas.",
        kind="path",
        required=True,
    ),
    Question(
        key="goal",
        text="What should the model do better afterwards?",
        why="Tone, facts, format or skill: each has another method, and some need none.",
        hint="In your own words.",
        kind="text",
        free=True,
    ),
    Question(
        key="deploy",
        text="Where must it run afterwards?",
        why="The place decides the size and the file format.",
        kind="select",
        default="this machine",
        choices=(
            Choice(title="On this machine", value="this machine"),
            Choice(title="Offline on laptops (Ollama, llama.cpp)", value="offline on laptops via llama.cpp"),
            Choice(title="On a phone", value="phone"),
            Choice(title="On a server for many people", value="server"),
            Choice(title="I do not know yet", value=""),
        ),
    ),
    Question(
        key="commercial",
        text="Will it be used commercially?",
        why="Some models' licences forbid it.",
        kind="confirm",
        default=False,
    ),
    Question(
        key="must_not_forget",
        text="Must everything that it can do now stay as good?",
        why="Training on one thing makes others worse unless it is held back.",
        kind="confirm",
        default=False,
    ),
    Question(
        key="model",
        text="Which model?",
        why="A model you must use limits the methods; else the best that fits is chosen.",
        hint="auto: I choose one; or a hub id, a folder, starter.",
        kind="text",
        default="auto",
    ),
)
KEYS = tuple(question.key for question in QUESTIONS)


def check_answers(answers: object, where: str) -> dict[str, Answer]:
    """Return the answers of a file after checking keys and types.

    Raises:
        UsageError: it is no mapping, or a key or type is wrong; the nearest key is named.
    """
    if not isinstance(answers, dict):
        raise UsageError(
            f"{where} holds no answers.", f"Write one `key: value` a line, for {', '.join(KEYS)}."
        )
    checked: dict[str, Answer] = {}
    kinds = {question.key: question.kind for question in QUESTIONS}
    for key, value in answers.items():
        if key not in kinds:
            raise UnknownNameError("answer", str(key), KEYS, f"Mend {where}.")
        if kinds[key] == "confirm" and not isinstance(value, bool):
            raise UsageError(f"{where}: {key} must be true or false, not {value!r}.", f"Mend {where}.")
        if isinstance(value, list):
            value = ",".join(str(item) for item in value)
        checked[key] = value if isinstance(value, bool) or value is None else str(value)
    return checked


def missing(answers: dict[str, Answer]) -> list[Question]:
    """Return the required questions that have no answer."""
    return [question for question in QUESTIONS if question.required and not answers.get(question.key)]


def inputs_from(answers: dict[str, Answer]) -> Inputs:
    """Return the planning options that the answers stand for; questions not asked keep their defaults."""
    text = {key: str(value) if value is not None else "" for key, value in answers.items()}
    return Inputs(
        hardware=text.get("hardware") or None,
        data=tuple(part.strip() for part in text.get("data", "").split(",") if part.strip()),
        goal=text.get("goal", ""),
        deploy=text.get("deploy", ""),
        commercial=bool(answers["commercial"]) if "commercial" in answers else None,
        must_not_forget=bool(answers.get("must_not_forget", False)),
        model=text.get("model") or "auto",
    )


def command_of(inputs: Inputs) -> list[str]:
    """Return the `ftadvisor plan` command line that gives the same plan."""
    words = ["ftadvisor", "plan"]
    for name in ("model", "goal", "deploy", "hardware", "method"):
        value = getattr(inputs, name)
        if value and (name, value) != ("model", "auto"):
            words += [f"--{name}", value]
    for source in inputs.data:
        words += ["--data", source]
    for source in inputs.earlier:
        words += ["--earlier", source]
    if inputs.continue_from:
        words += ["--continue", inputs.continue_from]
    if inputs.commercial is not None:
        words.append("--commercial" if inputs.commercial else "--no-commercial")
    if inputs.must_not_forget:
        words.append("--must-not-forget")
    for key, value in inputs.settings.items():
        words += ["--set", f"{key}={value}"]
    return words
