"""A dataset's profile says what it holds and what is wrong with it, by row."""

from __future__ import annotations

import hashlib
import json
import statistics
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from advisor.errors import DataError, ModelError
from advisor.probe.dataset import profile_dataset
from advisor.probe.languages import language_of
from advisor.probe.scan import Scan
from advisor.types import DatasetProfile, Finding
from tiny import CHATML, make_tiny_model

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)


def _pair(i: int, **changes: str) -> dict[str, str]:
    row = {"prompt": f"How many apples are in basket {i}?", "completion": f"There are {i} apples in it."}
    return {**row, **changes}


def _chat(*turns: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _found(profile: DatasetProfile, code: str) -> list[Finding]:
    return [finding for finding in profile.findings if finding.code == code]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, for its tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_clean_data_has_no_findings(tmp_path: Path) -> None:
    """The plain facts of a clean file, and nothing to complain of."""
    source = _write(tmp_path / "apples.jsonl", [_pair(i) for i in range(200)])
    profile = profile_dataset(source)
    assert (profile.name, profile.kind, profile.rows, profile.format) == (
        "apples",
        "prompt_completion",
        200,
        "jsonl",
    )
    assert profile.sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert profile.bytes == Path(source).stat().st_size
    assert profile.path == source
    assert (profile.columns, profile.mapping) == (
        ("prompt", "completion"),
        {"prompt": "prompt", "answer": "completion"},
    )
    assert profile.languages == ("en",)
    assert profile.findings == ()
    assert profile.duplicate_fraction == 0
    assert not profile.tokens_measured


def test_tokens_are_those_that_training_sees(tmp_path: Path, tiny: Path) -> None:
    """With the model's tokenizer and template, lengths and answer tokens are exact."""
    rows = [_chat(f"Question {i}?" * (i % 7 + 1), "Answer. " * (i % 5 + 1)) for i in range(60)]
    file = tiny / "tokenizer.json"
    profile = profile_dataset(_write(tmp_path / "a.jsonl", rows), tokenizer_file=file, chat_template=CHATML)
    tokenizer = Tokenizer.from_file(str(file))
    totals, answers = [], []
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        said = f"{answer}<|im_end|>"
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{said}\n"
        totals.append(len(tokenizer.encode(text).ids))
        answers.append(len(tokenizer.encode(said).ids))
    assert profile.tokens_measured
    assert profile.mean_tokens == round(statistics.mean(totals), 1)
    assert profile.p50_tokens == sorted(totals)[29]
    assert profile.p95_tokens == sorted(totals)[56]
    assert profile.max_tokens == max(totals)
    assert profile.mean_supervised_tokens == round(statistics.mean(answers), 1)
    assert profile.lengths is not None
    assert sum(profile.lengths.counts) == 60
    assert profile.lengths.edges[-1] == max(totals)


def test_sample_is_spread_and_the_longest_row_counts(tmp_path: Path) -> None:
    """Token figures come from an even sample, the same each time; the longest row is always measured."""
    rows = [_pair(i, completion="word " * (i // 10 + 1)) for i in range(3000)]
    rows[1234]["completion"] = "word " * 9000
    source = _write(tmp_path / "a.jsonl", rows)
    profile = profile_dataset(source, sample_rows=100)
    assert profile == profile_dataset(source, sample_rows=100)
    assert profile.lengths is not None
    assert sum(profile.lengths.counts) == 100
    assert profile.max_tokens is not None
    assert profile.max_tokens > 9000
    whole = profile_dataset(source, sample_rows=5000)
    assert whole.p50_tokens == pytest.approx(profile.p50_tokens, rel=0.05)


@pytest.mark.parametrize("rows", [99, 100, 101, 199, 200, 250, 2999, 5000])
def test_sample_is_even_for_any_number_of_rows(rows: int) -> None:
    """However many rows there are, the sample begins at the first, ends near the last and has no gaps."""
    scan = Scan("raw_text", {"text": "text"}, sample_rows=100)
    for number in range(1, rows + 1):
        scan.add(number, {"text": f"text {number}"})
    numbers = [number for number, _ in scan.spread()]
    assert len(numbers) == min(rows, 100)
    gaps = [after - before for before, after in pairwise([0, *numbers, rows + 1])]
    assert max(gaps) <= 2 * rows / len(numbers) + 1


def test_five_rows_work_and_say_so(tmp_path: Path) -> None:
    """A handful of rows is profiled like any other, with a word about their number."""
    profile = profile_dataset(_write(tmp_path / "a.jsonl", [_pair(i) for i in range(5)]))
    assert profile.rows == 5
    assert [finding.code for finding in profile.findings] == ["few_rows"]
    assert "5 rows" in profile.findings[0].message


PLACEHOLDERS = {
    "double braces": ("I am {{name}}, made by {{ author }}.", "{{name}}"),
    "braces": ("Dear {customer_name}, welcome.", "{customer_name}"),
    "capitals": ("Yours, [NAME]", "[NAME]"),
    "your": ("Yours, [Your Name]", "[Your Name]"),
    "angle": ("Call <your phone number> now.", "<your phone number>"),
}


@pytest.mark.parametrize(("text", "shown"), PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_unfilled_placeholder_is_reported_with_its_rows(tmp_path: Path, text: str, shown: str) -> None:
    """Each style of placeholder is found, counted and shown with row numbers."""
    rows = [_pair(i) for i in range(60)]
    rows[6]["completion"] = rows[40]["prompt"] = text
    (found,) = _found(profile_dataset(_write(tmp_path / "a.jsonl", rows)), "unfilled_placeholders")
    assert (found.count, found.examples) == (2, ("row 7", "row 41"))
    assert shown in found.message


INNOCENT = [
    "print(f'{x}') and {'a': 1}, {1, 2}, a[0], x[I]",
    r"\frac{alpha}{beta} and \text{sum} and ${HOME}",
    "[1] A note, [sic], [INST] [TODO] a<b and <b>bold</b>",
    "function f() { return {} }",
]


@pytest.mark.parametrize("text", INNOCENT)
def test_code_and_formulas_are_no_placeholders(tmp_path: Path, text: str) -> None:
    """Braces and brackets of code, LaTeX and notes raise no alarm."""
    profile = profile_dataset(
        _write(tmp_path / "a.jsonl", [_pair(i, completion=f"{i} {text}") for i in range(60)])
    )
    assert _found(profile, "unfilled_placeholders") == []


def _spoilt(rows: list[Any], *bad: Any) -> list[Any]:
    return [*rows[:9], *bad, *rows[9:]]


PAIRS = [_pair(i) for i in range(60)]
CHATS = [_chat(f"Question {i}?", f"Answer {i}.") for i in range(60)]
DEFECTS: dict[str, tuple[list[Any], str, str, tuple[str, ...]]] = {
    "empty answer": (_spoilt(PAIRS, _pair(0, completion="")), "empty_answer", "warning", ("row 10",)),
    "no assistant": (_spoilt(CHATS, _chat("Hello?")), "no_assistant_turn", "warning", ("row 10",)),
    "unknown role": (
        _spoilt(CHATS, {"messages": [{"role": "cat", "content": "meow"}]}),
        "unknown_role",
        "warning",
        ("row 10",),
    ),
    "duplicate": (_spoilt(PAIRS, _pair(0), _pair(1)), "duplicates", "warning", ("row 10", "row 11")),
    "answer is the prompt": (
        _spoilt(PAIRS, _pair(0, completion=PAIRS[0]["prompt"])),
        "answer_repeats_prompt",
        "warning",
        ("row 10",),
    ),
    "wrong encoding": (
        _spoilt(PAIRS, _pair(0, completion="cafÃ© noir")),
        "damaged_characters",
        "warning",
        ("row 10",),
    ),
    "long row": (_spoilt(PAIRS, _pair(0, completion="word " * 30000)), "long_rows", "info", ("row 10",)),
    "applied template": (
        _spoilt(PAIRS, _pair(0, prompt="<|im_start|>user\nHi<|im_end|>")),
        "rendered_template",
        "warning",
        ("row 10",),
    ),
    "two user turns": (
        _spoilt(CHATS, {"messages": [*_chat("a")["messages"], *_chat("b", "c")["messages"]]}),
        "consecutive_turns",
        "info",
        ("row 10",),
    ),
}


@pytest.mark.parametrize(("rows", "code", "severity", "examples"), DEFECTS.values(), ids=DEFECTS)
def test_defect_is_reported_with_its_row(
    tmp_path: Path, rows: list[Any], code: str, severity: str, examples: tuple[str, ...]
) -> None:
    """A defect of a single row is found wherever it stands, and nothing else is."""
    profile = profile_dataset(_write(tmp_path / "a.jsonl", rows))
    assert [finding.code for finding in profile.findings] == [code]
    assert profile.findings[0].severity == severity
    assert profile.findings[0].examples == examples
    assert profile.findings[0].remedy


def test_rows_that_the_template_refuses_are_reported(tmp_path: Path, tiny: Path) -> None:
    """What the model's own template refuses is found by rendering, before training."""
    rows = _spoilt(CHATS, {"messages": [*_chat("a")["messages"], *_chat("b", "c")["messages"]]})
    profile = profile_dataset(
        _write(tmp_path / "a.jsonl", rows), tokenizer_file=tiny / "tokenizer.json", chat_template=ALTERNATING
    )
    assert {finding.code: finding.severity for finding in profile.findings} == {
        "consecutive_turns": "warning",
        "template_refuses": "warning",
    }
    assert _found(profile, "template_refuses")[0].examples == ("row 10",)


HOPELESS = {
    "no assistant turn": (
        [_chat("Hello?"), _chat("Anyone?")],
        r"2 rows of 2 cannot be used: no turn is the assistant's.*row 1, row 2",
    ),
    "empty turns": ([_chat("a", ""), _chat("b", " ")], r"2 rows of 2 cannot be used: an answer is empty"),
    "empty outputs": ([_pair(i, completion="") for i in range(50)], r"50 rows of 50 .*row 1, row 2"),
    "unknown roles": (
        [{"messages": [{"role": "cat", "content": "meow"}]}],
        r"1 row of 1 cannot be used: the role 'cat' is not known",
    ),
}


@pytest.mark.parametrize(("rows", "message"), HOPELESS.values(), ids=HOPELESS)
def test_data_without_answers_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    """Where no row has an answer there is nothing to learn, and the error says why and where."""
    source = _write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        profile_dataset(source)
    assert caught.value.code == "nothing_to_learn"
    assert caught.value.remedy


def test_mixed_templates_are_noticed(tmp_path: Path) -> None:
    """Two templates in one file, or a template in some rows only, are a mixture."""
    chatml = [_pair(i, prompt=f"<|im_start|>user\n{i}<|im_end|>") for i in range(30)]
    llama = [_pair(i, prompt=f"[INST] {i} [/INST]") for i in range(30)]
    assert profile_dataset(_write(tmp_path / "a.jsonl", chatml + llama)).mixed_templates
    assert profile_dataset(_write(tmp_path / "b.jsonl", chatml + PAIRS)).mixed_templates
    assert not profile_dataset(_write(tmp_path / "c.jsonl", chatml)).mixed_templates
    assert not profile_dataset(_write(tmp_path / "d.jsonl", PAIRS)).mixed_templates


def test_specifics_of_each_kind(tmp_path: Path) -> None:
    """Classes, the share of wanted answers and the likeness of pairs are counted for their kinds."""
    classes = [{"text": f"text {i}", "label": f"class {i % 3}"} for i in range(60)]
    assert profile_dataset(_write(tmp_path / "a.jsonl", classes)).classes == 3
    marked = [{**_pair(i), "label": i % 4 > 0} for i in range(60)]
    assert profile_dataset(_write(tmp_path / "b.jsonl", marked)).positive_fraction == 0.75
    one = [{**_pair(i), "label": True} for i in range(60)]
    assert _found(profile_dataset(_write(tmp_path / "c.jsonl", one)), "one_class")[0].severity == "error"
    pairs = [{"prompt": str(i), "chosen": "a b c d", "rejected": "a b c x"} for i in range(60)]
    assert profile_dataset(_write(tmp_path / "d.jsonl", pairs)).pair_similarity == 0.75
    calls = [{"messages": [*_chat("q")["messages"], {"role": "function_call", "content": '{"name": "f"}'}]}]
    assert profile_dataset(_write(tmp_path / "e.jsonl", calls)).has_tools_column is False
    calls[0]["tools"] = [{"name": "f"}]
    assert profile_dataset(_write(tmp_path / "f.jsonl", calls)).has_tools_column is True


def test_text_file_and_folder_of_documents(tmp_path: Path) -> None:
    """A text file is raw text; a folder of texts and PDFs is documents, the PDFs by their size only."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The first document is about tea. " * 20)
    (folder / "b.md").write_text("The second one is about cake and tea. " * 20)
    assert profile_dataset(str(folder / "a.txt")).kind == "raw_text"
    profile = profile_dataset(str(folder))
    assert (profile.kind, profile.rows, profile.format) == ("documents", 2, "text")
    (folder / "c.pdf").write_bytes(b"%PDF-1.7 " + b"x" * 1000)
    profile = profile_dataset(str(folder))
    assert profile.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert _found(profile, "pdf_not_read")[0].examples == ("c.pdf",)
    (folder / "a.txt").unlink()
    (folder / "b.md").unlink()
    profile = profile_dataset(str(folder))
    assert (profile.kind, profile.rows, profile.bytes) == ("documents", 0, 1009)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Beyond one hash for each row, memory stays the same."""
    row = json.dumps(_pair(1, completion="word " * 400))
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(6000):
            file.write(row.replace("basket 1", f"basket {i}") + "\n")
    profile_dataset(_write(tmp_path / "warm.jsonl", PAIRS))
    tracemalloc.start()
    profile_dataset(str(path), sample_rows=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 12_000_000
    assert peak < 5_000_000


LANGUAGES = {
    "en": "What is the best way to make tea for your friends?",
    "fr": "Quelle est la meilleure façon de faire du thé pour vos amis dans une théière ?",
    "de": "Was ist die beste Art, für Freunde Tee zu kochen, und wie lange muss der Tee ziehen?",
    "es": "¿Cuál es la mejor manera de hacer el té para los amigos en una tetera?",
    "ru": "Как лучше всего заварить чай для друзей, и что для этого нужно?",
    "uk": "Як найкраще заварити чай для друзів і що для цього потрібно?",
    "zh": "给朋友泡茶最好的方法是什么？",
    "ja": "友達にお茶を入れる一番良い方法は何ですか？",
    "ko": "친구들을 위해 차를 끓이는 가장 좋은 방법은 무엇입니까?",
    "ar": "ما هي أفضل طريقة لإعداد الشاي من أجل الأصدقاء في هذا البيت؟",
    "hi": "दोस्तों के लिए चाय बनाने का सबसे अच्छा तरीका क्या है?",
}


@pytest.mark.parametrize(("language", "text"), LANGUAGES.items())
def test_language_is_recognised(language: str, text: str) -> None:
    """A sentence is enough to tell the common languages apart."""
    assert language_of(text) == language


@pytest.mark.parametrize(
    "text", ["A 3 to 4 ratio", "How do I do this?", "Hi! Do not do that.", "Set a timer to 5 to 10 minutes"]
)
def test_short_english_is_no_other_language(text: str) -> None:
    """Small words that other languages have as well do not make English texts Czech, Polish or Portuguese."""
    assert language_of(text) == "en"


def test_language_is_not_claimed_without_signs() -> None:
    """Numbers, code and single words have no language."""
    assert language_of("12 + 30 = 42") is None
    assert language_of("x = foo(bar)[0]") is None
    assert language_of("") is None


def test_bad_tokenizer_file_is_an_error_of_the_model(tmp_path: Path) -> None:
    """A tokenizer that cannot be read is named."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        profile_dataset(_write(tmp_path / "a.jsonl", PAIRS), tokenizer_file=tmp_path / "tokenizer.json")


def test_missing_file_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    """A path with the ending of a data file is a file, even where it has the form of a hub id."""
    with pytest.raises(DataError, match=r"There is no file data/train\.jsonl"):
        profile_dataset("data/train.jsonl")
