"""Which model was given: the starter, a folder, a config.json, or a hub id.

Goes in: what the person typed. Comes out: `ModelSpec`. A model that kb/ knows costs no network.
Never does: load weights; run code of a model; guess the size from a name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import ModelError, nearest
from advisor.knowledge import Knowledge, spec_of
from advisor.probe import hub
from advisor.probe.model_config import ConfigFacts, read_config
from advisor.probe.model_folder import (
    card,
    chat_template,
    findings_of,
    gguf_obstacle,
    licence_of,
    read_json,
    read_weights,
    special_tokens,
    weight_files,
)
from advisor.resources import starter_dir
from advisor.types import Finding, ModelSpec

STARTER = "starter"


def read_model(
    given: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    like: str | None = None,
    knowledge: Knowledge,
) -> ModelSpec:
    """Return what is known about a model.

    Args:
        given: `starter`, a folder, a config.json, or a hub id.
        revision: of a hub id.
        offline: use only the hub's local cache.
        like: the architecture that an unknown one is counted as, and said to be; None refuses it.
        knowledge: models that need no look-up, and the rules of architectures and licences.

    Raises:
        ModelError: no such model, unknown architecture, an adapter or a quantised file; with the next step.
        HubError: the hub refuses or is out of reach.
    """
    if given == STARTER:
        return _of_folder(starter_dir(), knowledge, name=STARTER)
    path = Path(given).expanduser()
    if path.is_dir():
        return _of_folder(path, knowledge, like=like)
    if path.is_file():
        return _of_file(path, knowledge, like)
    by_lower = {key.lower(): key for key in knowledge.models}
    if given.lower() in by_lower:
        key = by_lower[given.lower()]
        return spec_of(key, knowledge.models[key])
    if path.suffix == ".gguf":
        raise _quantised(path)
    if hub.is_hub_id(given):
        return _of_hub(given, revision, knowledge, offline=offline, like=like)
    near = nearest(given, [*knowledge.models, STARTER], limit=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ModelError(
        f"{given!r} is neither a folder, nor a config.json, nor a hub id.{hint}",
        "Give --model owner/name, a folder, or starter.",
        code="unknown_model",
    )


def tokenizer_file(spec: ModelSpec) -> Path | None:
    """Return tokenizer.json of a model if it lies on this machine; uses no network."""
    if spec.path:
        path = Path(spec.path) / "tokenizer.json"
        return path if path.is_file() else None
    return hub.cached_file(spec.id, "tokenizer.json", revision=spec.revision)


def _quantised(path: Path) -> ModelError:
    return ModelError(
        f"{path} is a GGUF file: quantised weights for inference, which cannot be trained.",
        "Give the original model it was made from (a folder with safetensors, or its hub id). "
        "To talk to the file: ftadvisor chat FILE",
        code="use_unquantised_base",
    )


def _of_file(path: Path, knowledge: Knowledge, like: str | None) -> ModelSpec:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise _quantised(path)
    if path.suffix != ".json":
        raise ModelError(
            f"{path} is neither a model folder nor a config.json.", "Give the folder that holds config.json."
        )
    config = read_json(path)
    facts = read_config(config, knowledge.rules["architectures"], str(path), like=like)
    name = str(config.get("_name_or_path") or path.resolve().parent.name)
    return _spec(name, facts, source="config.json")


def _of_folder(
    folder: Path, knowledge: Knowledge, *, name: str | None = None, like: str | None = None
) -> ModelSpec:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise _no_config(folder, str(folder))
    config = read_json(config_file)
    facts = read_config(config, knowledge.rules["architectures"], str(config_file), like=like)
    files, missing = weight_files(folder)
    template = chat_template(folder)
    found = findings_of(folder, special_tokens(folder, config), template)
    dtype = facts.dtype
    if files and not missing:
        weights = read_weights(files, tied=facts.shape.tied)
        dtype = weights.dtype or dtype
        mismatch = _mismatch(facts, weights.parameters)
        found += mismatch
        facts = msgspec.structs.replace(
            facts, parameters=max(facts.parameters, weights.parameters) if mismatch else facts.parameters,
            unknown=(*facts.unknown, *(one.message.rstrip(".") for one in mismatch)),
        )  # fmt: skip
    return _described(
        _spec(name or folder.resolve().name, facts, source="config.json", dtype=dtype),
        folder, template, found, knowledge, path=str(folder),
    )  # fmt: skip


def _no_config(folder: Path, name: str) -> ModelError:
    """Say what the folder is instead: an adapter, quantised files, or nothing of use."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "its base model"
        return ModelError(
            f"{name} is an adapter, not a model; its base is {base}.",
            f"Give the base: --model {base}",
            code="adapter_as_base",
        )
    if any(folder.glob("*.gguf")):
        return _quantised(next(folder.glob("*.gguf")))
    return ModelError(
        f"{name} has no config.json, so it is not a model in Hugging Face form.",
        "Give a folder with config.json, tokenizer.json and *.safetensors, or the hub id of such a model.",
        code="incomplete_model",
    )


def _mismatch(facts: ConfigFacts, stored: int) -> list[Finding]:
    if facts.text_part or stored == facts.parameters:
        return []
    return [
        Finding(
            code="parameter_mismatch",
            severity="warning",
            message=f"The weights hold {stored:,} parameters, config.json describes {facts.parameters:,}.",
            remedy="Check that config.json and weights are of the same model.",
        )
    ]


def _of_hub(
    given: str, revision: str | None, knowledge: Knowledge, *, offline: bool, like: str | None
) -> ModelSpec:
    snapshot = hub.fetch_config(given, revision=revision, offline=offline, known=knowledge.models)
    folder = snapshot.path
    if not (folder / "config.json").is_file():
        raise _no_config(folder, given)
    config = read_json(folder / "config.json")
    facts = read_config(config, knowledge.rules["architectures"], f"{given}/config.json", like=like)
    template = chat_template(folder)
    findings = findings_of(folder, special_tokens(folder, config), template)
    # the weights are fetched when training needs them
    found = [finding for finding in findings if finding.code != "incomplete_model"]
    spec = _spec(given, facts, source="config.json", revision=snapshot.revision)
    return _described(spec, folder, template, found, knowledge, path=None)


def _spec(
    name: str, facts: ConfigFacts, *, source: str, dtype: str | None = None, revision: str | None = None
) -> ModelSpec:
    return ModelSpec(
        id=name,
        revision=revision,
        family=facts.model_type,
        architecture=facts.architecture,
        model_type=facts.model_type,
        shape=facts.shape,
        parameters=facts.parameters,
        active_parameters=facts.active_parameters,
        context_tokens=facts.context_tokens,
        fp16_safe=facts.rule.fp16_safe,
        gguf_architecture=facts.rule.gguf,
        weight_dtype=dtype or facts.dtype,
        source=source,
        unknown=facts.unknown,
    )


def _described(
    spec: ModelSpec,
    folder: Path,
    template: str | None,
    found: list[Finding],
    knowledge: Knowledge,
    *,
    path: str | None,
) -> ModelSpec:
    """Add what stands beside config.json: card, template, findings."""
    facts = card(folder)
    licence, commercial, note = licence_of(facts, knowledge.rules["licences"]["commercial"])
    return msgspec.structs.replace(
        spec,
        path=path,
        licence=licence,
        commercial=commercial,
        licence_note=note,
        languages=_languages(facts.get("language")),
        instruct=template is not None,
        chat_template=template,
        has_chat_template=template is not None,
        gguf_obstacle=gguf_obstacle(folder, spec.model_type),
        findings=tuple(found),
    )


def _languages(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str))
