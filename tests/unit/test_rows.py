"""Any data file becomes rows, any form of row a conversation; broken input is named by file, row and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import DataError
from advisor.rows import RowProblem, data_files, detect_format, infer_mapping, read_rows, to_messages

PAIRS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}, é 你好."} for i in range(3)]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FILES = {
    "jsonl": ("a.jsonl", _lines(PAIRS), "jsonl"),
    "blank lines": ("a.jsonl", _lines(PAIRS).replace("\n", "\n\n"), "jsonl"),
    "no last newline": ("a.jsonl", _lines(PAIRS).rstrip(), "jsonl"),
    "windows lines": ("a.jsonl", _lines(PAIRS).replace("\n", "\r\n"), "jsonl"),
    "lines named json": ("a.json", _lines(PAIRS), "jsonl"),
    "list": ("a.json", json.dumps(PAIRS), "json"),
    "indented list": ("a.json", json.dumps(PAIRS, indent=2, ensure_ascii=False), "json"),
    "list named jsonl": ("a.jsonl", json.dumps(PAIRS), "json"),
    "lines named txt": ("a.txt", _lines(PAIRS), "jsonl"),
    "list named csv": ("a.csv", json.dumps(PAIRS), "json"),
    "bom jsonl": ("a.jsonl", b"\xef\xbb\xbf" + _lines(PAIRS).encode(), "jsonl"),
    "bom list": ("a.json", b"\xef\xbb\xbf" + json.dumps(PAIRS).encode(), "json"),
    "bom csv": ("a.csv", b"\xef\xbb\xbf" + _csv(PAIRS).encode(), "csv"),
    "csv": ("a.csv", _csv(PAIRS), "csv"),
    "semicolons": ("a.csv", _csv(PAIRS, ";"), "csv"),
    "tsv": ("a.tsv", _csv(PAIRS, "\t"), "tsv"),
    "csv without a name": ("data", _csv(PAIRS), "csv"),
    "gzip jsonl": ("a.jsonl.gz", gzip.compress(_lines(PAIRS).encode()), "jsonl"),
    "gzip csv": ("a.csv.gz", gzip.compress(_csv(PAIRS).encode()), "csv"),
    "gzip without a name": ("a.jsonl", gzip.compress(json.dumps(PAIRS).encode()), "json"),
}


@pytest.mark.parametrize(("name", "content", "expected"), FILES.values(), ids=FILES)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    """The content decides the format, the name only where the content does not; rows are numbered from 1."""
    path = _write(tmp_path / name, content)
    assert detect_format(path) == expected
    assert list(read_rows(path)) == list(enumerate(PAIRS, 1))


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    """Parquet is recognised by its content and read batch by batch."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.bin"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    assert detect_format(path) == "parquet"
    assert list(read_rows(path)) == list(enumerate(PAIRS, 1))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged Parquet"):
        list(read_rows(path))


def test_plain_text_becomes_paragraphs(tmp_path: Path) -> None:
    """Paragraphs are joined until a row holds connected text; nothing is lost."""
    paragraphs = [f"Paragraph {i}. " + "word " * 150 for i in range(20)]
    path = _write(tmp_path / "book.txt", "\n\n".join(paragraphs))
    rows = [str(row["text"]) for _, row in read_rows(path)]
    assert detect_format(path) == "text"
    assert 1 < len(rows) < 20
    assert " ".join(rows).split() == " ".join(paragraphs).split()


