"""What lies in a model folder: tokens, chat template, weights, licence, and what is missing.

Goes in: a folder. Comes out: facts and findings. Of the weights only the headers are read. Never does: load
a model or a tokenizer; change anything.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson
import yaml

from advisor.errors import ModelError
from advisor.gguf_tokenizer import obstacle
from advisor.templates import end_of_turn
from advisor.types import Finding, Record

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "F8_E4M3": "float8"}
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Tensors of older checkpoints that are computed, not trained."""


class Tokens(Record, frozen=True, kw_only=True):
    """Special tokens, as text, and the ids that end generation."""

    bos: str = ""
    eos: str = ""
    pad: str = ""
    ids: dict[str, int] = {}
    """Added tokens -> id."""
    end_ids: tuple[int, ...] = ()


class Weights(Record, frozen=True, kw_only=True):
    """What the headers of the safetensors files say."""

    parameters: int
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: unreadable, not JSON, or not an object.
    """
    try:
        value = orjson.loads(path.read_bytes())
    except OSError as problem:
        raise ModelError(
            f"Cannot read {path}: {problem.strerror or problem}.", "Check the path."
        ) from problem
    except orjson.JSONDecodeError as problem:
        raise ModelError(
            f"{path} is not valid JSON (line {problem.lineno}): {problem.msg}.",
            "Take it from the original model.",
        ) from problem
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold an object.", "Take it from the original model.")
    return value


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def chat_template(folder: Path) -> str | None:
    """Return the chat template: chat_template.jinja, else from one of the JSON files beside it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = _optional(folder / name).get("chat_template")
        if isinstance(value, list):
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default") or next(iter(named.values()), None)
        if isinstance(value, str) and value.strip():
            return value
    return None


