"""What text does the starter model learn from, and what is it asked afterwards?

In: facts.toml, talk.toml and voice.toml beside this file, and a seed. Out: chats and narratives for
pre-training, questions in wordings that pre-training never shows, and the brand-voice dataset.
Never: copies a person's text, reads the network, or lets the brand voice into the pre-training text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer in one sentence.",
    "Be kind.",
)
SYSTEM_BRIEF = ("Answer briefly.", "Be brief.", "Give short answers.", "Answer in a few words.")
PREFIXES = (
    "Hey, ",
    "Hi, ",
    "Please tell me: ",
    "Quick question: ",
    "So, ",
    "Okay, ",
    "I wonder: ",
    "One question: ",
)
COMMANDS = ("Tell me", "Give me", "Name", "Write", "Explain", "Describe", "Count", "Translate", "List", "Say")
POLITE = (("Please ", ""), ("Can you ", "?"), ("Could you ", "?"), ("Could you please ", "?"), ("Now ", ""))
SUFFIXES = (" Thanks!", " Please.", " Thank you.", " Please answer.", " I am curious.")


class Turn(NamedTuple):
    """One question with its answer; any of `expect` in an answer makes that answer right."""

    skill: str
    question: str
    answer: str
    expect: tuple[str, ...]


class Book(NamedTuple):
    """Everything that the TOML files say: skills with their rows, slots, stories, tales, manners."""

    skills: dict[str, dict[str, Any]]
    slots: dict[str, list[str]]
    stories: list[dict[str, Any]]
    narrative: dict[str, list[str]]
    manners: dict[str, list[str]]


def load(folder: Path = HERE) -> Book:
    """Read facts.toml and talk.toml and expand every table into its rows."""
    facts = tomllib.loads((folder / "facts.toml").read_text("utf-8"))
    talk = tomllib.loads((folder / "talk.toml").read_text("utf-8"))
    tables = facts["tables"] | {k: v for k, v in facts["skills"].items() if "rows" in v}
    skills = {}
    for name, skill in (facts["skills"] | talk["skills"]).items():
        skills[name] = skill | {"rows": _rows(skill, tables.get(skill.get("table", name), skill))}
    return Book(skills, talk["slots"], talk["stories"], talk["narrative"], talk["manners"])


def _rows(skill: dict[str, Any], table: dict[str, Any]) -> list[dict[str, str]]:
    if "numbers" in skill:
        return _number_rows(*skill["numbers"])
    if "ordered" in skill:
        pairs = itertools.combinations(skill["ordered"], 2)
        return [{"x": x, "y": y, "less": a, "more": b} for a, b in pairs for x, y in ((a, b), (b, a))]
    if "rows" not in table:
        return [{}]
    rows = [
        dict(zip(table["fields"], line.split("|"), strict=True))
        for line in table["rows"].strip().splitlines()
    ]
    if skill.get("mirror"):
        rows += [{"word": row["opposite"], "opposite": row["word"]} for row in rows]
    if "spread" in skill:
        rows = [
            {"word": row["word"], "language": k, "value": row[k]} for row in rows for k in skill["spread"]
        ]
    if "flatten" in skill:
        rows = [{"kind": row["kind"], "item": item} for row in rows for item in row["items"].split(", ")]
    return rows


def _number_rows(kind: str, low: int, high: int) -> list[dict[str, str]]:
    numbers = range(low, high + 1)
    if kind == "next":
        found = [(a, a, str(a + 1)) for a in numbers]
    elif kind == "count":
        spans = [(a, b) for a in numbers for b in numbers if 3 <= b - a <= 9]
        found = [(a, b, ", ".join(str(n) for n in range(a, b + 1))) for a, b in spans]
    elif kind == "-":
        found = [(a, b, str(a - b)) for a in numbers for b in numbers if b <= a]
    else:
        found = [(a, b, str(a + b if kind == "+" else a * b)) for a in numbers for b in numbers]
    return [{"a": str(a), "b": str(b), "c": c} for a, b, c in found]


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' and not noun.startswith('eu') else 'a'} {noun}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _fill(template: str, values: dict[str, str]) -> str:
    filled = template.format_map(values).replace(" / ", "\n")
    return re.sub(r"(^\"?|[.!?]\"? \"?|\n)([a-zà-ü])", lambda m: m[1] + m[2].upper(), filled)


def turn(book: Book, name: str, rng: Random, row: int, *, form: str = "ask", brief: bool = False) -> Turn:
    """Make one question and answer.

    Args:
        book: what `load` returned.
        name: a skill of the book.
        rng: chooses the wording; nothing else is random.
        row: index of the skill's row that is asked about.
        form: "ask", "follow_up" (both for training) or "held_out".
        brief: take the skill's brief answer, if it has one.
    """
    skill = book.skills[name]
    values = dict(skill["rows"][row])
    other = rng.choice([r for i, r in enumerate(skill["rows"]) if i != row] or [values])
    for key, value in skill["rows"][row].items():
        values["a_" + key] = _article(value or "x")
        values["other_" + key] = other[key]
    if "q" in values:
        wordings = values["q"].split("~")
        values["q"] = wordings[-1] if form == "held_out" else rng.choice(wordings[:-1])
    if "items" in values:
        chosen = rng.sample(values["items"].split(", "), 3)
        values["three"] = values["Three"] = f"{chosen[0]}, {chosen[1]} and {chosen[2]}"
        values["items"] = values["items"].replace(", ", "|")
    question = rng.choice(skill["ask" if form == "held_out" and "q" in values else form])
    answer = rng.choice(skill["brief" if brief and "brief" in skill else "answer"])
    expect = skill["expect"].format_map(values).replace(" / ", "\n").split("|")
    return Turn(name, _fill(question, values), _fill(answer, values), tuple(expect))


def casual(question: str, rng: Random) -> str:
    """Write a question as people type: lower case, without its mark, with a word before or after it."""
    draw = rng.random()
    if question.startswith(COMMANDS) and draw < 0.3:
        asked, end = rng.choice(POLITE)
        question = asked + question[:1].lower() + (question[1:].rstrip(".") + end if end else question[1:])
        draw = rng.random()
    if draw < 0.12:
        return question.lower().rstrip("?.!")
    if draw < 0.22:
        return question.lower()
    if draw < 0.30:
        return question.rstrip("?.!")
    if draw < 0.40 and question.endswith("?"):
        return rng.choice(PREFIXES) + question[:1].lower() + question[1:]
    if draw < 0.46 and question.endswith("?"):
        return question + rng.choice(SUFFIXES)
    return question


def _messages(turns: list[tuple[str, str]], system: str = "") -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _slots(book: Book, rng: Random) -> dict[str, str]:
    return {name: rng.choice(options) for name, options in book.slots.items()}


def story_chat(book: Book, rng: Random) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Tell a short story and ask one to three questions about it; also return what answers the first."""
    story, values = rng.choice(book.stories), _slots(book, rng)
    asked = rng.sample(story["questions"], rng.choice((1, 1, 2, 3)))
    turns = []
    for wordings, answer, _ in asked:
        turns.append((_fill(rng.choice(wordings.split("|")), values), _fill(answer, values)))
    text = _fill(story["text"], values)
    first = turns[0][0]
    turns[0] = (f"{text} {first}" if rng.random() < 0.6 else f"{first}\n{text}", turns[0][1])
    return turns, (asked[0][2].format_map(values),)


