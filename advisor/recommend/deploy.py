"""Into which file does the result go, and does it fit where it must run?

Goes in: a model, the understood goal, kb quantisations and deploy rules. Comes out: the quantisation, the
size and whether the device holds it. Never does: write a file.
"""

from __future__ import annotations

from advisor.estimate.disk import gguf_bytes
from advisor.knowledge import Knowledge
from advisor.recommend.situation import Situation
from advisor.types import ModelSpec, Record
from advisor.units import from_gib


class FileChoice(Record, frozen=True, kw_only=True):
    """One GGUF file that would be made of a model."""

    quant: str
    file_bytes: int
    running_bytes: int
    """File, key-value cache and overhead while it runs."""
    room_bytes: int | None
    """Memory that the model may take on the device; None when unlimited."""
    fits: bool
    bits: float
    reason: str


def cache_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of the key-value cache in 16 bits; sliding layers keep only their window."""
    shape = spec.shape
    full = shape.layers if shape.full_attention_layers is None else shape.full_attention_layers
    width = 2 * shape.kv_heads * shape.head_dim * 2
    sliding = min(shape.sliding_window or 0, tokens) * (shape.layers - full)
    return width * (full * tokens + sliding)


def usual_quant(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> tuple[str, str]:
    """Return the quantisation that suits the size of a model, and why."""
    rules = knowledge.rules["deploy"]["quantisation"]
    if spec.parameters < rules["unquantised_below"] or spec.parameters < rules["tiny_below"]:
        return rules["tiny"], f"models below {rules['tiny_below'] / 1e9:.0f}B lose visibly to fewer bits"
    if situation.wish("best"):
        large = spec.parameters >= rules["large_from"]
        return rules["best_large" if large else "best"], "the best quality was asked for"
    if spec.parameters < rules["small_below"]:
        return rules[
            "small"
        ], f"models below {rules['small_below'] / 1e9:.1f}B lose more to 4 bits than large ones"
    return rules["default"], "the usual balance: about 1% more perplexity at under a third of the size"


def choose_file(spec: ModelSpec, situation: Situation, knowledge: Knowledge) -> FileChoice:
    """Choose the quantisation: the usual one for the size, or the largest that the device holds.

    Where the model is free or stands in for another, a smaller model is better than one with visible loss.
    """
    rules = knowledge.rules["deploy"]["quantisation"]
    usual, why = usual_quant(spec, situation, knowledge)
    ladder = [name for name in rules["ladder"] if name in knowledge.quantisations]
    if situation.spec is None or situation.spec.id != spec.id:
        least = rules["visible_loss_below_bits"]
        ladder = [name for name in ladder if knowledge.quantisations[name].bits_per_weight >= least]
    start = ladder.index(usual) if usual in ladder else 0
    choices = [_file(spec, name, situation, knowledge, why) for name in ladder[start:] or [usual]]
    fitting = [one for one in choices if one.fits]
    if not fitting:
        return choices[0]
    best = fitting[0]
    if best.quant == usual:
        return best
    reason = f"{usual} would not leave room on the device, {best.quant} does"
    return FileChoice(
        quant=best.quant, file_bytes=best.file_bytes, running_bytes=best.running_bytes,
        room_bytes=best.room_bytes, fits=True, bits=best.bits, reason=reason,
    )  # fmt: skip


def _file(spec: ModelSpec, quant: str, situation: Situation, knowledge: Knowledge, why: str) -> FileChoice:
    rules = knowledge.rules["deploy"]
    facts = knowledge.quantisations.get(quant)
    bits = facts.bits_per_weight if facts else 16.0
    size = gguf_bytes(spec, bits)
    tokens = situation.scenario.goal.context_tokens or rules["quantisation"]["default_context"]
    running = size + cache_bytes(spec, tokens) + from_gib(rules["quantisation"]["overhead_gib"])
    room = None
    if situation.goal.device_bytes is not None:
        room = round(situation.goal.device_bytes * rules[situation.goal.deploy]["share"])
    return FileChoice(
        quant=quant, file_bytes=size, running_bytes=running, room_bytes=room,
        fits=room is None or running <= room, bits=bits, reason=why,
    )  # fmt: skip