def special_tokens(folder: Path, config: Mapping[str, Any]) -> Tokens:
    """Return the special tokens of a folder's tokenizer and configuration."""
    settings = {
        **_optional(folder / "special_tokens_map.json"),
        **_optional(folder / "tokenizer_config.json"),
    }
    added = _optional(folder / "tokenizer.json").get("added_tokens", [])
    ids = {str(token["content"]): int(token["id"]) for token in added if isinstance(token, dict)}
    ends: set[int] = set()
    for source in (config, _optional(folder / "generation_config.json")):
        value = source.get("eos_token_id")
        ends.update(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
    return Tokens(
        bos=_token(settings.get("bos_token")),
        eos=_token(settings.get("eos_token")),
        pad=_token(settings.get("pad_token")),
        ids=ids,
        end_ids=tuple(sorted(ends)),
    )


def _token(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def card(folder: Path) -> dict[str, Any]:
    """Return the front matter of README.md; empty where there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    with contextlib.suppress(yaml.YAMLError):
        value = yaml.load(text[3:].partition("\n---")[0], Loader=yaml.CSafeLoader)
        return value if isinstance(value, dict) else {}
    return {}


def licence_of(facts: Mapping[str, Any], rules: Mapping[str, Any]) -> tuple[str | None, bool | None, str]:
    """Return (licence, commercial use, note) from a card's front matter.

    Args:
        facts: front matter.
        rules: the table `commercial` of kb/rules/licences.toml.
    """
    value = facts.get("license")
    name = str(value[0] if isinstance(value, list) and value else value or "").lower() or None
    if name == "other" and isinstance(facts.get("license_name"), str):
        name = str(facts["license_name"]).lower()
    if name in rules["allowed"]:
        return name, True, ""
    if name in rules["conditions"]:
        return name, True, "Commercial use under conditions; read the licence."
    if name in rules["forbidden"]:
        return name, False, "No commercial use."
    return name, None, ""


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the safetensors files that make up the model, and the names of those that are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapping = read_json(index).get("weight_map", {})
        names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
        return (
            [folder / name for name in names if (folder / name).is_file()],
            [name for name in names if not (folder / name).is_file()],
        )
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], []
    others = sorted(folder.glob("*.safetensors"))
    adapters = [file for file in others if file.name.startswith("adapter")]
    return [file for file in others if file not in adapters], []


def read_weights(files: Iterable[Path], *, tied: bool) -> Weights:
    """Count the parameters in the headers of safetensors files.

    Args:
        files: all files of one model.
        tied: the output matrix, if it is stored too, is not counted.

    Raises:
        ModelError: a file is cut off or is no safetensors file.
    """
    total = 0
    kinds: Counter[str] = Counter()
    for file in files:
        for name, tensor in _header(file).items():
            if name == "__metadata__" or name.endswith(_BUFFERS) or (tied and name == "lm_head.weight"):
                continue
            entries = math.prod(tensor["shape"])
            total += entries
            kinds[tensor["dtype"]] += entries
    most = kinds.most_common(1)
    return Weights(parameters=total, dtype=DTYPES.get(most[0][0], most[0][0]) if most else "")


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        content = stream.read(length) if length <= size - 8 else b""
    try:
        header: dict[str, Any] = orjson.loads(content)
        end = max(
            (item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"), default=0
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as problem:
        raise _cut(file) from problem
    if 8 + length + end > size:
        raise _cut(file)
    return header


def _cut(file: Path) -> ModelError:
    return ModelError(
        f"{file} is cut off or damaged.", "Download it again; the hub resumes.", code="incomplete_model"
    )


def gguf_obstacle(folder: Path, model_type: str) -> str:
    """Return why llama.cpp cannot cut text as the folder's tokenizer does, or nothing."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        return ""
    data = read_json(path)
    if not isinstance(data.get("model"), dict):
        return ""
    return obstacle(data, read_json(settings) if settings.is_file() else {}, model_type)


def findings_of(folder: Path, tokens: Tokens, template: str | None) -> list[Finding]:
    """Return what is missing in a folder, and what about its tokens would make a tuned model misbehave."""
    found = [*_missing_parts(folder)]
    if template is None:
        found.append(
            Finding(
                code="no_chat_template",
                severity="warning",
                message="The model has no chat template; it is a base model, or its template was lost.",
                remedy="Take the instruct model of the family; this one is trained with a plain template.",
            )
        )
    if tokens.pad and tokens.pad == tokens.eos:
        found.append(
            Finding(
                code="pad_equals_eos",
                severity="warning",
                message=f"Padding and end token are the same ({tokens.pad}).",
                remedy="Padding is masked out of the loss, so that the end token is still trained.",
            )
        )
    if template is not None and (problem := _wrong_end(tokens, template)):
        found.append(problem)
    return found


def _missing_parts(folder: Path) -> Iterable[Finding]:
    files, missing = weight_files(folder)
    if missing or not files:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if missing:
            what, remedy = f"missing: {', '.join(missing)}", "Download the missing files; the hub resumes."
        elif pickles:
            what = f"only {pickles[0]}, a pickle, which is not opened because it can run code"
            remedy = "Take a revision with safetensors files, or convert them with transformers."
        else:
            what, remedy = "no .safetensors file", "Download the whole model. For an estimate this is enough."
        yield Finding(
            code="incomplete_model",
            severity="error",
            message=f"The weights are incomplete: {what}.",
            remedy=remedy,
        )
    if not (folder / "tokenizer.json").is_file():
        slow = (folder / "tokenizer.model").is_file()
        yield Finding(
            code="no_tokenizer",
            severity="warning" if slow else "error",
            message="There is no tokenizer.json" + (", only tokenizer.model." if slow else "."),
            remedy="Tokens are estimated until training loads it."
            if slow
            else "Download tokenizer.json and tokenizer_config.json of the same model.",
        )


def _wrong_end(tokens: Tokens, template: str) -> Finding | None:
    """The token that ends a turn must also end generation, or the model never stops."""
    end = end_of_turn(template, bos_token=tokens.bos, eos_token=tokens.eos)
    if end is None:
        return Finding(
            code="no_end_of_turn",
            severity="warning",
            message="The chat template writes nothing after an answer, so nothing teaches where to stop.",
            remedy="Use a template that ends each answer with a special token.",
        )
    ends = {token for token, number in tokens.ids.items() if number in tokens.end_ids} | {tokens.eos}
    if any(token and end.startswith(token) for token in ends):
        return None
    return Finding(
        code="eos_not_end_of_turn",
        severity="warning",
        message=f"The template ends a turn with {end!r}, but the end token is {tokens.eos!r}.",
        remedy="ftadvisor makes the end of turn the end token when it trains and exports.",
    )
