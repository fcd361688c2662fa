"""The tracer without what it has no use for: half of its start is imports of the libraries' libraries.

    python -P -m advisor.train.trace_alone < questions.jsonl

Goes in and comes out: as in `advisor.train.trace`, which answers the same with everything imported and twice
the start. Never does: change what is counted.

torch's compiler, its tensors spread over devices, the tables of Hugging Face's data library and bitsandbytes
(whose matrices have a stand-in in any case) are imported at the top of modules that the tracer needs for
something else. torch's operations on the meta device ask a computer algebra system about sizes that are
numbers here, and are answered without it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

HOLLOW = (
    "datasets", "pandas", "sympy", "torch.distributed.tensor", "torch.nn.attention.flex_attention",
    "torch.utils._sympy",
)  # fmt: skip
"""Packages of which only names are asked for: classes to annotate with or to compare with."""
COMPILER = "torch._dynamo"
"""Its settings are read, and what shall not be compiled is marked; nothing is compiled."""


def _equal(one: Any, other: Any) -> bool:
    """Compare two sizes, or two rows of sizes of which one may be a list and the other a tuple."""
    return list(one) == list(other) if isinstance(one, list | tuple) else bool(one == other)


SYMBOLS = "torch.fx.experimental.symbolic_shapes"
"""Asks whether a size is known, with a computer algebra system; on numbers each question is its answer."""
ANSWERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true"),
        bool,
    ),
    "free_unbacked_symbols": lambda _size: set(),
    "guarding_hint_or_throw": lambda size: size,
    "has_free_unbacked_symbols": lambda _size: False,
    "has_guarding_hint": lambda _size: True,
    "is_nested_int": lambda _size: False,
    "sym_and": lambda *each: all(each),
    "sym_or": lambda *each: any(each),
    "sym_eq": _equal,
}  # fmt: skip


class Unused:
    """Stands where a class of a hollow package is named."""

    def __init__(self, *_given: object, **_named: object) -> None:
        """Take anything: the model library makes some at its import."""


class Hollow(ModuleType):
    """A package with every name that is asked of it, each a class of its own."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type[Unused]:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Unused,), {})
        setattr(self, name, made)
        return made


class Compiler(ModuleType):
    """torch's compiler without its own code: modules below it are the real ones, imported when asked for; any
    other name marks a function for the compiler, and leaves it as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{COMPILER}.{name}"):
            return importlib.import_module(f"{COMPILER}.{name}")
        return _mark


def _mark(function: Any = None, *_given: object, **_named: object) -> Any:
    return _mark if function is None else function


class Numbers(ModuleType):
    """torch's questions about sizes that may be symbols, where all are numbers."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ANSWERS:
            raise AttributeError(name)
        return ANSWERS[name]


class Finder(MetaPathFinder, Loader):
    """Finds the packages that are kept out."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a hollow package, or a module of one."""
        if any(fullname == name or fullname.startswith(f"{name}.") for name in HOLLOW):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make it."""
        return Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: it has no code."""


def keep_out() -> None:
    """Put the stand-ins where Python looks first."""
    modules: dict[str, Any] = sys.modules
    modules["bitsandbytes"] = None  # counts as not installed
    sys.meta_path.insert(0, Finder())
    for kind, name in ((Compiler, COMPILER), (Numbers, SYMBOLS)):
        found = importlib.util.find_spec(name)
        if found is not None:
            made = kind(name)
            made.__spec__, made.__path__ = found, list(found.submodule_search_locations or ())
            modules[name] = made


def main() -> NoReturn:
    """Answer as the tracer does."""
    gc.disable()  # nothing of what is imported goes away again
    keep_out()
    tracer = importlib.import_module("advisor.train.trace")
    gc.enable()
    tracer.main()
    os._exit(0)  # taking three thousand modules down one by one takes half a second


if __name__ == "__main__":
    main()
