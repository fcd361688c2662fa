"""What the doctor finds on made-up installations and machines."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from advisor.knowledge import load
from advisor.probe.software import (
    EXTRAS,
    Conflict,
    Installation,
    installed_packages,
    judge,
    look_around,
    torch_backend,
)
from advisor.types import Accelerator, Finding, Hardware, Volume

GIB = 1024**3
ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCE = "__version__ = '2.15.0+cu132'\ncuda: Optional[str] = '13.2'\nhip: Optional[str] = None\n"
CPU_SOURCE = "cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n"
COMPLETE = Installation(
    packages={name: "9.9" for names in EXTRAS.values() for name in names} | {"torch": "2.15.0"},
    requirements=(
        "rich>=15.0",
        "torch>=2.15; extra == 'train'",
        "trl<10,>=1.16; extra == 'train'",
        "safetensors>=0.8; extra == 'train'",
        "safetensors>=0.8; extra == 'gguf'",
        "ftadvisor[gguf,train]; extra == 'all'",
    ),
    torch_source=CUDA_SOURCE,
    compiler="/usr/bin/c++",
    starter=True,
    hub_token=True,
)
RTX = Accelerator(name="RTX 3060", vendor="nvidia", memory_bytes=12 * GIB, free_bytes=12 * GIB)
MACHINE = Hardware(
    ram_bytes=16 * GIB,
    ram_free_bytes=8 * GIB,
    cpu_cores=2,
    accelerators=(RTX,),
    volumes=(
        Volume(role="output", path="runs", free_bytes=100 * GIB),
        Volume(role="cache", path="cache", free_bytes=100 * GIB),
    ),
)


def findings(machine: Hardware = MACHINE, **changes: object) -> dict[str, Finding]:
    """Judge a complete installation with changes; returns code -> finding, without the good news."""
    here = msgspec.structs.replace(COMPLETE, **changes)
    found = judge(here, machine, low_free_bytes=5 * GIB)
    assert len({finding.message for finding in found}) == len(found)
    return {finding.code: finding for finding in found if finding.code != "offline_ready"}


def without(*names: str) -> dict[str, str]:
    """Return the complete packages without some."""
    return {name: version for name, version in COMPLETE.packages.items() if name not in names}


def test_a_complete_installation_has_nothing_to_mend() -> None:
    """With all there and a fitting machine there is no finding but that it works offline."""
    assert findings() == {}
    assert [f.code for f in judge(COMPLETE, MACHINE, low_free_bytes=5 * GIB)] == ["offline_ready"]


def test_missing_extras_name_the_packages_and_the_pip_line() -> None:
    """Each extra with a missing package is one error, with the packages and the line that installs it."""
    found = findings(packages=without("peft", "trl", "gguf"))
    assert set(found) == {"missing_extra_train", "missing_extra_gguf"}
    assert "peft, trl" in found["missing_extra_train"].message
    assert found["missing_extra_gguf"].remedy == "pip install 'ftadvisor[gguf]'"
    assert {finding.severity for finding in found.values()} == {"error"}


def test_a_compiler_matters_only_while_llama_cpp_is_missing() -> None:
    """Without a compiler llama-cpp-python cannot be installed; once it is there none is needed."""
    assert findings(compiler=None) == {}
    assert "missing_compiler" in findings(compiler=None, packages=without("llama-cpp-python"))
    assert "missing_compiler" not in findings(packages=without("llama-cpp-python"))


@pytest.mark.parametrize(("version", "wrong"), [("1.15.2", True), ("1.16.0", False), ("10.1", True)])
def test_versions_outside_the_tested_range(version: str, wrong: bool) -> None:
    """A version below the lower bound or beyond the upper one is an error with both versions in it."""
    found = findings(packages={**COMPLETE.packages, "trl": version})
    assert set(found) == ({"unsupported_version"} if wrong else set())
    if wrong:
        assert version in found["unsupported_version"].message
        assert found["unsupported_version"].remedy == "pip install 'trl<10,>=1.16'"


def test_two_wrong_versions_are_two_findings_and_one_package_is_told_once() -> None:
    """Each package is reported once, also when two extras ask for it; a version that is none is wrong."""
    found = judge(
        msgspec.structs.replace(
            COMPLETE, packages={**COMPLETE.packages, "safetensors": "0.1", "trl": "what-is-this"}
        ),
        MACHINE,
        low_free_bytes=0,
    )
    assert [f.code for f in found].count("unsupported_version") == 2


@pytest.mark.parametrize(
    ("package", "version", "known"),
    [("torchao", "0.15.0", True), ("torchao", "0.16.0", False), ("gptqmodel", "5.0", True),
     ("adapters", "1.2.0", True), ("unsloth", "2026.10.9", True), ("unsloth", "2099.1.1", False)],
)  # fmt: skip
def test_packages_that_break_others_are_named(package: str, version: str, known: bool) -> None:
    """Only the versions that are known for it, each with what it breaks and what to do."""
    conflicts = msgspec.convert(load().rules["software"], dict[str, Conflict])
    here = msgspec.structs.replace(COMPLETE, beside={package: version})
    found = judge(here, MACHINE, low_free_bytes=0, conflicts=conflicts)
    named = [finding for finding in found if finding.code == "conflicting_package"]
    assert len(named) == known
    assert all(f"{package} {version}" in finding.message and finding.remedy for finding in named)


def test_a_local_build_counts_as_its_version() -> None:
    """torch 2.15.0+cu132 fulfils >=2.15."""
    assert findings(packages={**COMPLETE.packages, "torch": "2.15.0+cu132"}) == {}


def test_unknown_requirements_are_said() -> None:
    """In a checkout that was never installed the versions cannot be compared, which is said."""
    found = findings(requirements=None)
    assert [(f.code, f.severity) for f in found.values()] == [("versions_unchecked", "info")]


def test_without_the_packaging_library_the_rest_is_still_judged() -> None:
    """Where the library that reads requirements is missing, only that check is left out."""
    program = (
        "import sys; sys.modules['packaging'] = None; sys.modules['packaging.requirements'] = None;"
        "from tests.unit.test_doctor_findings import findings;"
        "print(sorted(findings(starter=False)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.stdout.strip() == "['starter_missing', 'versions_unchecked']", ran.stderr


def test_a_gpu_with_a_torch_that_cannot_use_it() -> None:
    """A CUDA GPU beside a CPU-only torch is a warning that names both."""
    found = findings(torch_source=CPU_SOURCE)
    assert set(found) == {"torch_without_gpu"}
    assert "RTX 3060" in found["torch_without_gpu"].message
    assert "CUDA" in found["torch_without_gpu"].remedy


def test_an_amd_card_needs_a_rocm_torch() -> None:
    """An AMD card beside a CUDA build of torch is a warning, too."""
    card = Accelerator(name="RX 7900 XTX", vendor="amd", memory_bytes=24 * GIB, free_bytes=24 * GIB)
    machine = msgspec.structs.replace(MACHINE, accelerators=(card,))
    assert "ROCm" in findings(machine)["torch_without_gpu"].remedy


def test_a_machine_without_a_gpu_may_have_any_torch() -> None:
    """Without an accelerator, or with an Apple one, no build of torch is wrong."""
    apple = Accelerator(name="Apple M2", vendor="apple", memory_bytes=16 * GIB, free_bytes=16 * GIB)
    for accelerators in ((), (apple,)):
        machine = msgspec.structs.replace(MACHINE, accelerators=accelerators)
        assert findings(machine, torch_source=CPU_SOURCE) == {}


@pytest.mark.parametrize(
    ("version", "source", "backend"),
    [
        ("2.15.0", CUDA_SOURCE, "cuda"),
        ("2.15.0", CPU_SOURCE, "cpu"),
        ("2.15.0", "cuda = None\nhip = '7.2'\n", "rocm"),
        ("2.15.0", "cuda = None\nhip = None\nxpu = '20250'\n", "xpu"),
        ("2.15.0+cpu", None, "cpu"),
        ("2.15.0+cu130", None, "cuda"),
        ("2.15.0+rocm7.2", None, "rocm"),
        ("2.15.0", None, None),
        ("2.15.0", "not python (", None),
        ("2.15.0+cpu", "", "cpu"),
    ],
)
def test_what_a_torch_build_computes_on(version: str, source: str | None, backend: str | None) -> None:
    """torch's own version file tells, else the local part of its version, else nothing does."""
    assert torch_backend(version, source) == backend


