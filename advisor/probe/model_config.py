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
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_topk")
"""Fields that say how many of them a token passes."""
SENSES = ("vision_config", "audio_config")
"""Parts of a model that also sees or hears."""


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
    active_parameters: int | None = None
    """Parameters that a token passes, where they are not all."""
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
    unknown = _unknown(config, inner, rule, key, tables)
    try:
        shape = _shape(inner, rule, where)
    except ModelError as problem:
        if like is None or not any(" is not known: " in one for one in unknown):
            raise
        raise _uncountable(unknown[0], problem) from problem
    dense = count_parameters(shape, rule, positions=_positions(inner, rule, where))
    mixture = _mixture(inner, shape, rule, where)
    parameters = dense + mixture.parameters(shape)
    if mixture.experts:
        shape = msgspec.structs.replace(
            shape, experts=mixture.experts, experts_per_token=mixture.per_token, intermediate=mixture.passed
        )
    return ConfigFacts(
        architecture=_named(config) or key,
        model_type=str(inner.get("model_type", rule.model_types[0])),
        rule=rule,
        shape=shape,
        parameters=parameters,
        active_parameters=parameters - mixture.idle(shape) if mixture.experts else None,
        context_tokens=_positions(inner, rule, where),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or "float32"),
        text_part=isinstance(text, dict),
        unknown=(*unknown, *_senses(config)),
    )


def _uncountable(unknown: str, problem: ModelError) -> ModelError:
    """Of an architecture that is not known, and whose fields are not those it would be counted by."""
    what, _, counted = unknown.partition(": counted as ")
    missing = problem.message.rpartition(": ")[2]
    return ModelError(
        f"{what[0].upper()}{what[1:]}, and its config.json cannot be counted as {counted}: {missing}",
        "No estimate can be made of it. Known architectures: ftadvisor explain models",
        code="unknown_architecture",
    )


def _senses(config: Config) -> tuple[str, ...]:
    """Say which parts of the model are not described."""
    parts = [name for name in SENSES if config.get(name)]
    if not parts:
        return ()
    return (f"the model also sees or hears ({', '.join(parts)}): only its text part is counted",)


def _named(config: Config) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _key(config: Config, inner: Config, tables: Mapping[str, Any], where: str, like: str | None) -> str:
    """Return the table to count by: that of the named class, else of the model type, else `like`."""
    given, model_type = _named(config), str(inner.get("model_type", ""))
    if given in tables:
        return given
    whole = str(config.get("model_type", model_type))
    for key, table in tables.items():
        strange = config is not inner and whole not in table["model_types"]
        if model_type in table["model_types"] and not (strange and like is None):
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
    elif given not in ("", key) and str(config.get("model_type", "")) not in tables[key]["model_types"]:
        found.append(f"the architecture {given} is not known: its text part is counted as {key}")
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


class Mixture(Record, frozen=True, kw_only=True):
    """The experts of a model; `experts` is 0 where it has none."""

    experts: int = 0
    per_token: int = 0
    width: int = 0
    """Intermediate width of one expert."""
    shared: int = 0
    """Width of what every token passes beside them."""
    blocks: int = 0
    """Blocks that have experts; the others are dense."""
    dense: int = 0
    """Intermediate width of a dense block."""

    @property
    def passed(self) -> int:
        """Intermediate width that a token passes in a block with experts."""
        return self.per_token * self.width + self.shared

    def parameters(self, shape: ModelShape) -> int:
        """Parameters beyond those of a model whose blocks are all dense; three matrices an expert."""
        if not self.experts:
            return 0
        wider = self.experts * self.width + self.shared - self.dense
        return self.blocks * shape.hidden * (3 * wider + self.experts)  # a row of the router an expert

    def idle(self, shape: ModelShape) -> int:
        """Parameters that a token does not pass."""
        return 3 * self.blocks * shape.hidden * (self.experts - self.per_token) * self.width


def _mixture(config: Config, shape: ModelShape, rule: ArchitectureRule, where: str) -> Mixture:
    """Return the experts that the fields describe.

    Raises:
        ModelError: there are experts, in fields that are not known.
    """
    experts = next((int(config[name]) for name in EXPERTS if isinstance(config.get(name), int)), 0)
    if experts < 2:
        strange = [
            name for name, value in config.items() if "expert" in name and value not in (None, False, 0, 1)
        ]
        if not strange:
            return Mixture()
        raise ModelError(
            f"{where}: it has experts ({', '.join(strange)}), and how many is not known.",
            f"Known fields: {', '.join(EXPERTS)}.",
            code="unknown_architecture",
        )
    per_token = next((int(config[name]) for name in PER_TOKEN if isinstance(config.get(name), int)), experts)
    width = _integer(config, rule, "moe_intermediate_size", where, shape.intermediate)
    beside = config.get("shared_expert_intermediate_size") or width * int(config.get("n_shared_experts") or 0)
    return Mixture(
        experts=experts, per_token=min(per_token, experts), width=width, shared=int(beside),
        blocks=_blocks_with_experts(config, shape.layers), dense=shape.intermediate,
    )  # fmt: skip


def _blocks_with_experts(config: Config, layers: int) -> int:
    """Count them: DeepSeek's first ones are dense, Qwen's are by a list and by every n-th."""
    every, plain = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or ())
    first = int(config.get("first_k_dense_replace") or 0)
    return sum(n >= first and n not in plain and (n + 1) % every == 0 for n in range(layers))


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
    key_heads = _integer(config, rule, "num_key_value_heads", where, heads)
    if heads % key_heads:
        raise ModelError(
            f"{where}: {heads} attention heads cannot share {key_heads} key and value heads evenly.",
            "Take config.json from the original model.",
            code="bad_config",
        )
    times = rule.intermediate_times
    window, full = _window(config, rule, layers)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=_integer(config, rule, "intermediate_size", where, times * hidden if times else None),
        heads=heads,
        kv_heads=key_heads,
        head_dim=_integer(config, rule, "head_dim", where, rule.head_dim or hidden // heads),
        vocab=_integer(config, rule, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", rule.tied)),
        attention_bias=_switch(config, rule.output_bias),
        mlp_bias=_switch(config, rule.mlp_bias),
        sliding_window=window,
        full_attention_layers=full,
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