BAD: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("a.jsonl", b"", r"is empty \(0 bytes\)", "at least one row"),
    "blank": ("a.jsonl", b" \n\n", "is empty", "at least one row"),
    "empty list": ("a.json", b"[]", "holds no rows", "at least one row"),
    "header only": ("a.csv", b"prompt,completion\n", "holds no rows", "at least one row"),
    "broken line": (
        "a.jsonl",
        _lines(PAIRS).encode() + b'{"prompt": "x", "completion": \n',
        r"row 4 \(line 4\): not valid JSON.*'\{\"prompt\": \"x\"",
        "sed -n 4p",
    ),
    "broken first line": ("a.jsonl", b'{"prompt": }\n', r"row 1 \(line 1\)", "sed -n 1p"),
    "pretty printed": ("a.jsonl", b'{\n  "prompt": "x"\n}\n', "not one JSON object a line", "jq -c ."),
    "not a number": ("a.jsonl", b'{"prompt": NaN}\n', r"row 1 \(line 1\): not valid JSON", "sed -n 1p"),
    "line is a list": (
        "a.jsonl",
        _lines(PAIRS).encode() + b"[1]\n",
        r"row 4 \(line 4\).*must be an object",
        "text",
    ),
    "broken list": (
        "a.json",
        json.dumps(PAIRS, indent=1).replace('"Answer 1', "Answer 1").encode(),
        r"row \d \(line \d+\): not valid JSON",
        "sed -n",
    ),
    "comma missing in list": (
        "a.json",
        json.dumps(PAIRS, indent=1).replace('1?",', '1?"').encode(),
        r"row 2 \(line [78]\): not valid JSON",
        "sed -n",
    ),
    "list cut off": (
        "a.json",
        json.dumps(PAIRS, indent=1)[:-30].encode(),
        r"ends inside row 3.*line 10",
        "cut off",
    ),
    "list of texts": ("a.json", b'[\n"one",\n"two"]', r"row 1 \(line 2\).*must be an object.*one", r"\[\{"),
    "list of lists": ("a.json", b'[{"text": "a"},\n["b"]]', r"row 2 \(line 2\).*must be an object", r"\[\{"),
    "two lists": (
        "a.json",
        b'[{"text": "a"}]\n[{"text": "b"}]',
        "ends after row 1, but the file goes on",
        "joined",
    ),
    "latin-1": (
        "a.jsonl",
        _lines(PAIRS).split("你")[0].encode("latin-1"),
        r"line 1, is not UTF-8",
        "iconv -f ISO-8859-1 -t UTF-8",
    ),
    "latin-1 late": (
        "a.jsonl",
        _lines([{"text": "x" * 90}] * 1000).encode() + '{"text": "é"}\n'.encode("latin-1"),
        r"line 1001, is not UTF-8",
        "iconv -f ISO-8859-1 -t UTF-8 '.*a.jsonl' > '.*a.utf8.jsonl'",
    ),
    "latin-1 late csv": (
        "a.csv",
        b"prompt,completion\n" + b"a,b\n" * 30000 + "a,é\n".encode("latin-1"),
        r"line 30002, is not UTF-8",
        "iconv -f ISO-8859-1",
    ),
    "latin-1 text": ("a.txt", "caf\xe9\n".encode("latin-1"), r"line 1, is not UTF-8", "iconv -f ISO-8859-1"),
    "windows-1252": (
        "a.csv",
        "prompt,completion\nx,\u201cyes\u201d\n".encode("cp1252"),
        "not UTF-8",
        "iconv -f WINDOWS-1252",
    ),
    "utf-16": ("a.jsonl", _lines(PAIRS).encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t UTF-8"),
    "utf-16 without bom": (
        "a.jsonl",
        _lines(PAIRS[:1]).replace("你好", "").encode("utf-16-le"),
        "UTF-16",
        "iconv -f UTF-16LE",
    ),
    "ragged csv": (
        "a.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        r"row 2 \(line 3\): 3 cells.*2 columns",
        "quotes",
    ),
    "open quote": ("a.csv", b'prompt,completion\na,"b\nc,d\n', r"row 1 \(line 3\)", "doubled"),
    "column twice": ("a.csv", b"prompt,prompt\na,b\n", "'prompt' twice", "own name"),
    "nameless column": ("a.csv", b"prompt,\na,b\n", "without a name", "own name"),
    "not json": ("a.json", b"prompt: hello\n", r"line 1: not JSON: 'prompt: hello'", "name the file"),
    "unknown format": ("a.xml", b"<rows></rows>", r"\.xml is not a format", "json, jsonl, csv"),
    "gguf": ("a.gguf", b"GGUF\3\0\0\0", "GGUF model", "--model"),
    "safetensors": (
        "a.jsonl",
        (20).to_bytes(8, "little") + b'{"__metadata__": {} }',
        "safetensors",
        "--model",
    ),
    "pickle": ("a.pkl", b"\x80\x04\x95", "pickle", "JSON lines"),
    "zip": ("a.zip", b"PK\x03\x04rest", "zip", "unzip"),
    "pdf": ("a.pdf", b"%PDF-1.7", "PDF", "pdftotext"),
    "binary": ("a.jsonl", bytes(range(256)) * 4, "binary", "json, jsonl, csv"),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(_lines(PAIRS).encode())[:-12],
        "damaged gzip",
        "gzip --test",
    ),
}