def test_little_disk_names_the_volume() -> None:
    """Too little space on either volume is a warning with the way to use another one."""
    volumes = (
        Volume(role="output", path="runs", free_bytes=4 * GIB),
        Volume(role="cache", path="cache", free_bytes=1 * GIB),
    )
    found = findings(msgspec.structs.replace(MACHINE, volumes=volumes))
    assert set(found) == {"low_disk_output", "low_disk_cache"}
    assert "4 GiB" in found["low_disk_output"].message
    assert "--out" in found["low_disk_output"].remedy
    assert "HF_HOME" in found["low_disk_cache"].remedy


def test_offline_readiness_and_the_hub_token() -> None:
    """A missing token is information; a missing starter model is a warning."""
    found = findings(starter=False, hub_token=False)
    assert {code: finding.severity for code, finding in found.items()} == {
        "starter_missing": "warning",
        "no_hub_token": "info",
    }


def test_every_finding_says_what_to_do() -> None:
    """No finding is without a remedy."""
    bare = Installation(packages={}, requirements=None)
    machine = msgspec.structs.replace(MACHINE, volumes=(Volume(role="output", path=".", free_bytes=0),))
    found = judge(bare, machine, low_free_bytes=GIB)
    assert len(found) == 7
    assert all(finding.remedy and finding.message for finding in found)


def test_the_extras_are_those_of_the_project_file() -> None:
    """What the doctor asks for is what the extras in pyproject.toml and the core install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {requirement.split(">")[0].split("[")[0].strip() for requirement in requirements}

    assert names(extras["train"]) <= set(EXTRAS["train"])
    assert set(EXTRAS["train"]) <= names(extras["train"]) | names(project["dependencies"])
    assert set(EXTRAS["gguf"]) <= names(extras["gguf"]) <= set(EXTRAS["gguf"]) | set(EXTRAS["train"])


def test_versions_are_those_of_the_installed_packages() -> None:
    """The versions are read from metadata and agree with an imported package's own."""
    import tokenizers

    assert installed_packages()["tokenizers"] == tokenizers.__version__


def test_a_hub_token_is_found_but_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token file or variable is noticed; what it holds appears nowhere."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not look_around().hub_token
    (tmp_path / "token").write_text("hf_secret")
    assert look_around().hub_token
    assert "hf_secret" not in str(look_around())
