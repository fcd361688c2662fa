"""Is everything installed that training and export need, and does it fit this machine?

Goes in: the installed packages' metadata, the machine. Comes out: versions, findings with a remedy.
Never does: import torch or any other heavy package, use the network, read a token.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec

from advisor.knowledge import load
from advisor.resources import starter_dir
from advisor.types import Finding, Hardware, Record
from advisor.units import format_bytes, from_gib

EXTRAS = {
    "train": (
        "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers",
        "safetensors", "jsonschema",
    ),
    "gguf": ("gguf", "llama-cpp-python", "threadpoolctl"),
}  # fmt: skip
"""What must be there to train and to export; a test compares it with the extras in pyproject.toml."""
_DISTRIBUTION = "ftadvisor"
_COMPILERS = ("c++", "g++", "clang++", "cl")


class Installation(Record, frozen=True, kw_only=True):
    """What is installed, as far as the doctor judges it."""

    packages: dict[str, str]
    requirements: tuple[str, ...] | None
    """What ftadvisor's own metadata asks for; None in a checkout that was not installed."""
    torch_source: str | None = None
    """Text of torch/version.py."""
    compiler: str | None = None
    """Path of a C++ compiler."""
    starter: bool = False
    hub_token: bool = False
    beside: dict[str, str] = {}
    """name -> version of packages that may break the others."""


class Conflict(Record, frozen=True, kw_only=True):
    """One table of kb/rules/software.toml: a package that breaks others by being installed."""

    versions: str
    """PEP 440 specifier; empty: all."""
    text: str
    remedy: str
    source: str
    checked: str


def installed_packages() -> dict[str, str]:
    """Return name -> version of the packages of the extras that are installed, without importing them."""
    return _versions(package for packages in EXTRAS.values() for package in packages)


def doctor_findings(hardware: Hardware) -> tuple[Finding, ...]:
    """Return what is missing or does not fit on this computer; errors must be mended before training.

    Raises:
        KnowledgeError: the knowledge base cannot be read.
    """
    rules = load().rules
    low = from_gib(rules["probe"]["disk"]["low_free_gib"])
    conflicts = msgspec.convert(rules["software"], dict[str, Conflict])
    return judge(look_around(conflicts), hardware, low_free_bytes=low, conflicts=conflicts)


def look_around(conflicts: Mapping[str, Conflict] = MappingProxyType({})) -> Installation:
    """Collect what is installed on this computer, with the packages that may break the others."""
    compiler = os.environ.get("CXX", "").split()[:1]
    return Installation(
        packages=installed_packages(),
        requirements=_own_requirements(),
        torch_source=_torch_source(),
        compiler=next(filter(None, map(shutil.which, (*compiler, *_COMPILERS))), None),
        starter=any(starter_dir().rglob("*.safetensors")),
        hub_token=_has_hub_token(),
        beside=_versions(conflicts),
    )


def judge(
    here: Installation, hardware: Hardware, *, low_free_bytes: int,
    conflicts: Mapping[str, Conflict] = MappingProxyType({}),
) -> tuple[Finding, ...]:  # fmt: skip
    """Return the findings about an installation on a machine, from nothing but the records."""
    return (
        *_missing(here),
        *_outdated(here),
        *_conflicting(here, conflicts),
        *_torch_without_gpu(here, hardware),
        *_little_disk(hardware, low_free_bytes),
        *_offline(here),
    )


def torch_backend(version: str, source: str | None) -> Literal["cuda", "rocm", "xpu", "cpu"] | None:
    """Return what a torch build computes on, or None when it cannot be told.

    Args:
        version: the installed version; its local part names the build on packages outside the main index.
        source: text of torch/version.py, which assigns `cuda`, `hip` and `xpu` a version or None.
    """
    values = _assignments(source) if source is not None else {}
    if "cuda" in values:
        backends: tuple[tuple[str, Literal["cuda", "rocm", "xpu"]], ...] = (
            ("cuda", "cuda"), ("hip", "rocm"), ("xpu", "xpu"),
        )  # fmt: skip
        return next((backend for name, backend in backends if values.get(name)), "cpu")
    local = version.partition("+")[2]
    if local.startswith("cu"):
        return "cuda"
    if local.startswith("rocm"):
        return "rocm"
    return "cpu" if local == "cpu" else None


def _missing(here: Installation) -> list[Finding]:
    findings = []
    for extra, names in EXTRAS.items():
        absent = [name for name in names if name not in here.packages]
        if absent:
            use = "Training needs" if extra == "train" else "Export, verify and chat need"
            findings.append(
                Finding(
                    code=f"missing_extra_{extra}",
                    severity="error",
                    message=f"{use} packages that are not installed: {', '.join(absent)}.",
                    count=len(absent),
                    remedy=f"pip install '{_DISTRIBUTION}[{extra}]'",
                )
            )
    if "llama-cpp-python" not in here.packages and here.compiler is None:
        findings.append(
            Finding(
                code="missing_compiler",
                severity="error",
                message="llama-cpp-python is built when it is installed, and there is no C++ compiler.",
                remedy="Debian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; "
                "macOS: xcode-select --install",
            )
        )
    return findings


