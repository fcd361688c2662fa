"""The bounds and probe texts of kb/rules/verify.toml as records.

Goes in: the knowledge base. Comes out: `VerifyRules`. Never does: loosen a bound.
"""

from __future__ import annotations

import functools
import math

import msgspec

from advisor.errors import KnowledgeError
from advisor.knowledge import load
from advisor.types import Record


class Samples(Record, frozen=True, kw_only=True):
    """How much is compared."""

    least_positions: int
    most_positions: int
    row_tokens: int
    greedy_prompts: int
    greedy_tokens: int
    source: str
    checked: str


class LogitBounds(Record, frozen=True, kw_only=True):
    """What one quantisation may cost."""

    kl_mean: float
    kl_max: float
    max_delta: float
    """For logits with a standard deviation of up to 2; grows with it above."""
    top1: float
    exact_text: bool
    """Whether greedy text must be the same, ties apart."""
    source: str
    checked: str


class Allowance(Record, frozen=True, kw_only=True):
    """What something costs whatever the quantisation: llama.cpp's table of GELU, experts chosen otherwise."""

    kl_mean: float
    kl_max: float
    max_delta: float
    top1: float
    source: str
    checked: str


class Probe(Record, frozen=True, kw_only=True):
    """Texts that show differences between tokenizers, and questions to answer."""

    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    source: str
    checked: str


class TensorBounds(Record, frozen=True, kw_only=True):
    """Relative root mean square that a tensor type may lose, and how well an adapter must show."""

    types: dict[str, float]
    adapter_share_low: float
    adapter_share_high: float
    adapter_share_noise: float


class Arithmetic(Record, frozen=True, kw_only=True):
    """How far llama.cpp's logits may be from those of the same weights in float32."""

    errors: dict[str, float]
    """Quantisation -> root mean square of the difference over the deviation; none: not computed."""
    source: str
    checked: str


class VerifyRules(Record, frozen=True, kw_only=True):
    """All of kb/rules/verify.toml."""

    samples: Samples
    logits: dict[str, LogitBounds]
    gelu: Allowance
    routing: Allowance
    arithmetic: Arithmetic
    tensors: TensorBounds
    probe: Probe


def logit_bounds(rules: VerifyRules, quant: str, activation: str, *, routed: bool = False) -> LogitBounds:
    """Return the bounds of a quantisation; those of the loosest one where it is not known.

    Args:
        rules: The bounds.
        quant: What the file says it is.
        activation: Of the feed-forward layers.
        routed: Experts are chosen for each token.
    """
    found = rules.logits.get(quant) or max(rules.logits.values(), key=lambda bounds: bounds.kl_mean)
    if activation.startswith("gelu"):
        found = _loosened(found, rules.gelu)
    return _loosened(found, rules.routing) if routed and quant not in ("F32", "F16") else found


def told_only(bounds: LogitBounds) -> LogitBounds:
    """Return bounds that judge nothing: tensors and arithmetic are, and the rest is what few bits cost."""
    return msgspec.structs.replace(bounds, kl_mean=math.inf, kl_max=math.inf, max_delta=math.inf, top1=0.0)


def _loosened(found: LogitBounds, by: Allowance) -> LogitBounds:
    return msgspec.structs.replace(
        found,
        kl_mean=max(found.kl_mean, by.kl_mean),
        kl_max=max(found.kl_max, by.kl_max),
        max_delta=max(found.max_delta, by.max_delta),
        top1=min(found.top1, by.top1),
    )


@functools.cache
def verify_rules() -> VerifyRules:
    """Return the verification rules of this installation.

    Raises:
        KnowledgeError: the file is missing or has a wrong key.
    """
    try:
        given = dict(load().rules["verify"])
        table = {key: value for key, value in given["tensors"].items() if key not in ("source", "checked")}
        named = TensorBounds.__struct_fields__[1:]
        given["tensors"] = {key: table.pop(key) for key in named} | {"types": table}
        return msgspec.convert(given, type=VerifyRules)
    except (KeyError, msgspec.ValidationError) as problem:
        raise KnowledgeError(f"kb/rules/verify.toml: {problem}", "See advisor/verify/bounds.py.") from problem
