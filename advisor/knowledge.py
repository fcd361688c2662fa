"""Reads kb/*.toml into records, once for a process; every fact about the world comes from here.

Goes in: the kb folder, the settings of the training programs, and a person's overlay of the same layout as kb
(environment variable FTADVISOR_KB), whose tables win. Comes out: `Knowledge`. Never does: judge; guess a
missing field; accept an unknown key.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli

from advisor.errors import KnowledgeError
from advisor.programs import read_programs
from advisor.resources import kb_dir, kb_overlay_dir, recipes_dir
from advisor.types import (
    AcceleratorFacts,
    Failure,
    ModelFacts,
    ModelShape,
    ModelSpec,
    ObjectiveFacts,
    Program,
    Quantisation,
    Record,
    Source,
    Topic,
    TunerFacts,
    WarningFacts,
)

T = TypeVar("T")


FILES = ("sources", "quantisations", "warnings", "failures", "topics")
FOLDERS = ("hardware", "models", "methods", "tuners", "rules")


class Knowledge(Record, frozen=True, kw_only=True):
    """All of kb/, decoded. Mappings keep the order of the files (sorted by name) and tables."""

    sources: dict[str, Source]
    accelerators: dict[str, AcceleratorFacts]
    models: dict[str, ModelFacts]
    objectives: dict[str, ObjectiveFacts]
    tuners: dict[str, TunerFacts]
    quantisations: dict[str, Quantisation]
    warnings: dict[str, WarningFacts]
    failures: dict[str, Failure]
    topics: dict[str, Topic]
    rules: dict[str, dict[str, Any]]
    """File name under kb/rules/ -> its tables; each rule function names the keys that it reads."""
    programs: dict[str, Program]
    """Folder name under recipes/ -> the settings that the training program there accepts."""


@functools.cache
def load() -> Knowledge:
    """Return the knowledge base of this installation, with the person's overlay on top.

    Raises:
        KnowledgeError: a file is not TOML, a key is unknown or missing, or a named source does not exist.
    """
    return read(*[folder for folder in (kb_dir(), kb_overlay_dir()) if folder is not None])


def read(*folders: Path) -> Knowledge:
    """Read one kb folder, or several of which the later ones win, and check every source key."""
    _refuse_strangers(folders)
    knowledge = Knowledge(
        sources=_tables(folders, "sources.toml", Source),
        accelerators=_tables(folders, "hardware/*.toml", AcceleratorFacts),
        models=_tables(folders, "models/*.toml", ModelFacts),
        objectives=_files(folders, "methods/*.toml", ObjectiveFacts),
        tuners=_files(folders, "tuners/*.toml", TunerFacts),
        quantisations=_tables(folders, "quantisations.toml", Quantisation),
        warnings=_tables(folders, "warnings.toml", WarningFacts),
        failures=_tables(folders, "failures.toml", Failure),
        topics=_tables(folders, "topics.toml", Topic),
        rules=_files(folders, "rules/*.toml", dict[str, Any]),
        programs=read_programs(recipes_dir()),
    )
    _check_sources(knowledge)
    return knowledge


def spec_of(key: str, facts: ModelFacts) -> ModelSpec:
    """Return the ModelSpec of one table of kb/models; what says more about a model on disk stays empty."""
    shared = set(ModelSpec.__struct_fields__) & set(ModelFacts.__struct_fields__)
    shape = ModelShape(**{name: getattr(facts, name) for name in ModelShape.__struct_fields__})
    return ModelSpec(
        id=key,
        shape=shape,
        has_chat_template=facts.instruct,
        **{name: getattr(facts, name) for name in shared},
    )


def _refuse_strangers(folders: tuple[Path, ...]) -> None:
    """Refuse a file that nothing would read, most likely a misspelt name."""
    for folder in folders:
        for path in sorted(folder.rglob("*.toml")):
            place = path.relative_to(folder)
            known = path.stem in FILES if len(place.parts) == 1 else place.parts[0] in (*FOLDERS, "starter")
            if not known:
                raise KnowledgeError(
                    f"{path} is not read by anything.",
                    f"Files: {', '.join(FILES)} (.toml); folders: {', '.join(FOLDERS)}.",
                )


def _paths(folders: tuple[Path, ...], pattern: str) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as problem:
        raise KnowledgeError(f"{path} cannot be read: {problem}", "Mend the file or remove it.") from problem


def _convert(value: object, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as problem:
        raise KnowledgeError(
            f"{where}: {problem}", "Compare it with an entry of the same kind in the kb/ of the distribution."
        ) from problem


def _tables(folders: tuple[Path, ...], pattern: str, kind: type[T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for path in _paths(folders, pattern):
        for key, table in _parse(path).items():
            found[key] = _convert(table, kind, f"{path} [{key}]")
    return found


def _files(folders: tuple[Path, ...], pattern: str, kind: type[T]) -> dict[str, T]:
    return {path.stem: _convert(_parse(path), kind, str(path)) for path in _paths(folders, pattern)}


def _named_sources(value: object, where: str) -> list[tuple[str, str]]:
    """Return (place, source key) for every `source` field inside a record or mapping."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, (list, tuple)):
        return [hit for i, item in enumerate(value) for hit in _named_sources(item, f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    hits = []
    for key, item in value.items():
        if key == "source" and isinstance(item, str):
            hits.append((where, item))
        else:
            hits += _named_sources(item, f"{where}.{key}")
    return hits


def _check_sources(knowledge: Knowledge) -> None:
    for section in knowledge.__struct_fields__:
        for where, key in _named_sources(getattr(knowledge, section), section):
            if key not in knowledge.sources:
                raise KnowledgeError(
                    f"{where}: source {key!r} is not in kb/sources.toml.", "Add it there, or name another."
                )
