"""Imports follow the layers: only strictly lower ones, or siblings of the same sub-package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "errors": 0, "types": 0, "units": 0, "resources": 0, "storage": 0, "rows": 0, "templates": 0,
    "programs": 0.9, "knowledge": 1, "gguf_rules": 1.1, "gguf_tokenizer": 1.2, "probe": 1.5,
    "explain": 2, "estimate": 2.0, "scenario": 2.1, "inputs": 2.2, "goals": 2.1,
    "recommend": 2.4, "plan": 2.6, "recipe": 2.8,
    "running": 2.9, "lora_files": 2.95, "prompt_cache": 2.95, "prefix_state": 2.95,
    "earlier": 2.9, "intake": 3, "serve": 3, "run": 3, "export": 3, "verify": 3.5, "chat": 3,
    "train": 3.9, "adapters": 3.95, "self_test": 3,
    "ui": 4, "cli": 5, "__main__": 6, "__init__": 0,
}  # fmt: skip
INSIDE_LAYER_0 = {
    "errors": 0,
    "types": 0.1,
    "units": 0.1,
    "resources": 0.1,
    "storage": 0.2,
    "rows": 0.3,
    "templates": 0.3,
}
HEAVY = {"torch", "transformers", "peft", "trl", "llama_cpp", "datasets", "bitsandbytes", "accelerate"}
HEAVY_ALLOWED = {"train", "export", "verify", "chat", "adapters"}
NO_IO = {"estimate", "recommend", "plan", "recipe", "goals", "scenario", "explain"}
IO_MODULES = {"os", "subprocess", "socket", "time", "random", "shutil", "tempfile", "urllib"}
TRAIN_MAY_IMPORT = {
    "errors",
    "types",
    "units",
    "resources",
    "storage",
    "rows",
    "templates",
    "train",
    "run.events",
}
MODULES = sorted((ROOT / "advisor").rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT / "advisor").with_suffix("").parts
    return parts[0]


def _rank(part: str) -> float:
    assert part in LAYERS, f"advisor/{part} has no layer: add it to the table"
    return {**LAYERS, **INSIDE_LAYER_0}[part]


def _imports(path: Path, *, top_level: bool) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    """A module imports only from lower layers or from its own sub-package."""
    own = _name(path)
    for name in _imports(path, top_level=False):
        parts = name.split(".")
        if parts[0] != "advisor" or len(parts) == 1:
            continue
        other = (
            parts[1]
            if (ROOT / "advisor" / parts[1]).is_dir() or (ROOT / "advisor" / f"{parts[1]}.py").exists()
            else "__init__"
        )
        if other in (own, "__init__"):
            continue
        assert _rank(other) < _rank(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "advisor" / "train").glob("*.py")), ids=lambda p: p.name)
def test_train_imports_only_the_ground_floor(path: Path) -> None:
    """The torch side depends on the records and the event writer, not on the planner."""
    for name in _imports(path, top_level=False):
        parts = name.split(".")
        if parts[0] == "advisor" and len(parts) > 1:
            assert parts[1] in TRAIN_MAY_IMPORT or ".".join(parts[1:3]) in TRAIN_MAY_IMPORT, (
                f"{path} imports {name}"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_out(path: Path) -> None:
    """Only train, export, verify, chat and adapters may import torch and its relatives at module level."""
    if _name(path) not in HEAVY_ALLOWED:
        heavy = {name.split(".")[0] for name in _imports(path, top_level=True)} & HEAVY
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_judgement_is_pure(path: Path) -> None:
    """Estimating, recommending, planning and the policy use no clock, randomness, environment or files."""
    if _name(path) in NO_IO or path.name == "policy.py":
        used = {name.split(".")[0] for name in _imports(path, top_level=False)} & IO_MODULES
        assert not used, f"{path} imports {used}"
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print", "input"}, f"{path} does I/O"


def test_rich_and_questionary_live_in_ui() -> None:
    """Only ui/ draws and asks."""
    for path in MODULES:
        if _name(path) != "ui":
            used = {name.split(".")[0] for name in _imports(path, top_level=True)} & {"rich", "questionary"}
            assert not used, f"{path} imports {used}"


def test_kb_and_recipes_are_not_packages() -> None:
    """kb/ and recipes/ are data and programs, found by path."""
    for folder in ("kb", "recipes"):
        assert not list((ROOT / folder).rglob("__init__.py"))
