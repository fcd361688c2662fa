"""What is shipped: one top-level name in the wheel, kb/ and recipes/ inside, a command that starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    target = folder / "content"
    zipfile.ZipFile(wheel).extractall(target)
    return target


def _start(arguments: list[str], folder: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
    return subprocess.run(
        [sys.executable, "-P", "-c", "from advisor.cli.main import main; main()", *arguments],
        capture_output=True, text=True, env=environment, cwd=cwd, check=False,
    )  # fmt: skip


def test_only_top_level_name_is_advisor(unpacked_wheel: Path) -> None:
    """A wheel installs nothing beside the package, so nothing of anybody else is shadowed."""
    names = {path.name for path in unpacked_wheel.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"advisor"}


def test_wheel_carries_kb_recipes_and_starter(unpacked_wheel: Path) -> None:
    """The facts, the programs and the embedded model travel in the wheel."""
    data = unpacked_wheel / "advisor" / "_data"
    for path in (
        "kb/sources.toml",
        "kb/starter/model.safetensors",
        "recipes/sft/train.py",
        "recipes/sft/program.toml",
    ):
        assert (data / path).is_file(), path


def test_wheel_plans_by_itself(unpacked_wheel: Path, tmp_path: Path) -> None:
    """The command of a wheel reads its own knowledge base, not the checkout's."""
    answer = _start(["explain", "qlora", "--json"], unpacked_wheel, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["ok"] is True
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import advisor.resources as r; print(r.kb_dir())"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
    )  # fmt: skip
    assert where.stdout.strip().startswith(str(unpacked_wheel))


def test_every_dependency_has_a_lower_bound() -> None:
    """Each requirement says the oldest version it was tested with."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (item for group in groups for item in group):
        assert ">=" in requirement or requirement.startswith("ftadvisor["), requirement


def test_light_core_has_no_torch() -> None:
    """Planning must not pull in what only training needs."""
    names = {requirement.split(">")[0].lower() for requirement in PROJECT["dependencies"]}
    assert not names & {
        "torch",
        "transformers",
        "numpy",
        "trl",
        "peft",
        "datasets",
        "gguf",
        "llama-cpp-python",
    }
    assert "nvidia-ml-py" in names
    assert "pynvml" not in names


def test_help_and_version_start_light(tmp_path: Path) -> None:
    """`--help` loads no torch, transformers, numpy, rich or questionary."""
    code = (
        "import sys\nfrom advisor.cli.main import run\nassert run(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'questionary', 'rich', 'llama_cpp', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert answer.stdout.strip().endswith("[]")
    assert PROJECT["version"] in _start(["--version"], ROOT, tmp_path).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--hardware", "RTX 3060", "--dry-run", "--json"],
        ["probe", "--json"],
        ["estimate", "--model", "starter", "--json"],
    ],
    ids=lambda a: a[0],
)
def test_planning_never_loads_torch(arguments: list[str], tmp_path: Path) -> None:
    """plan, probe and estimate work without torch, transformers, numpy or llama.cpp in the process."""
    code = (
        f"import sys\nfrom advisor.cli.main import run\nassert run({arguments!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'llama_cpp', 'datasets', 'peft', 'trl'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.strip().splitlines()[-1] == "[]"
