"""What is in the rows of a dataset, and what is wrong with them: one pass over all rows.

Goes in: rows one after another. Comes out: counts, findings with row numbers, an evenly spread sample.
Memory: a hash of each row and the sample. Never does: read files, count tokens, stop at a bad row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from advisor.rows import Conversation, Message, RowProblem, consecutive_turns, rule_table, to_messages
from advisor.types import DataKind, Finding, Severity

EXAMPLES = 5
Row = Mapping[str, object]

_REMEDIES = {
    "empty_answer": "Fill the answers or delete the rows: they would teach the model to say nothing.",
    "no_assistant_turn": "Give each conversation an answer. Prompts alone go into a column named prompt.",
    "unknown_role": "Name the roles system, user, assistant or tool (ShareGPT: human, gpt).",
    "content_not_text": "Keep text only; rows with other content are left out of training.",
    "not_a_conversation": "Write each conversation as a list of {role, content}.",
    "no_prompt": "Fill the prompts or delete the rows.",
    "empty_text": "Delete the rows.",
    "bad_label": "Write every label in the same way.",
    "bad_tool_call": "Write each call as {name, arguments} with arguments as an object.",
    "bad_tools": "Write the tools as a list of descriptions.",
    "same_answers": "Delete the pairs: nothing can be preferred between two equal answers.",
}


class Tally:
    """How often something was seen, with the first rows where it was."""

    __slots__ = ("count", "first", "note")

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []
        self.note = ""

    def add(self, row: int, note: str = "") -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < EXAMPLES:
            self.first.append(row)
            self.note = self.note or note


class Scan:
    """Everything that is counted over all rows; feed rows with `add`, then ask."""

    def __init__(self, kind: DataKind, mapping: Mapping[str, str], *, sample_rows: int) -> None:
        rules = rule_table("profile")
        self.kind = kind
        self.mapping = dict(mapping)
        self.rows = 0
        self.usable = 0
        self.sample: list[tuple[int, Conversation]] = []
        self.longest: tuple[int, int, Conversation] | None = None
        self.labels: Counter[str] = Counter()
        self.problems: dict[str, Tally] = {}
        self.problem_notes: dict[str, str] = {}
        self.placeholders = [Tally() for _ in rules["placeholders"]]
        self.templates: dict[str, Tally] = {}
        self.duplicates, self.identical, self.mojibake = Tally(), Tally(), Tally()
        self.long_rows, self.consecutive = Tally(), Tally()
        self._limits = rules["limits"]
        self._most_characters: int = self._limits["long_row_characters"]
        self._most_hashes: int = self._limits["duplicate_rows"]
        self._patterns = [(p["sign"], re.compile(p["pattern"])) for p in rules["placeholders"]]
        self._severities: list[Severity] = [p["severity"] for p in rules["placeholders"]]
        marks = rules["templates"]
        self._marks = [(name, marks[name]) for name in marks if isinstance(marks[name], list)]
        self._mojibake = rules["mojibake"]["marks"]
        self._seen: set[int] = set()
        self._sample_rows = max(1, sample_rows)
        self._every = 1

    def add(self, number: int, row: Row) -> None:
        """Look at one row."""
        self.rows += 1
        try:
            said = to_messages(row, self.kind, self.mapping)
        except RowProblem as problem:
            self.problems.setdefault(problem.code, Tally()).add(number)
            self.problem_notes.setdefault(problem.code, problem.message)
            return
        self.usable += 1
        texts = texts_of(said)
        blob = "\0".join(texts)
        self._look(number, blob, texts)
        known = len(self._seen)
        if known < self._most_hashes:
            self._seen.add(hash(blob))
            if len(self._seen) == known:
                self.duplicates.add(number)
        if said.messages and consecutive_turns(said.messages):
            self.consecutive.add(number)
        if said.label is not None:
            self.labels[str(said.label)] += 1
        self._keep(number, said, len(blob))

    def _look(self, number: int, blob: str, texts: list[str]) -> None:
        """Search one row's text; the single-character tests come first because they are nearly free."""
        brackets = False
        if "{" in blob or "[" in blob or "<" in blob:
            for tally, (sign, pattern) in zip(self.placeholders, self._patterns, strict=True):
                if sign in blob and (match := pattern.search(blob)):
                    tally.add(number, match.group())
            brackets = "<" in blob or "[" in blob
        if brackets or "#" in blob:
            for name, marks in self._marks:
                for mark in marks:
                    if mark in blob:
                        self.templates.setdefault(name, Tally()).add(number, mark)
                        break
        if not blob.isascii() and any(mark in blob for mark in self._mojibake):
            self.mojibake.add(number)
        if len(blob) > self._most_characters:
            self.long_rows.add(number)
        if len(texts) > 1 and texts[-1] == texts[-2]:
            self.identical.add(number)

    def _keep(self, number: int, said: Conversation, size: int) -> None:
        """Keep every n-th row; n doubles whenever twice the sample is full, so the sample stays even."""
        if self.longest is None or size > self.longest[0]:
            self.longest = (size, number, said)
        if (self.usable - 1) % self._every:
            return
        self.sample.append((number, said))
        if len(self.sample) >= 2 * self._sample_rows:
            del self.sample[1::2]
            self._every *= 2

    def spread(self) -> list[tuple[int, Conversation]]:
        """Return at most `sample_rows` rows, spread evenly over the data."""
        have, want = len(self.sample), self._sample_rows
        if have <= want:
            return self.sample
        return [self.sample[i * have // want] for i in range(want)]

    def mixed_templates(self) -> bool:
        """Tell whether rows carry different templates, or only some carry one."""
        least = self._limits["share_mixture"] * self.usable
        marked = [tally.count for tally in self.templates.values() if tally.count >= max(1.0, least)]
        return len(marked) > 1 or any(count <= self.usable - max(1.0, least) for count in marked)

    def duplicate_fraction(self) -> float:
        """Return the share of rows that repeat an earlier one."""
        return self.duplicates.count / self.usable if self.usable else 0.0

    def findings(self, *, alternating: bool) -> Iterable[Finding]:
        """Yield what should be known before training.

        Args:
            alternating: the chat template refuses two turns of the same side in a row.
        """
        for code, tally in self.problems.items():
            severe = tally.count >= self._limits["share_error"] * self.rows
            yield self._finding(
                code,
                "error" if severe else "warning",
                f"{_rows(tally.count)} of {self.rows} cannot be used: {self.problem_notes[code]}.",
                _REMEDIES[code],
                tally,
            )
        for tally, severity in zip(self.placeholders, self._severities, strict=True):
            if tally.count:
                yield self._placeholder(tally, severity)
        yield from self._text_findings()
        yield from self._shape_findings(alternating=alternating)

    def _placeholder(self, tally: Tally, severity: Severity) -> Finding:
        often = tally.count >= self._limits["share_mixture"] * self.rows
        return self._finding(
            "unfilled_placeholders",
            "warning" if often else severity,
            f"{_rows(tally.count)} of {self.rows} with a place left to be filled in, such as {tally.note}.",
            "Put the real words in, or the model will say the placeholder.",
            tally,
        )

    def _text_findings(self) -> Iterable[Finding]:
        for name, tally in self.templates.items():
            yield self._finding(
                "rendered_template",
                "warning",
                f"{_rows(tally.count)} with marks of the {name} template, such as {tally.note}.",
                "Take the marks out and give the turns as messages: the template is applied in training.",
                tally,
            )
        if self.mixed_templates():
            yield Finding(
                code="mixed_templates",
                severity="warning",
                message=f"Templates are mixed: {', '.join(sorted(self.templates))}, and rows without one.",
                remedy="Bring all rows into one form.",
            )
        if self.mojibake.count:
            yield self._finding(
                "damaged_characters",
                "warning",
                f"{_rows(self.mojibake.count)} with characters that a wrong encoding damaged.",
                "Make the file again as UTF-8 from its source.",
                self.mojibake,
            )
        if self.long_rows.count:
            most = self._limits["long_row_characters"]
            yield self._finding(
                "long_rows",
                "info",
                f"{_rows(self.long_rows.count)} longer than {most:,} characters.",
                "They will be cut at the length of training; split them where that loses the answer.",
                self.long_rows,
            )

    def _shape_findings(self, *, alternating: bool) -> Iterable[Finding]:
        if self.duplicates.count:
            share = self.duplicate_fraction()
            yield self._finding(
                "duplicates",
                "warning" if share > self._limits["duplicate_share"] else "info",
                f"{_rows(self.duplicates.count)} ({share:.1%}) the same as an earlier row.",
                "Remove them, unless the weight is meant.",
                self.duplicates,
            )
        if self.identical.count:
            yield self._finding(
                "answer_repeats_prompt",
                "warning",
                f"{_rows(self.identical.count)} whose answer is the prompt again.",
                "Delete the rows, or fill in the real answers.",
                self.identical,
            )
        if self.consecutive.count:
            yield self._finding(
                "consecutive_turns",
                "warning" if alternating else "info",
                f"{_rows(self.consecutive.count)} with two turns of the same side one after the other.",
                "The model's template refuses them: join." if alternating else "Join them if unmeant.",
                self.consecutive,
            )
        if self.kind == "unpaired_preference" and len(self.labels) == 1:
            yield Finding(
                code="one_class",
                severity="error",
                message=f"All answers carry the same mark ({next(iter(self.labels))}): no contrast.",
                remedy="Add answers of the other kind, or train on the good ones (sft).",
            )
        if self.rows < self._limits["few_rows"]:
            yield Finding(
                code="few_rows",
                severity="info",
                message=f"Only {_rows(self.rows)}: enough to try the way, rarely enough to change a model.",
                remedy="Collect more, or try a prompt with examples first.",
            )

    def _finding(self, code: str, severity: Severity, message: str, remedy: str, tally: Tally) -> Finding:
        return Finding(
            code=code,
            severity=severity,
            message=message,
            count=tally.count,
            examples=tuple(f"row {row}" for row in tally.first),
            remedy=remedy,
        )


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def texts_of(said: Conversation) -> list[str]:
    """Return all texts of a row in order, the answer last."""
    if said.text is not None:
        return [said.text]
    if not said.prompt:
        return [message["content"] for message in said.messages]
    turns: list[Message] = said.messages or [*said.prompt, *said.rejected, *said.chosen, *said.completion]
    return [turn["content"] for turn in turns]