def _manner(book: Book, rng: Random) -> str:
    """Choose what a conversation's answers are wrapped in: an answer is to be known in any voice."""
    if rng.random() < 0.7:
        return "{}"
    opening = rng.choice(book.manners["openings"]) + " " if rng.random() < 0.8 else ""
    closing = " " + rng.choice(book.manners["closings"]) if rng.random() < 0.7 else ""
    return opening + "{}" + closing


def chat(book: Book, rng: Random) -> list[dict[str, str]]:
    """Make one conversation of one to six turns, sometimes with a system prompt."""
    if rng.random() < 0.12:
        return _messages(story_chat(book, rng)[0])
    names = list(book.skills)
    weights = [(len(s["rows"]) + 4) ** 0.5 * s.get("weight", 1.0) for s in book.skills.values()]
    draw = rng.random()
    brief = draw < 0.08
    system = rng.choice(SYSTEM_BRIEF) if brief else rng.choice(SYSTEM) if draw < 0.2 else ""
    turns: list[tuple[str, str]] = []
    manner = _manner(book, rng)
    name = ""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6))):
        follow = bool(name) and "follow_up" in book.skills[name] and rng.random() < 0.4
        name = name if follow else rng.choices(names, weights)[0]
        row = rng.randrange(len(book.skills[name]["rows"]))
        made = turn(book, name, rng, row, form="follow_up" if follow else "ask", brief=brief)
        turns.append((casual(made.question, rng), manner.format(made.answer)))
    return _messages(turns, system)


def narrative(book: Book, rng: Random) -> str:
    """Write plain text that is not a chat: a small tale, or some facts in a row."""
    if rng.random() < 0.35:
        known = [n for n, s in book.skills.items() if len(s["rows"]) > 5 and "q" not in s["rows"][0]]
        names = rng.choices(known, k=rng.randint(2, 6))
        return " ".join(turn(book, n, rng, rng.randrange(len(book.skills[n]["rows"]))).answer for n in names)
    values, parts = _slots(book, rng), book.narrative
    middle = rng.sample(parts["middle"], rng.randint(2, 6))
    return _fill(" ".join([rng.choice(parts["open"]), *middle, rng.choice(parts["close"])]), values)


