"""What does a linear layer with a low-rank adapter hold while it runs, beyond what it keeps for its backward?

Goes in: a Linear, the tuner, MemorySettings. Comes out: `Held`. Never does: count what is kept.

Read off PEFT's `lora.layer.Linear.forward` and `lora.dora.DoraLinearLayer.forward`. Letters: i inputs and o
outputs of the layer, a bytes of an activation entry, w of an adapter weight, c of what the adapter computes.
"""

from __future__ import annotations

from advisor.estimate.layers import Linear
from advisor.types import MemorySettings, Record


class Held(Record, frozen=True, kw_only=True):
    """Bytes at the fullest moment: `per_token` times the tokens, and `fixed` at any batch."""

    per_token: int
    fixed: int = 0


class Widths(Record, frozen=True, kw_only=True):
    """Bytes of one entry."""

    activation: int
    adapter: int
    product: int
    """Of what the adapter computes: narrow under autocast, else the wider of the two above."""
    weight: int
    """Of the base's matrix, dequantised."""


def kept(linear: Linear, settings: MemorySettings, widths: Widths, *, dora: bool) -> int:
    """Bytes a token that the adapter alone keeps: its own copy of the input, the inner product; DoRA reads
    both results again for the gradient of the magnitude."""
    copied = widths.product * linear.inputs if widths.adapter > widths.activation else 0
    results = (widths.activation + widths.product) * linear.outputs if dora else 0
    return copied + widths.product * settings.lora_r + results


def forward(linear: Linear, widths: Widths, *, dora: bool, last: bool) -> tuple[Held, ...]:
    """Return the moments of the forward pass that can be the fullest.

    Both widen the input first (w i); under autocast that copy is not the one that is kept, and the layer
    before still holds its own result (a i). LoRA then holds the base's result, its own and its scaled own.
    DoRA multiplies an identity matrix (i x i) through the adapter to get the dense change (i x o), takes the
    norm of base plus change (with the base widened, the scaled change and their sum: 4 matrices), and mixes
    both results by the magnitude in 32 bits (3 o). The `last` layer of a block that is computed again ends
    as soon as the last tensor that is kept is there: before LoRA's own result, after DoRA's first product."""
    wide = widths.adapter > widths.activation
    narrowed = wide and widths.product < widths.adapter
    inputs = ((widths.adapter if narrowed else 0) + (widths.activation if wide else 0)) * linear.inputs
    if not dora:
        results = (widths.activation + (0 if last else 2 * widths.product)) * linear.outputs
        return (Held(per_token=inputs + results),)
    identity, matrix = linear.inputs**2, linear.weights
    base = widths.adapter if widths.adapter != widths.weight else 0
    later = (widths.product * linear.inputs if wide else 0) + widths.product * linear.outputs
    change = widths.adapter * matrix
    graph = widths.product * identity
    return (
        Held(
            per_token=inputs - later,
            fixed=graph + (widths.adapter * identity if narrowed else 0) + widths.product * matrix,
        ),
        Held(per_token=inputs - later, fixed=graph + 3 * change + base * matrix),
        Held(
            per_token=inputs + (1 if last else 3) * max(widths.adapter, widths.activation) * linear.outputs,
            fixed=graph + change + base * matrix,
        ),
    )


def backward(linear: Linear, widths: Widths) -> Held:
    """Return the fullest moment of DoRA's backward pass: the gradient of the mixed result, that of its scaled
    part, and both products of the latter; where these are wide, a narrow one waits for the base's product."""
    wide = max(widths.adapter, widths.activation)
    waiting = widths.activation if wide > widths.activation else 0
    return Held(per_token=(4 * wide + waiting) * linear.outputs)
