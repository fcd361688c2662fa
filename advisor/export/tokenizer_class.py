"""How transformers itself reads a folder's tokenizer.json: some of its classes replace steps of it.

Goes in: tokenizer.json, tokenizer_config.json, the model type. Comes out: tokenizer.json as training sees it.
Never does: import transformers.
"""

from __future__ import annotations

from typing import Any

from advisor.export.rules import rules


def as_loaded(data: dict[str, Any], settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return tokenizer.json with the steps that the tokenizer's class puts in the place of its own.

    Args:
        data: tokenizer.json.
        settings: tokenizer_config.json.
        model_type: Of config.json.
    """
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    bytewise = bool(data["model"].get("byte_fallback"))
    for name, facts in rules().tokenizer_classes.items():
        declared = named == name and model_type in facts.where_named
        if model_type not in facts.always and not (declared and bytewise in (True, facts.byte_fallback)):
            continue
        model = {**data["model"], "byte_fallback": facts.byte_fallback, "fuse_unk": facts.byte_fallback}
        if not facts.byte_fallback:
            model["unk_token"] = None
        changed = {**data, "model": model, "normalizer": facts.normalizer}
        return {**changed, "pre_tokenizer": _with_spaces(facts.pre_tokenizer, settings)}
    return data


def _with_spaces(steps: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the steps with the way of putting a space in front that tokenizer_config.json asks for."""
    if "prepend_scheme" not in steps:
        return steps
    if settings.get("add_prefix_space") is False:
        return {**steps, "prepend_scheme": "never"}
    return {**steps, "prepend_scheme": "always"} if settings.get("legacy") else steps