@pytest.mark.parametrize(("name", "content", "message", "remedy"), BAD.values(), ids=BAD)
def test_bad_file_is_named_with_its_remedy(
    tmp_path: Path, name: str, content: bytes, message: str, remedy: str
) -> None:
    """An error says which file, which row and line, quotes it, and gives the next step."""
    path = _write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.match(message)
    assert str(path) in caught.value.message
    assert re.search(remedy, caught.value.remedy), caught.value.remedy


def test_iconv_line_mends_the_file(tmp_path: Path) -> None:
    """The command in the error is exact: after running it the rows can be read."""
    path = _write(tmp_path / "a.jsonl", json.dumps({"text": "café"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        detect_format(path)
    subprocess.run(caught.value.remedy, shell=True, check=True)
    assert list(read_rows(tmp_path / "a.utf8.jsonl")) == [(1, {"text": "café"})]


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    """A mistyped name is answered with the nearest file."""
    _write(tmp_path / "train.jsonl", _lines(PAIRS))
    with pytest.raises(DataError, match=r"Did you mean .*train\.jsonl"):
        list(read_rows(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        list(read_rows(tmp_path / "nowhere" / "a.jsonl"))


def test_folder_gives_the_training_files(tmp_path: Path) -> None:
    """A folder's data files are read in order of name; read-me files and held-out splits are not."""
    for name, rows in (("b.jsonl", PAIRS[1:]), ("a.jsonl", PAIRS[:1])):
        _write(tmp_path / name, _lines(rows))
    _write(tmp_path / "README.md", "# about")
    _write(tmp_path / "dataset_infos.json", "{}")
    (tmp_path / ".cache").mkdir()
    _write(tmp_path / ".cache" / "c.jsonl", "broken")
    assert list(read_rows(tmp_path)) == list(enumerate(PAIRS, 1))
    (tmp_path / "data").mkdir()
    _write(tmp_path / "data" / "test-00000-of-00001.jsonl", "broken")
    train = _write(tmp_path / "data" / "train-00000-of-00001.jsonl", _lines(PAIRS[:1]))
    assert data_files(tmp_path) == [train]


def test_folder_without_data_says_what_it_looked_for(tmp_path: Path) -> None:
    """An empty folder and one that datasets' save_to_disk wrote are told apart."""
    with pytest.raises(DataError, match="holds no data file"):
        list(read_rows(tmp_path))
    _write(tmp_path / "state.json", "{}")
    with pytest.raises(DataError, match="save_to_disk"):
        list(read_rows(tmp_path))


def test_a_list_is_read_in_constant_memory(tmp_path: Path) -> None:
    """Reading a JSON list holds one row and a buffer, not the file."""
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(12000):
            file.write(("," if i else "") + json.dumps({"text": 'word [{ \\" ' * 100, "id": i}))
        file.write("]")
    size = path.stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12000
    assert peak < size / 2


TEXTS = st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=30)
VALUES = TEXTS | st.lists(TEXTS, max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=4),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
def test_any_list_of_objects_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    """Whatever the texts hold - quotes, brackets, backslashes - the list is cut where its objects end."""
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert list(read_rows(path)) == list(enumerate(rows, 1))


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "instruction", {"messages": [USER, ANSWER]}),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a"},
        "instruction",
        {"messages": [{"role": "user", "content": "q\nx"}, ANSWER]},
    ),
    "alpaca with history": (
        {"instruction": "q", "output": "a", "system": "s", "history": [["h", "i"]]},
        "instruction",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "h"},
                {"role": "assistant", "content": "i"},
                USER,
                ANSWER,
            ]
        },
    ),
    "input and output": ({"input": "q", "output": "a"}, "prompt_completion", {"messages": [USER, ANSWER]}),
    "prompt and completion": (
        {"prompt": "q", "completion": "a"},
        "prompt_completion",
        {"messages": [USER, ANSWER]},
    ),
    "capital letters": ({"Question": "q", "Answer": "a"}, "qa", {"messages": [USER, ANSWER]}),
    "openai chat": ({"messages": [USER, ANSWER]}, "chat", {"messages": [USER, ANSWER]}),
    "chat as text": ({"messages": json.dumps([USER, ANSWER])}, "chat", {"messages": [USER, ANSWER]}),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        "chat",
        {"messages": [USER, ANSWER]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "chat",
        {"messages": [USER, ANSWER]},
    ),
    "sharegpt calls": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f"}]',
        },
        "tool_calling",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": [{"name": "f"}],
        },
    ),
    "openai calls": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                ANSWER,
            ]
        },
        "tool_calling",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "1"}
                    ],
                },
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                ANSWER,
            ]
        },
    ),
    "thoughts in tags": (
        {"prompt": "q", "completion": "<think>t</think>a"},
        "reasoning_chat",
        {"messages": [USER, {"role": "assistant", "content": "<think>t</think>a"}]},
    ),
    "thoughts in a column": (
        {"question": "q", "reasoning": "t", "answer": "a"},
        "reasoning_chat",
        {"messages": [USER, {"role": "assistant", "content": "<think>\nt\n</think>\n\na"}]},
    ),
    "preference texts": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "preference messages": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "preference sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "preference whole": (
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "preference whole beside its prompt": (
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "preference transcripts": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "preference",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    "marked answers": (
        {"prompt": "q", "completion": "a", "label": False},
        "unpaired_preference",
        {"prompt": [USER], "completion": [ANSWER], "label": False},
    ),
    "marked answers in a table": (
        {"prompt": "q", "completion": "a", "label": "True"},
        "unpaired_preference",
        {"prompt": [USER], "completion": [ANSWER], "label": True},
    ),
    "marked chat": (
        {"messages": [USER, ANSWER], "label": True},
        "unpaired_preference",
        {"prompt": [USER], "completion": [ANSWER], "label": True},
    ),
    "classes": (
        {"text": "q", "label": "spam"},
        "classification",
        {"text": "q", "label": "spam", "messages": [USER, {"role": "assistant", "content": "spam"}]},
    ),
    "text": ({"text": "some text"}, "raw_text", {"text": "some text"}),
    "prompts": ({"prompt": "q"}, "prompts", {"prompt": [USER]}),
    "prompt messages": ({"prompt": [USER]}, "prompts", {"prompt": [USER]}),
    "chat with solutions": (
        {"messages": [USER], "solution": "4"},
        "prompts_with_answers",
        {"prompt": [USER], "reference": "4"},
    ),
    "grade school": (
        {"question": "q", "answer": "2 + 2 = 4\n#### 4"},
        "prompts_with_answers",
        {
            "prompt": [USER],
            "reference": "4",
            "messages": [USER, {"role": "assistant", "content": "2 + 2 = 4\n#### 4"}],
        },
    ),
    "solutions": (
        {"problem": "q", "solution": "4"},
        "prompts_with_answers",
        {"prompt": [USER], "reference": "4"},
    ),
}


