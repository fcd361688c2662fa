"""Asks the questions on a terminal, shows the plan, and says what to do next.

Goes in: answers given so far. Comes out: answers and the person's decision. Never does: plan, train, write
anything but the draft of the answers.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import questionary
from prompt_toolkit.key_binding import KeyBindings, merge_key_bindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent

from advisor.errors import AdvisorError, UsageError
from advisor.storage import encode_yaml, read_yaml, write_atomic
from advisor.types import Plan
from advisor.ui import advice
from advisor.ui.console import make_console
from advisor.ui.questions import QUESTIONS, Answer, Question, check_answers, command_of, inputs_from, missing

Decision = Literal["run", "write", "change", "all settings", "stop"]
DRAFT = Path("ftadvisor-answers.yaml")
STYLE = questionary.Style(
    [("qmark", "bold"), ("question", "bold"), ("answer", ""), ("pointer", "bold"), ("highlighted", "bold")]
)


class _Back(Exception):
    """The person pressed Esc: back to the question before."""


def load_answers(file: Path | None) -> dict[str, Answer]:
    """Return the answers of `--answers FILE`; none when there is no file."""
    if file is None:
        return {}
    remedy = "Check the path of --answers and the YAML in it."
    return check_answers(read_yaml(file, error=UsageError, remedy=remedy), str(file))


def require_terminal(answers: dict[str, Answer]) -> bool:
    """Return whether questions can be asked; without a terminal, every required answer must be there.

    Raises:
        UsageError: an answer is missing and nobody can be asked; names the key and the flag.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return True
    lacking = missing(answers)
    if lacking:
        names = ", ".join(f"{question.key} ({question.shown_flag})" for question in lacking)
        flags = " ".join(question.shown_flag for question in QUESTIONS)
        raise UsageError(
            f"The wizard needs a terminal to ask for: {names}.",
            f"Give --answers FILE with these keys, or use ftadvisor plan with the flags: {flags}",
        )
    return False


def ask_all(
    answers: dict[str, Answer],
    defaults: dict[str, Answer],
    show: Callable[[str, dict[str, Answer]], None],
) -> dict[str, Answer]:
    """Ask what is not answered yet; Esc goes back one question, Ctrl-C saves the answers and stops.

    Args:
        answers: given so far; those are not asked again.
        defaults: offered as the answer where there is one.
        show: called with a key after its answer came, to show what was found out; an AdvisorError that it
            raises is shown and the question is asked again.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the draft was saved.
    """
    given, refused = dict(answers), dict[str, Answer]()
    asked: list[Question] = []
    todo = [question for question in QUESTIONS if question.key not in given]
    console = make_console()
    console.print("Enter accepts, Esc goes back, Ctrl-C stops and keeps your answers.", style="quiet")
    while todo:
        question = todo[0]
        console.print(f"\n{question.why}", style="quiet")
        if question.hint:
            console.print(question.hint, style="quiet")
        try:
            before = given.get(question.key, defaults.get(question.key))
            given[question.key] = _ask(question, before, refused.get(question.key))
            show(question.key, given)
        except _Back:
            if asked:
                todo.insert(0, asked.pop())
            continue
        except KeyboardInterrupt:
            save_draft(given)
            raise
        except AdvisorError as error:
            console.print(error.message, style="bad")
            console.print(error.remedy)
            answer = given.pop(question.key, "")
            refused[question.key] = answer if question.free else question.default
            continue
        asked.append(todo.pop(0))
    return given


def save_draft(answers: dict[str, Answer], file: Path = DRAFT) -> None:
    """Write the answers so that the wizard can go on, and say how."""
    write_atomic(file, encode_yaml(answers))
    make_console().print(f"\nYour answers are in {file}. Go on with: ftadvisor wizard --answers {file}")


def decide(plan: Plan, answers: dict[str, Answer]) -> Decision:
    """Ask what to do with the plan that was shown.

    Raises:
        KeyboardInterrupt: Ctrl-C or Esc, after the draft was saved.
    """
    titles: list[tuple[str, Decision]] = [
        ("Write the run folder and start", "run"),
        ("Only write it", "write"),
    ]
    if not plan.stages:
        titles = []
    elif plan.verdict != "train":
        titles = [("Train all the same (not advised)", "run"), ("Only write it (not advised)", "write")]
    titles += [("Show every setting and candidate", "all settings"), ("Change my answers", "change")]
    titles.append(("Stop; keep my answers", "stop"))
    choices = [questionary.Choice(title, value=value) for title, value in titles]
    make_console().print(f"\n{plan.summary}", style="key")
    try:
        return _run(questionary.select("What now?", choices=choices, style=STYLE))  # type: ignore[no-any-return]
    except (_Back, KeyboardInterrupt):
        save_draft(answers)
        raise KeyboardInterrupt from None


def show_plan(plan: Plan, answers: dict[str, Answer], *, expert: bool) -> None:
    """Print the plan and the command that makes the same one without the wizard."""
    console = make_console()
    console.print(advice.plan(plan, expert=expert))
    console.print("\nThe same without the wizard:")
    console.print(f"  {shlex.join(command_of(inputs_from(answers)))}", style="key", soft_wrap=True)


def _ask(question: Question, before: Answer, refused: Answer) -> Answer:
    """Ask one question; after a refused answer the line starts empty, and Enter gives `refused`."""
    default = question.default if before is None else before
    if question.kind == "confirm":
        return bool(_run(questionary.confirm(question.text, default=bool(default), style=STYLE)))
    if question.kind == "select":
        choices = [questionary.Choice(choice.title, value=choice.value) for choice in question.choices]
        return str(
            _run(questionary.select(question.text, choices=choices, default=str(default), style=STYLE))
        )
    text = str(default) if refused is None else ""
    if question.kind == "path":
        prompt = questionary.path(question.text, default=text, style=STYLE)
    else:
        prompt = questionary.text(question.text, default=text, style=STYLE)
    answer = str(_run(prompt)).strip() or str(refused or "")
    if question.required and not answer:
        raise UsageError("This one is needed.", "Write a path such as data.jsonl, or press Ctrl-C to stop.")
    return answer


def _run(prompt: questionary.Question) -> Any:
    """Ask one prompt with Esc meaning back; Ctrl-C raises KeyboardInterrupt."""
    keys = KeyBindings()

    @keys.add("escape", eager=True)
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=_Back())

    own = prompt.application.key_bindings
    prompt.application.key_bindings = merge_key_bindings([*([own] if own is not None else []), keys])
    prompt.application.ttimeoutlen = 0.1
    return prompt.unsafe_ask()
