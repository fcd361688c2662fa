"""What does a config.json say: the shape of the model and its exact number of parameters.

Goes in: the decoded config.json. Comes out: shape, count, context and dtype. How an architecture is counted
is data: kb/rules/architectures.toml. Never does: read weights; guess an architecture that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from advisor.errors import KnowledgeError, ModelError, nearest
from advisor.types import ModelShape, Record

Config = Mapping[str, Any]
POSITIONS = 2048
"""Context of a model that does not say it."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields that say how many experts each block has."""


class ArchitectureRule(Record, frozen=True, kw_only=True):
    """One table of kb/rules/architectures.toml; the file explains the fields."""

    model_types: tuple[str, ...]
    gguf: str
    qkv_bias: str = ""
    output_bias: str = ""
    mlp_bias: str = ""
    norms: int = 2
    norm_bias: bool = False
    qk_norm: Literal["", "head", "whole"] = ""
    gated: bool = True
    positions: bool = False
    tied: bool = False
    head_dim: int | None = None
    intermediate_times: int | None = None
    full_every: int | None = None
    window_switch: str = ""
    fp16_safe: bool = True
    names: dict[str, str] = {}
    source: str
    checked: str


class ConfigFacts(Record, frozen=True, kw_only=True):
    """What a config.json tells."""

    architecture: str
    model_type: str
    rule: ArchitectureRule
    shape: ModelShape
    parameters: int
    context_tokens: int
    dtype: str
    text_part: bool = False
    """True: the model also sees or hears; only its text part is described."""
    unknown: tuple[str, ...] = ()
    """What it says that is not known here, or does not say."""


def read_config(
    config: Config, tables: Mapping[str, Any], where: str, *, like: str | None = None
) -> ConfigFacts:
    """Return the facts of one config.json.

    Args:
        config: its content.
        tables: kb/rules/architectures.toml.
        where: the file, for messages.
        like: the architecture that an unknown one is counted as; None refuses it.

    Raises:
        ModelError: unknown architecture, a field missing, or quantised weights.
    """
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise ModelError(
            f"{where}: the weights are quantised ({method}); an adapter on them cannot be merged exactly.",
            "Give the original 16-bit model; ftadvisor quantises it itself where memory is short (QLoRA).",
            code="use_unquantised_base",
        )
    text = config.get("text_config")
    inner: Config = {**config, **text} if isinstance(text, dict) else config
    key = _key(config, inner, tables, where, like)
    rule = _converted(key, tables[key])
    shape = _shape(inner, rule, where)
    parameters = count_parameters(shape, rule, positions=_positions(inner, rule, where))
    return ConfigFacts(
        architecture=_named(config) or key,
        model_type=str(inner.get("model_type", rule.model_types[0])),
        rule=rule,
        shape=shape,
        parameters=parameters + _of_experts(inner, shape, rule, where),
        context_tokens=_positions(inner, rule, where),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or "float32"),
        text_part=isinstance(text, dict),
        unknown=_unknown(config, inner, rule, key, tables),
    )


def _named(config: Config) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _key(config: Config, inner: Config, tables: Mapping[str, Any], where: str, like: str | None) -> str:
    """Return the table to count by: that of the named class, else of the model type, else `like`."""
    given, model_type = _named(config), str(inner.get("model_type", ""))
    if given in tables:
        return given
    for key, table in tables.items():
        if model_type in table["model_types"]:
            return key
    if like is not None:
        return like
    near = nearest(given or model_type, tables)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise ModelError(
        f"{where}: the architecture {given or model_type or '(not named)'} is not known.{hint}",
        f"Known: {', '.join(tables)}. Its memory alone, as if it were one of these: ftadvisor estimate",
        code="unknown_architecture",
    )