@pytest.mark.parametrize(("row", "kind", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_becomes_a_conversation(row: dict[str, Any], kind: str, expected: dict[str, Any]) -> None:
    """The kind is recognised from the columns, and the row says the same whatever form it came in."""
    found, mapping = infer_mapping([{"id": 1, **row}])
    said = to_messages(row, found, mapping)
    assert found == kind
    filled = {
        name: value
        for name in said.__struct_fields__
        if (value := getattr(said, name)) is not None and value != []
    }
    assert filled == expected


MISSING = {
    "alpaca without output": ({"instruction": "q", "input": ""}, "output"),
    "output alone": ({"output": "a"}, "instruction"),
    "no rejected": ({"prompt": "q", "chosen": "a"}, "rejected"),
    "no chosen": ({"prompt": "q", "rejected": "a"}, "chosen"),
    "marks without answers": ({"prompt": "q", "label": True}, "output"),
}


def test_line_is_exact_far_into_a_list(tmp_path: Path) -> None:
    """Line numbers hold across the pieces in which a large list is read."""
    rows = [json.dumps({"text": f"row {i} " * 90}) for i in range(1, 4001)]
    rows[3499] = '{"text": oops}'
    path = _write(tmp_path / "a.json", "[\n" + ",\n".join(rows) + "\n]")
    assert path.stat().st_size > 3 << 20
    with pytest.raises(DataError, match=r"row 3500 \(line 3501\): not valid JSON.*oops"):
        list(read_rows(path))


def test_rows_one_level_deeper_are_found() -> None:
    """A file that wraps its rows in one object is answered with the command that unwraps them."""
    with pytest.raises(DataError, match="the rows lie under 'data'") as caught:
        infer_mapping([{"version": 1, "data": [{"text": "a"}]}], where="a.json")
    assert caught.value.remedy.startswith("jq -c '.data[]' 'a.json'")
    with pytest.raises(DataError, match="messages does not hold a list of turns"):
        infer_mapping([{"messages": "hello"}])


def test_a_very_long_row_takes_linear_time(tmp_path: Path) -> None:
    """A list whose one text is megabytes long is read without scanning it again and again."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 20_000_000}, {"text": "y"}]))
    began = time.process_time()
    assert [len(str(row["text"])) for _, row in read_rows(path)] == [20_000_000, 1]
    assert time.process_time() - began < 3


@pytest.mark.parametrize(("row", "missing"), MISSING.values(), ids=MISSING)
def test_missing_column_is_named(row: dict[str, Any], missing: str) -> None:
    """One column missing: the error names the columns found, the missing one, and every accepted form."""
    with pytest.raises(DataError, match=f"missing: {missing}") as caught:
        infer_mapping([row], where="a.jsonl")
    assert all(column in caught.value.message for column in row)
    assert "a.jsonl" in caught.value.message
    assert all(form in caught.value.remedy for form in ("Alpaca", "chat", "preference", "text"))
    assert caught.value.code == "missing_column"


def test_unknown_columns_are_listed() -> None:
    """Columns of which none is known are listed beside the accepted forms."""
    with pytest.raises(DataError, match=r"the columns are alpha, beta; none of them is known"):
        infer_mapping([{"alpha": "x", "beta": "y"}])


PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no assistant": ({"messages": [USER, ANSWER]}, {"messages": [USER]}, "no_assistant_turn"),
    "empty answer": (
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {**ANSWER, "content": " "}]},
        "empty_answer",
    ),
    "empty output": ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}, "empty_answer"),
    "null output": (
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": None},
        "empty_answer",
    ),
    "empty prompt": ({"instruction": "q", "output": "a"}, {"instruction": " ", "output": "a"}, "no_prompt"),
    "unknown role": (
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "role": "cat"}, ANSWER]},
        "unknown_role",
    ),
    "no role": ({"messages": [USER, ANSWER]}, {"messages": [{"content": "q"}, ANSWER]}, "unknown_role"),
    "number": (
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "content": 3}, ANSWER]},
        "content_not_text",
    ),
    "picture": (
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]},
        "content_not_text",
    ),
    "not turns": ({"messages": [USER, ANSWER]}, {"messages": "hello"}, "not_a_conversation"),
    "same answers": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        "same_answers",
    ),
    "bad mark": (
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "a", "label": "perhaps"},
        "bad_label",
    ),
    "bad call": (
        {"messages": [USER, ANSWER, {"role": "function_call", "content": "{}"}]},
        {"messages": [USER, {"role": "function_call", "content": "{"}]},
        "bad_tool_call",
    ),
    "blank text": ({"text": "x"}, {"text": "  "}, "empty_text"),
    "answer is a list": (
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ["a"]},
        "content_not_text",
    ),
}


@pytest.mark.parametrize(("good", "bad", "code"), PROBLEMS.values(), ids=PROBLEMS)
def test_unusable_row_has_a_code(good: dict[str, Any], bad: dict[str, Any], code: str) -> None:
    """What makes a row unusable is told by a stable code."""
    try:
        kind, mapping = infer_mapping([good])
    except RowProblem as problem:
        pytest.fail(str(problem))
    with pytest.raises(RowProblem) as caught:
        to_messages(bad, kind, mapping)
    assert caught.value.code == code


@pytest.mark.parametrize(("row", "kind", "expected"), FORMS.values(), ids=FORMS)
def test_mapping_without_its_columns_is_a_problem_of_the_row(
    row: dict[str, Any], kind: Any, expected: dict[str, Any]
) -> None:
    """A recipe whose mapping was emptied by hand is refused row by row, without a crash."""
    with pytest.raises(RowProblem):
        to_messages(row, kind, {})


def test_rows_load_no_heavy_library() -> None:
    """Reading rows needs neither torch nor numpy nor datasets nor pyarrow."""
    code = (
        "import sys, advisor.rows, advisor.templates;"
        "heavy = {'torch', 'numpy', 'datasets', 'pyarrow', 'transformers'};"
        "print({m.split('.')[0] for m in sys.modules} & heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
