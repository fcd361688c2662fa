"""The knowledge base loads, names its sources, and refuses what it does not know."""

from __future__ import annotations

import datetime
import functools
import re
import shutil
from pathlib import Path

import click
import pytest

from advisor import knowledge as module
from advisor.cli.main import COMMANDS, LazyGroup
from advisor.errors import KnowledgeError
from advisor.knowledge import Knowledge, read
from advisor.resources import kb_dir

KNOWN: Knowledge = read(kb_dir())
SECTIONS = {
    name: getattr(KNOWN, name) for name in Knowledge.__struct_fields__ if name not in ("rules", "programs")
}
FOLDERS = ("", "hardware", "models", "methods", "tuners")
FILES = [path for folder in FOLDERS for path in sorted((kb_dir() / folder).glob("*.toml"))]
ONE_EACH = list({path.name if path.parent == kb_dir() else path.parent: path for path in FILES}.values())
"""One file of each record type."""
KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SETTING = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+")

UNVERIFIED = {
    "sources": 11, "accelerators": 162, "models": 26, "objectives": 0, "tuners": 2, "quantisations": 1,
    "failures": 1, "topics": 8,
}  # fmt: skip
"""Entries from memory or second hand. The figures may fall; to raise one, verify something else first."""


def _entries(section: str) -> list[tuple[str, object]]:
    return list(SECTIONS[section].items())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the knowledge base that may be spoiled."""
    return Path(shutil.copytree(kb_dir(), tmp_path / "kb"))


def test_there_is_enough_of_everything() -> None:
    """The knowledge base covers the models, accelerators, methods and terms that people ask for."""
    assert len(KNOWN.models) >= 60
    assert len(KNOWN.accelerators) >= 75
    assert {card.vendor for card in KNOWN.accelerators.values()} == {"nvidia", "amd", "apple", "intel"}
    assert len(KNOWN.quantisations) >= 13
    assert len(KNOWN.warnings) >= 46
    assert len(KNOWN.failures) >= 20
    assert len(KNOWN.topics) >= 50


@pytest.mark.parametrize("section", UNVERIFIED)
def test_unverified_entries_only_become_fewer(section: str) -> None:
    """What was not read at its source is counted, and the count may only fall."""
    count = sum(not entry.verified for _, entry in _entries(section))  # type: ignore[attr-defined]
    assert count <= UNVERIFIED[section], f"{count} unverified entries in {section}"


@pytest.mark.parametrize("section", ["accelerators", "models", "quantisations", "failures", "topics"])
def test_a_doubtful_source_makes_a_doubtful_entry(section: str) -> None:
    """What rests on memory, a second hand or judgement alone is not called verified."""
    for key, entry in _entries(section):
        assert KNOWN.sources[entry.source].verified or not entry.verified, key  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ONE_EACH, ids=lambda path: path.name)
def test_an_unknown_key_names_file_and_key(path: Path, copy: Path) -> None:
    """A key that no record has fails with the file and the key in the message."""
    spoiled = copy / path.relative_to(kb_dir())
    text = spoiled.read_text(encoding="utf-8")
    one_table_a_file = path.parent.name in ("methods", "tuners")
    spoiled.write_text(f"surprise = 1\n{text}" if one_table_a_file else f"{text}\nsurprise = 1\n")
    with pytest.raises(KnowledgeError) as failure:
        read(copy)
    assert spoiled.name in failure.value.message
    assert "surprise" in failure.value.message


@pytest.mark.parametrize(
    "path", [path for path in ONE_EACH if path.name != "sources.toml"], ids=lambda p: p.name
)
def test_a_source_that_does_not_exist_is_refused(path: Path, copy: Path) -> None:
    """An entry whose source is not in sources.toml fails with that key in the message."""
    spoiled = copy / path.relative_to(kb_dir())
    text = spoiled.read_text(encoding="utf-8")
    spoiled.write_text(re.sub(r'^source = ".*"$', 'source = "nowhere-2020"', text, count=1, flags=re.M))
    with pytest.raises(KnowledgeError, match="nowhere-2020"):
        read(copy)


def test_a_source_named_by_a_rule_must_exist(copy: Path) -> None:
    """Rules name sources as well, and theirs are checked too."""
    rules = copy / "rules" / "choice.toml"
    rules.write_text('[tuner]\nsource = "nowhere-2020"\n')
    with pytest.raises(KnowledgeError, match="nowhere-2020"):
        read(copy)


@pytest.mark.parametrize(
    "content", [b"[half", b"\xff\xfe\x00", b'["no/fields"]\n'], ids=["broken", "binary", "no fields"]
)
def test_a_broken_file_is_named(content: bytes, copy: Path) -> None:
    """A file that is not TOML, not text or lacks fields fails by name, without a traceback of its parser."""
    spoiled = copy / "models" / "zzz.toml"
    spoiled.write_bytes(content)
    with pytest.raises(KnowledgeError, match=r"zzz\.toml"):
        read(copy)


def test_a_folder_of_ones_own_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """FTADVISOR_KB adds entries and replaces those of the same name; everything else stays."""
    own = tmp_path / "own"
    (own / "hardware").mkdir(parents=True)
    text = (
        '[{key}]\nname = "{name}"\nvendor = "nvidia"\nmemory_gib = 99\nbf16 = true\nflash_attention = true\n'
        'bitsandbytes = true\nsource = "judgement"\nchecked = "2026-11-25"\n'
    )
    tables = text.format(key="rtx-3060", name="Mine") + text.format(key="invented", name="Invented 1")
    (own / "hardware" / "own.toml").write_text(tables)
    monkeypatch.setenv("FTADVISOR_KB", str(own))
    request.addfinalizer(module.load.cache_clear)
    module.load.cache_clear()
    mine = module.load()
    assert mine.accelerators["rtx-3060"].memory_gib == 99
    assert mine.accelerators["invented"].name == "Invented 1"
    assert mine.accelerators["rtx-4090"] == KNOWN.accelerators["rtx-4090"]


@pytest.mark.parametrize("section", ["sources", "accelerators", "failures", "topics", "objectives", "tuners"])
def test_ids_are_plain(section: str) -> None:
    """Ids are kebab-case; tuners and settings keep the underscores of the contract."""
    for key, _ in _entries(section):
        underscores = section in ("topics", "tuners") and SETTING.fullmatch(key)
        assert KEBAB.fullmatch(key) or underscores, key


def test_every_entry_was_checked_on_a_day() -> None:
    """`checked` is a date."""
    for section in SECTIONS:
        for key, entry in _entries(section):
            day = entry.checked  # type: ignore[attr-defined]
            assert datetime.date.fromisoformat(day), f"{section} {key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_texts_hold_no_addresses(path: Path) -> None:
    """A source is named by its repository, paper or document, never by a web address that may go away."""
    assert "://" not in path.read_text(encoding="utf-8")


# --- warnings ------------------------------------------------------------------------------------

VERBS = [
    "Accept", "Add", "Build", "Cap", "Check", "Choose", "Close", "Collect", "Count", "Fetch", "Give", "Keep",
    "Leave", "Let", "Measure", "Mix", "Raise", "Read", "Remove", "Set", "Start", "Take", "Train", "Try",
    "Weight", "Write",
]  # fmt: skip
FIGURES = {
    "rows": 1,
    "model": "m",
    "needed_gib": 2,
    "available_gib": 3,
    "asked": "lora",
    "method_asked": "dpo",
    "shorter": 4,
    "needed": 5,
}


@functools.cache
def _options(command: str) -> frozenset[str]:
    found = LazyGroup(name="ftadvisor").get_command(click.Context(click.Command("ftadvisor")), command)
    return frozenset(name for parameter in found.params for name in parameter.opts)


@pytest.mark.parametrize("code", KNOWN.warnings)
def test_a_remedy_is_something_to_do(code: str) -> None:
    """A remedy begins with a verb, and its options are options of the command it names, or of plan."""
    remedy = KNOWN.warnings[code].remedy
    assert remedy.split()[0] in VERBS, remedy
    foreign = re.sub(r"(vLLM|llama\.cpp) --[a-z-]+", "", remedy)
    named = re.findall(r": ftadvisor ([a-z]+)|ftadvisor ([a-z]+) (?=[A-Z])", foreign)
    commands = {first or second for first, second in named}
    assert commands <= set(COMMANDS), remedy
    options = set(re.findall(r"--[a-z-]+", foreign))
    assert options <= {option for command in commands | {"plan"} for option in _options(command)}, remedy


def test_settings_in_remedies_are_explained() -> None:
    """What a remedy sets, and what it sends people to read about, can be explained."""
    for code, warning in KNOWN.warnings.items():
        for name in re.findall(r"--set (\w+)=", warning.remedy):
            assert name in KNOWN.topics, f"{code}: {name}"
        for model in re.findall(r"--model ([\w.-]+/[\w.-]+\w)", warning.remedy):
            assert KNOWN.models[model].commercial, f"{code}: {model}"


def test_warnings_hold_only_known_placeholders() -> None:
    """Texts can be completed from the words that the planner provides."""
    for code, warning in KNOWN.warnings.items():
        assert "{" not in (warning.message + warning.remedy).format_map(FIGURES), code


# --- quantisations -------------------------------------------------------------------------------


def test_fewer_bits_lose_more() -> None:
    """Down the list the files shrink, the losses grow and the smallest fitting model grows."""
    kinds = list(KNOWN.quantisations.values())
    for attribute, sign in (
        ("bits_per_weight", -1),
        ("perplexity_increase_percent", 1),
        ("small_model_log_ratio", 1),
        ("kl_mean", 1),
        ("minimum_parameters", 1),
    ):
        figures = [sign * value for kind in kinds if (value := getattr(kind, attribute)) is not None]
        assert figures == sorted(figures), attribute
        assert len(figures) >= 5, attribute


BY_NAME = {"closed_models", "gguf", "languages", "memory", "verify", "profile", "time", "tuners"}
"""Rule files with tables whose keys are names of things, looked up by value and never spelt in Python."""


def test_every_rule_is_read() -> None:
    """A figure that no program reads would be changed in vain: each key is spelt somewhere in Python."""
    package = Path(module.__file__).parent
    spelt = set(re.findall(r"\w+", "\n".join(file.read_text() for file in package.rglob("*.py"))))

    def unread(table: dict[str, object], path: str) -> list[str]:
        inner = [unread(value, f"{path}.{key}") for key, value in table.items() if isinstance(value, dict)]
        own = [
            f"{path}.{key}"
            for key, value in table.items()
            if not isinstance(value, dict) and key not in spelt
        ]
        return own + [name for names in inner for name in names]

    rules = {name: table for name, table in KNOWN.rules.items() if name not in BY_NAME}
    assert [key for name, table in rules.items() for key in unread(dict(table), name)] == []
