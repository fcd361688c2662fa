"""The facts of kb/rules/gguf.toml as records: architectures, tokenizer patterns, quantisations.

Goes in: the knowledge base. Comes out: `Rules`. Never does: accept a key that no exporter reads.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import msgspec

from advisor.errors import KnowledgeError, UnknownNameError
from advisor.knowledge import load
from advisor.types import Record


class Architecture(Record, frozen=True, kw_only=True):
    """How one architecture of transformers maps to llama.cpp."""

    gguf: str
    permute: bool
    """Rows of q and k go from half-split to interleaved rotation."""
    free_head_dim: bool
    """False: llama.cpp takes heads x head_dim to be the width."""
    head: Literal["optional", "required", "shared"] = "optional"
    """Whether llama.cpp takes an output layer of its own: as the weights have it, always, or never."""
    tied: bool = False
    """Whether embedding and output layer are shared where config.json does not say."""
    window: Literal["never", "always", "use_sliding_window", "alternating"] = "never"
    """When `sliding_window` of config.json applies; `alternating`: llama.cpp applies it itself."""
    window_period: int = 0
    """`alternating`: every layer of this number attends to everything."""
    rope: tuple[str, ...]
    """Empty: learned positions instead."""
    partial_rotary: bool = False
    """Whether only a share of each head may be rotated."""
    activation: tuple[str, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """What the model adds to the weights of its norms and llama.cpp does not."""
    wide_norms: bool = False
    """Norms of q and k go over all heads together."""
    inner_factor: int = 0
    """Width of the feed-forward layers over `hidden_size`, where config.json does not say."""
    names: dict[str, str] = {}
    """Usual field -> this architecture's name for it."""
    defaults: dict[str, Any] = {}
    """Field -> its value where config.json leaves it out."""
    required: tuple[str, ...] = ()
    """Fields that may not be empty, because llama.cpp would take a value of its own."""
    fixed: dict[str, tuple[Any, ...]] = {}
    """Field of config.json -> the values that llama.cpp assumes; none: it must be empty."""
    head_scale_layers: int = 0
    """With so many layers, attention is scaled by width / heads, with any other by head_dim."""
    no_rope_interval: int = 0
    """Every layer of this number does not rotate."""
    floats: dict[str, str] = {}
    """Key of the file (after the architecture) -> field of config.json."""
    embedding: str = "model.embed_tokens.weight"
    head_weight: str = "lm_head.weight"
    final_norm: str = "model.norm"
    scaled_prompt: bool = False
    """The embedding layer itself multiplies by the root of the width, which virtual tokens do not pass."""
    positions: str | None = None
    """Learned positions."""
    prefix: str = ""
    """Put before names of a checkpoint that was saved without it."""
    block: str = "model.layers"
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    transposed: tuple[str, ...] = ()
    """Modules of a block whose weights are stored as (in, out)."""
    biases: dict[str, tuple[str, ...]] = {}
    """Boolean field of config.json (or `always`) -> modules of a block that carry a bias."""
    final_bias: bool = False
    source: str
    checked: str


class PreTokenizer(Record, frozen=True, kw_only=True):
    """One way of cutting text before the merges, by llama.cpp's name."""

    steps: tuple[str, ...]
    pattern: str | None = None
    source: str
    checked: str


class TokenizerClass(Record, frozen=True, kw_only=True):
    """What a tokenizer class of transformers puts in the place of tokenizer.json's own steps."""

    always: tuple[str, ...] = ()
    """Model types that get this class whatever tokenizer_config.json names."""
    where_named: tuple[str, ...] = ()
    """Model types that get it where tokenizer_config.json names it."""
    byte_fallback: bool
    """SentencePiece-style; a byte-level tokenizer.json is then left alone."""
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any]
    source: str
    checked: str


class Quantisations(Record, frozen=True, kw_only=True):
    """Which quantisations are made, and how."""

    direct: tuple[str, ...]
    through_llama: tuple[str, ...]
    preferred: tuple[str, ...]
    """Which of several files a Modelfile names, the best first."""
    source: str
    checked: str


class ImportanceFacts(Record, frozen=True, kw_only=True):
    """How much text an importance matrix is measured on."""

    most_rows: int
    row_tokens: int
    least_tokens: int
    source: str
    checked: str


class EndTokens(Record, frozen=True, kw_only=True):
    """Tokens that llama.cpp knows as an end of generation by their text."""

    known: tuple[str, ...]
    source: str
    checked: str


class Stripping(Record, frozen=True, kw_only=True):
    """The one case in which llama.cpp lets special tokens swallow the spaces after them."""

    names: tuple[str, ...]
    """A model whose name holds one of these, in lower case."""
    always: tuple[str, ...]
    never: tuple[str, ...]
    source: str
    checked: str


class ConverterFacts(Record, frozen=True, kw_only=True):
    """llama.cpp's own converter, for architectures that are not known here."""

    sha256: dict[str, str]
    """Version of llama-cpp-python -> checksum of its source package."""
    source: str
    checked: str


class ConfigFields(Record, frozen=True, kw_only=True):
    """What may stand in a checkpoint without changing what it computes."""

    without_effect: tuple[str, ...]
    tensors_without_effect: tuple[str, ...]
    source: str
    checked: str


class Rules(Record, frozen=True, kw_only=True):
    """All of kb/rules/gguf.toml."""

    quantisations: Quantisations
    importance: ImportanceFacts
    end_tokens: EndTokens
    config: ConfigFields
    stripping: Stripping
    converter: ConverterFacts
    architectures: dict[str, Architecture]
    pre_tokenizers: dict[str, PreTokenizer]
    tokenizer_classes: dict[str, TokenizerClass]


@functools.cache
def rules() -> Rules:
    """Return the export rules of this installation.

    Raises:
        KnowledgeError: the file is missing or has a wrong key.
    """
    try:
        return msgspec.convert(load().rules["gguf"], type=Rules)
    except (KeyError, msgspec.ValidationError) as problem:
        raise KnowledgeError(f"kb/rules/gguf.toml: {problem}", "See advisor/gguf_rules.py.") from problem


def checked_quants(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the quantisations in upper case, each once, in the order given.

    Raises:
        UnknownNameError: one of them is not made here.
    """
    facts = rules().quantisations
    valid = facts.direct + facts.through_llama
    for name in given:
        if name.upper() not in valid:
            raise UnknownNameError("quantisation", name, valid, "ftadvisor export --help")
    return tuple(dict.fromkeys(name.upper() for name in given))