def _outdated(here: Installation) -> list[Finding]:
    if here.requirements is None:
        return [_versions_unchecked(f"{_DISTRIBUTION} runs from a checkout that is not installed")]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [_versions_unchecked("the package 'packaging' is not installed")]
    findings = {}
    for text in here.requirements:
        wanted = Requirement(text)
        version = here.packages.get(wanted.name)
        if version is not None and not wanted.specifier.contains(version, prereleases=True):
            # Two extras may ask for the same package; it is told once.
            findings[wanted.name] = Finding(
                code="unsupported_version",
                severity="error",
                message=f"{wanted.name} {version} is installed; tested is {wanted.specifier}.",
                remedy=f"pip install '{wanted.name}{wanted.specifier}'",
            )
    return list(findings.values())


def _conflicting(here: Installation, conflicts: Mapping[str, Conflict]) -> list[Finding]:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return []  # `_outdated` says that versions were not compared
    return [
        Finding(
            code="conflicting_package",
            severity="warning",
            message=f"{name} {version} is installed: {conflicts[name].text}.",
            remedy=conflicts[name].remedy,
        )
        for name, version in here.beside.items()
        if SpecifierSet(conflicts[name].versions).contains(version, prereleases=True)
    ]


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Return name -> version of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _versions_unchecked(why: str) -> Finding:
    return Finding(
        code="versions_unchecked",
        severity="info",
        message=f"The versions were not compared with the tested ones: {why}.",
        remedy="pip install -e '.[all]' in the checkout, or pip install 'ftadvisor[all]'",
    )


def _torch_without_gpu(here: Installation, hardware: Hardware) -> list[Finding]:
    if "torch" not in here.packages:
        return []
    backend = torch_backend(here.packages["torch"], here.torch_source)
    needed = {"nvidia": ("cuda", "CUDA"), "amd": ("rocm", "ROCm")}
    for item in hardware.accelerators:
        wanted, label = needed.get(item.vendor, (backend, ""))
        if backend is not None and backend != wanted:
            return [
                Finding(
                    code="torch_without_gpu",
                    severity="warning",
                    message=f"The machine has a {item.name}, but torch {here.packages['torch']} is built for "
                    f"{backend.upper()}: the GPU would not be used.",
                    remedy=f"Install a torch build for {label}; see pytorch.org/get-started/locally",
                )
            ]
    return []


def _little_disk(hardware: Hardware, low_free_bytes: int) -> list[Finding]:
    uses = {
        "output": ("runs are written", "Free some space, or write elsewhere: --out DIR"),
        "cache": ("downloaded models are kept", "Free some space, or keep them elsewhere: HF_HOME=DIR"),
    }
    return [
        Finding(
            code=f"low_disk_{volume.role}",
            severity="warning",
            message=f"Where {uses[volume.role][0]} ({volume.path}), only "
            f"{format_bytes(volume.free_bytes)} are free.",
            remedy=uses[volume.role][1],
        )
        for volume in hardware.volumes
        if volume.free_bytes < low_free_bytes
    ]


def _offline(here: Installation) -> list[Finding]:
    findings = []
    if here.starter:
        findings.append(
            Finding(
                code="offline_ready",
                severity="info",
                message="The embedded starter model is here; it works without a network.",
                remedy="ftadvisor demo",
            )
        )
    else:
        findings.append(
            Finding(
                code="starter_missing",
                severity="warning",
                message="The embedded starter model is not part of this installation.",
                remedy=f"pip install --force-reinstall --no-deps {_DISTRIBUTION}",
            )
        )
    if not here.hub_token:
        findings.append(
            Finding(
                code="no_hub_token",
                severity="info",
                message="No hub token is set; gated models such as Llama cannot be downloaded.",
                remedy="hf auth login",
            )
        )
    return findings


def _own_requirements() -> tuple[str, ...] | None:
    try:
        return tuple(importlib.metadata.requires(_DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_source() -> str | None:
    try:
        path = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        return Path(str(path)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return None


def _has_hub_token() -> bool:
    """Say whether a token is there, by the places that huggingface_hub looks in; it is not read."""
    if os.environ.get("HF_TOKEN"):
        return True
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = Path(os.environ.get("HF_HOME", caches / "huggingface"))
    return Path(os.environ.get("HF_TOKEN_PATH", home / "token")).is_file()


def _assignments(source: str) -> dict[str, object]:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, object] = {}
    for node in body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Constant):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name):
            found[target.id] = node.value.value
    return found