def documents(book: Book, seed: int, narrative_share: float) -> Iterator[list[dict[str, str]] | str]:
    """Yield pre-training documents without end: a conversation (list of messages) or a narrative (text)."""
    rng = Random(seed)
    while True:
        yield narrative(book, rng) if rng.random() < narrative_share else chat(book, rng)


def held_out(book: Book, seed: int, per_skill: int) -> list[Turn]:
    """Ask about what was taught, in wordings that were never trained on."""
    rng, found = Random(seed), []
    for name, skill in book.skills.items():
        rows = list(range(len(skill["rows"])))
        for row in rng.sample(rows, min(per_skill, len(rows))):
            found.append(turn(book, name, rng, row, form="held_out"))
    for _ in range(per_skill):
        turns, expect = story_chat(book, rng)
        found.append(Turn("story", turns[0][0], turns[0][1], expect))
    return found


def correct(answer: str, expect: tuple[str, ...] | list[str]) -> bool:
    """Say whether any accepted text occurs in the answer, upper and lower case alike."""
    return any(text.lower() in answer.lower() for text in expect)


def plain(prompt: str) -> str:
    """Reduce a prompt to its words, so that two prompts can be compared."""
    return " ".join(re.sub(r"[^\w\s]", " ", prompt.lower()).split())


def brand_voice(book: Book, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Make the brand-voice dataset: file name -> rows. No held-out prompt is also a training prompt."""
    rng, voice = Random(seed), tomllib.loads((HERE / "voice.toml").read_text("utf-8"))

    def spoken(answer: str) -> str:
        return f"{rng.choice(voice['openings'])} {answer} {voice['farewell']}"

    train: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    singles: list[tuple[str, str]] = []
    for name, skill in book.skills.items():
        rows = rng.sample(range(len(skill["rows"])), min(len(skill["rows"]), 12))
        kept = rows[: voice["train_per_skill"]] if len(rows) > 4 else rows
        for row in (kept * voice["train_per_skill"])[: voice["train_per_skill"]]:
            made = turn(book, name, rng, row)
            singles.append((casual(made.question, rng), spoken(made.answer)))
        for row in [row for row in rows if row not in kept][: voice["held_out_per_skill"]]:
            made = turn(book, name, rng, row)
            later.append({"messages": _messages([(made.question, spoken(made.answer))])})
    for _ in range(voice["chats"] // 2):
        story, _expect = story_chat(book, rng)
        train.append({"messages": _messages([(question, spoken(answer)) for question, answer in story])})
    for house in voice["house"]:
        singles += [(question, spoken(house["answer"])) for question in house["ask"]]
        later += [{"messages": _messages([(q, spoken(house["answer"]))])} for q in house["held_out"]]
    for question, answer in singles:
        system = rng.choice(voice["systems"]) if rng.random() < 0.1 else ""
        train.append({"messages": _messages([(question, answer)], system)})
    for _ in range(voice["chats"]):
        train.append({"messages": _messages(rng.sample(singles, rng.choice((2, 3))))})
    rng.shuffle(train)
    used = {plain(m["content"]) for row in train for m in row["messages"] if m["role"] == "user"}
    later = [row for row in later if plain(row["messages"][0]["content"]) not in used]
    general = [t for t in held_out(book, seed, 2) if plain(t.question) not in used]
    return {
        "brand_voice_train.jsonl": train,
        "brand_voice_heldout.jsonl": later,
        "general_prompts.jsonl": [
            {"prompt": t.question, "expect": list(t.expect), "skill": t.skill}
            for t in {plain(t.question): t for t in general}.values()
        ],
    }


def main() -> None:
    """Write the brand-voice files, or show some documents of the corpus."""
    parser = argparse.ArgumentParser(description="The text of the starter model.")
    parser.add_argument(
        "--brand-voice", type=Path, metavar="DIR", help="write the brand-voice files to this folder"
    )
    parser.add_argument("--show", type=int, metavar="COUNT", help="print this many documents of the corpus")
    parser.add_argument("--seed", type=int, default=7, help="the seed of the shipped files is 7")
    given = parser.parse_args()
    book = load()
    for document in itertools.islice(documents(book, given.seed, 0.1), given.show or 0):
        print(json.dumps(document, ensure_ascii=False))
    if given.brand_voice:
        for name, rows in brand_voice(book, given.seed).items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (given.brand_voice / name).write_text("".join(lines), "utf-8")
        voice = tomllib.loads((HERE / "voice.toml").read_text("utf-8"))
        told = [
            f"{key} = {json.dumps(voice[key])}\n"
            for key in ("name", "description", "rule", "opening", "closing")
        ]
        (given.brand_voice / "brand_voice.toml").write_text("".join(told), "utf-8")


if __name__ == "__main__":
    main()
