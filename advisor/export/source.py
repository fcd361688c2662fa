"""Finds what is to be exported: the base weights, the adapter on them, the tokenizer they were trained with.

Goes in: a run folder, a Hugging Face folder or an adapter folder. Comes out: `Trained`. Never does: train,
write; use the network under `offline`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from advisor.errors import ExportError, InputError, ModelError
from advisor.export.checkpoint import optional_json, read_json
from advisor.probe.hub import fetch_model
from advisor.resources import starter_dir
from advisor.storage import read_record
from advisor.types import Plan, Recipe, RecipeModel, Record

STARTER = "starter"


class Trained(Record, frozen=True, kw_only=True):
    """A trained model: folders on this machine."""

    name: str
    """For file names: letters, digits, dots, dashes."""
    folder: str
    """Where exports go by default is `folder`/export."""
    base: str
    """Unquantised weights and config.json."""
    adapter: str | None = None
    tokenizer: str
    recipe: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Return the base's config.json."""
        return read_json(Path(self.base) / "config.json")


def find_trained(source: Path, *, offline: bool, on_progress: Callable[[str], None]) -> Trained:
    """Find base, adapter and tokenizer of a source.

    Raises:
        InputError: nothing is there, or nothing was trained yet, or it is a GGUF file.
        ModelError: the base cannot be found.
        HubError: the base lies on the hub, which is out of reach.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist.", "Give a run folder or a Hugging Face model folder.")
    if not source.is_dir():
        what = "a GGUF file" if source.suffix == ".gguf" else "a file"
        raise InputError(
            f"{source} is {what}; a run folder or a Hugging Face model folder is needed.",
            "Export from the weights it was made from.",
        )
    recipes = sorted(source.glob("recipe*.yaml"))
    if recipes:
        if several := adapters_apart(source):
            raise InputError(
                f"{source} holds an adapter for each task, and no result of all.",
                "Name one: " + ", ".join(map(str, several)),
            )
        return _from_run(source, recipes[-1], offline=offline, on_progress=on_progress)
    if (source / "adapter" / "adapter_config.json").is_file():
        found = find_trained(source / "adapter", offline=offline, on_progress=on_progress)
        return msgspec.structs.replace(found, name=_file_name(source), folder=str(source))
    if (source / "adapter_config.json").is_file():
        config = read_json(source / "adapter_config.json")
        named = config.get("base_model_name_or_path")
        if not named:
            raise ModelError(
                f"{source / 'adapter_config.json'} names no base model.",
                "Write its folder or hub id there: base_model_name_or_path",
            )
        model = RecipeModel(id=named, revision=config.get("revision"))
        base = _base(model, source, offline=offline, on_progress=on_progress)
        return _trained(source, base=base, adapter=source, folder=source)
    if (source / "config.json").is_file():
        return _trained(source, base=source, adapter=None, folder=source)
    raise InputError(
        f"{source} is neither a run folder (no recipe.yaml) nor a model folder (no config.json).",
        "Give the folder that `ftadvisor plan` wrote, or one with config.json and model.safetensors.",
    )


def refuse_a_head(trained: Trained) -> None:
    """Refuse a model that gives scores in place of words.

    Raises:
        ExportError: it has a head over classes, or one that gives marks.
    """
    kept = optional_json(Path(trained.adapter) / "adapter_config.json") if trained.adapter else None
    scores = (kept or {}).get("task_type") == "SEQ_CLS" or any(
        str(name).endswith("ForSequenceClassification") for name in trained.config.get("architectures") or ()
    )
    if not scores:
        return
    if trained.adapter and (Path(trained.adapter) / "labels.json").is_file():
        raise ExportError(
            "This model picks a class and writes no text; programs that read GGUF expect one that writes.",
            "Load it with transformers (AutoModelForSequenceClassification) and peft, labels.json names its "
            "outputs; or train the labels as text: ftadvisor plan --method lora",
        )
    raise ExportError(
        "This is a reward model: it gives marks and writes no text, which programs that read GGUF expect.",
        "Train against it (objective rloo) and export that model, or load it with transformers and peft.",
    )


def adapters_apart(run: Path) -> tuple[Path, ...]:
    """Return the folders of the stages where a plan trains one adapter for each dataset; else none."""
    plan = run / "plan.json"
    if not plan.is_file() or not read_record(plan, Plan).apart:
        return ()
    return tuple(sorted(file.parent for file in run.glob("stages/*/report.json")))


def _from_run(run: Path, recipe_file: Path, *, offline: bool, on_progress: Callable[[str], None]) -> Trained:
    recipe = read_record(recipe_file, Recipe, remedy=f"See {recipe_file.name} for the wrong field.")
    if (run / "model" / "config.json").is_file():
        found = _trained(run, base=run / "model", adapter=None, folder=run)
    elif (run / "adapter" / "adapter_config.json").is_file():
        base = _base(recipe.model, run, offline=offline, on_progress=on_progress)
        found = _trained(run, base=base, adapter=run / "adapter", folder=run)
    else:
        raise InputError(
            f"{run} holds no trained model yet: neither model/ nor adapter/.",
            f"Train first: ftadvisor run {run}{' --resume' if (run / 'checkpoints').is_dir() else ''}",
        )
    return Trained(**{**{f: getattr(found, f) for f in found.__struct_fields__}, "recipe": str(recipe_file)})


def _trained(source: Path, *, base: Path, adapter: Path | None, folder: Path) -> Trained:
    if not (base / "config.json").is_file():
        raise ModelError(f"The base model folder {base} has no config.json.", "Give a complete model folder.")
    near = adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else base
    return Trained(
        name=_file_name(source),
        folder=str(folder),
        base=str(base),
        adapter=None if adapter is None else str(adapter),
        tokenizer=str(near),
    )


def _file_name(source: Path) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", source.resolve().name).strip("-.") or "model"


def _base(model: RecipeModel, near: Path, *, offline: bool, on_progress: Callable[[str], None]) -> Path:
    """Return the folder of the unquantised base that an adapter belongs to."""
    if STARTER in (model.id, model.path):
        return starter_dir()
    for text in (model.path, model.id):
        if text is None:
            continue
        for place in (Path(text), near / text):
            if (place / "config.json").is_file():
                return place
    where = "model.path in recipe.yaml" if model.path else "base_model_name_or_path in adapter_config.json"
    given = model.path or model.id
    if Path(given).is_absolute():
        raise ModelError(
            f"The base model of this adapter was in {given}, which is not there any more.",
            f"Put it back, or correct {where}.",
        )
    on_progress(f"looking for the base model {model.id}")
    return fetch_model(model.id, revision=model.revision, offline=offline).path