def _unknown(
    config: Config, inner: Config, rule: ArchitectureRule, key: str, tables: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return in words what was not known and how it was counted."""
    given, found = _named(config), []
    model_type = str(inner.get("model_type", ""))
    if model_type not in tables[key]["model_types"] and given != key:
        found.append(
            f"the architecture {given or model_type or '(not named)'} is not known: counted as {key}"
        )
    elif given not in ("", key) and "text_config" not in config:
        found.append(f"the class {given} is not known: counted as {key}, by its model_type")
    if own := config.get("auto_map"):
        files = sorted({str(one).partition(".")[0] for one in own.values()}) if isinstance(own, dict) else []
        found.append(f"the model has code of its own ({', '.join(files) or 'auto_map'}), which was not read")
    for field in ("num_key_value_heads", "max_position_embeddings"):
        if (
            inner.get(field) is None
            and inner.get(rule.names.get(field, field)) is None
            and not rule.positions
        ):
            assumed = "as many as heads" if field == "num_key_value_heads" else f"{POSITIONS:,}"
            found.append(f"{field} is not given: {assumed} counted")
    return tuple(found)


def _experts(config: Config) -> int:
    found = next((int(config[name]) for name in EXPERTS if isinstance(config.get(name), int)), 0)
    return found if found > 1 else 0


def _of_experts(config: Config, shape: ModelShape, rule: ArchitectureRule, where: str) -> int:
    """Return the parameters of all experts, each with three matrices; what one block shares counts as dense.

    Raises:
        ModelError: there are experts, in fields that are not known.
    """
    strange = [
        name for name, value in config.items() if "expert" in name and value not in (None, False, 0, 1)
    ]
    if strange and not shape.experts:
        raise ModelError(
            f"{where}: it has experts ({', '.join(strange)}), and how many is not known.",
            f"Known fields: {', '.join(EXPERTS)}.",
            code="unknown_architecture",
        )
    width = _integer(config, rule, "moe_intermediate_size", where, shape.intermediate)
    return 3 * shape.layers * shape.experts * shape.hidden * width


def _converted(key: str, table: object) -> ArchitectureRule:
    try:
        return msgspec.convert(table, type=ArchitectureRule)
    except msgspec.ValidationError as problem:
        raise KnowledgeError(
            f"kb/rules/architectures.toml [{key}]: {problem}", "See ArchitectureRule for the fields."
        ) from problem


def _integer(
    config: Config, rule: ArchitectureRule, field: str, where: str, default: int | None = None
) -> int:
    name = rule.names.get(field, field)
    value = config.get(name, config.get(field))
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(
            f"{where}: {name} must be a positive whole number, not {value!r}.",
            "Take config.json from the original model.",
            code="bad_config",
        )
    return value


def _positions(config: Config, rule: ArchitectureRule, where: str) -> int:
    return _integer(config, rule, "max_position_embeddings", where, POSITIONS)


def _shape(config: Config, rule: ArchitectureRule, where: str) -> ModelShape:
    hidden = _integer(config, rule, "hidden_size", where)
    heads = _integer(config, rule, "num_attention_heads", where)
    layers = _integer(config, rule, "num_hidden_layers", where)
    times = rule.intermediate_times
    window, full = _window(config, rule, layers)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=_integer(config, rule, "intermediate_size", where, times * hidden if times else None),
        heads=heads,
        kv_heads=_integer(config, rule, "num_key_value_heads", where, heads),
        head_dim=_integer(config, rule, "head_dim", where, rule.head_dim or hidden // heads),
        vocab=_integer(config, rule, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", rule.tied)),
        attention_bias=_switch(config, rule.output_bias),
        mlp_bias=_switch(config, rule.mlp_bias),
        sliding_window=window,
        full_attention_layers=full,
        experts=_experts(config),
    )


def _switch(config: Config, field: str) -> bool:
    return field == "always" or bool(field and config.get(field, False))


def _window(config: Config, rule: ArchitectureRule, layers: int) -> tuple[int | None, int | None]:
    """Return the sliding window and the number of layers that see everything; (None, None): all do."""
    window = config.get("sliding_window")
    off = rule.window_switch and not config.get(rule.window_switch, False)
    if not isinstance(window, int) or off or (rule.full_every is None and not rule.window_switch):
        return None, None
    types = config.get("layer_types")
    if isinstance(types, list):
        full = sum(kind == "full_attention" for kind in types)
    elif rule.window_switch:
        full = min(layers, int(config.get("max_window_layers") or layers))
    else:
        every = int(config.get("sliding_window_pattern") or rule.full_every or 0)
        full = layers // every if every else 0
    return (None, None) if full == layers else (window, full)


def count_parameters(shape: ModelShape, rule: ArchitectureRule, *, positions: int) -> int:
    """Return the exact number of parameters, a tied output matrix counted once.

    Args:
        shape: of the model.
        rule: how its architecture is built.
        positions: rows of the position table, where there is one.
    """
    hidden, inner = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm = hidden * (2 if rule.norm_bias else 1)
    block = hidden * (query + 2 * key) + query * hidden + rule.norms * norm
    block += (3 if rule.gated else 2) * hidden * inner
    if rule.qkv_bias == "always" or (rule.qkv_bias and shape.attention_bias):
        block += query + 2 * key
    if shape.attention_bias:
        block += hidden
    if shape.mlp_bias:
        block += (2 * inner if rule.gated else inner) + hidden
    if rule.qk_norm == "head":
        block += 2 * shape.head_dim
    elif rule.qk_norm == "whole":
        block += query + key
    tables = shape.vocab * hidden * (1 if shape.tied else 2) + (positions * hidden if rule.positions else 0)
    return shape.layers * block + tables + norm
