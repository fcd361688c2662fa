"""In which languages are the texts: a light guess by script and frequent words.

Goes in: texts. Comes out: ISO 639-1 codes, the most frequent first. Scripts and words are data:
kb/rules/languages.toml. Never does: claim a language for a text that gives too few signs.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable

from advisor.rows import rule_table

_WORD = re.compile(r"[^\W\d_]+")


def languages_of(texts: Iterable[str], *, least_share: float) -> tuple[str, ...]:
    """Return the languages that at least `least_share` of the texts are in, the most frequent first."""
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        if (language := language_of(text)) is not None:
            counts[language] += 1
            total += 1
    return tuple(language for language, count in counts.most_common() if count >= least_share * total)


def language_of(text: str) -> str | None:
    """Return the likely language of one text, or None."""
    text = text[: rule_table("languages")["limits"]["characters"]]
    script = "latin" if text.isascii() else _script(text)
    if script in _words():
        return _by_words(text, script)
    return script


def _script(text: str) -> str:
    counts = {name: len(pattern.findall(text)) for name, pattern in _scripts().items()}
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return "latin"
    # Japanese mixes its own letters with Chinese ones; a fair share of its own settles it
    if counts.get("ja", 0) * 5 >= counts.get("zh", 0) > 0:
        return "ja"
    name, count = max(counts.items(), key=lambda item: item[1])
    letters = sum(character.isalpha() for character in text)
    return name if count * 3 >= letters else "latin"


def _by_words(text: str, script: str) -> str | None:
    limits = rule_table("languages")["limits"]
    words = Counter(_WORD.findall(text.lower()))
    hits = {language: sum(words[word] for word in known) for language, known in _words()[script].items()}
    best = max(hits, key=lambda language: hits[language])
    total = sum(words.values())
    if hits[best] < limits["least_words"] or hits[best] < limits["least_share"] * total:
        return None
    return best


@functools.cache
def _scripts() -> dict[str, re.Pattern[str]]:
    tables = rule_table("languages")["scripts"]
    return {
        name: re.compile("[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges) + "]")
        for name, ranges in tables.items()
        if isinstance(ranges, list)
    }


@functools.cache
def _words() -> dict[str, dict[str, tuple[str, ...]]]:
    tables = rule_table("languages")["words"]
    return {
        script: {language: tuple(words) for language, words in table.items() if isinstance(words, list)}
        for script, table in tables.items()
    }
