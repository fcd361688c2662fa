"""What is written is true: commands, lines, names, and nothing about where it was made."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from advisor import __version__
from advisor.cli.main import COMMANDS, LazyGroup
from advisor.resources import kb_dir, recipes_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.splitlines()  # fmt: skip


def _shell_lines(after: str) -> str:
    block = README.split(f"<!-- {after} -->")[1]
    return re.search(r"```sh\n(.*?)\n```", block, re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    """Each command stands in the README, and its own help begins as the overview says."""
    assert f"`ftadvisor {command}" in README
    assert LazyGroup(name="ftadvisor").get_command(None, command).help


@pytest.mark.parametrize("line", re.findall(r"^ftadvisor .*$", README, re.MULTILINE))
def test_options_in_the_readme_exist(line: str) -> None:
    """Every option that the README uses is an option of that command."""
    words = line.split("#")[0].split()
    command = LazyGroup(name="ftadvisor").get_command(None, words[1])
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_two_lines_set_themselves_up() -> None:
    """The demo line and the test line are each one line with its own virtual environment."""
    for name, last in (
        ("demo", "ftadvisor demo"),
        ("tests", "python -m pytest -n auto --dist loadfile --no-loadscope-reorder"),
    ):
        line = _shell_lines(name)
        assert "\n" not in line
        assert line.startswith("python3 -m venv ")
        assert line.endswith(last)


def test_gate_calls_the_test_line() -> None:
    """.ci/run takes its test command from the README, so that the two cannot differ."""
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"s/\^\\\((.*?)\\\)", gate)
    assert pattern is not None
    assert re.match(pattern[1], _shell_lines("tests"))
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_versions_agree() -> None:
    """pyproject and the package say the same version, and the changelog has it."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_module_says_what_it_does() -> None:
    """Each module and program opens with a docstring."""
    for path in [*(ROOT / "advisor").rglob("*.py"), *recipes_dir().rglob("*.py")]:
        assert path.read_text(encoding="utf-8").lstrip().startswith('"""'), path


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_nothing_speaks_of_its_making() -> None:
    """No tracked text names a package registry's host, a machine's path or an unfinished place."""
    hosts = re.compile("files" + r"\.pythonhosted|pypi" + r"\.org|extra-index" + "-url")
    places = re.compile(r"(^|[^\w.])/(" + "work|" + r"root)/\w")
    undone = re.compile(r"#\s*(TO" + "DO|FIX" + "ME)\\b")
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in {".safetensors", ".png", ".parquet"} or not path.is_file() or name == "LICENSE":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in (hosts, places, *([undone] if path.suffix == ".py" else [])):
            assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_links_in_the_readme_lead_somewhere() -> None:
    """Relative links point to files that exist."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_kb_folder_is_the_checkout() -> None:
    """In a checkout the knowledge base is the folder at the top."""
    assert kb_dir() == ROOT / "kb"
