"""What to change when a training ran out of memory: one rung at a time, the cheapest first.

Goes in: the settings of the attempt that failed and the rules of kb/rules/policy.toml. Comes out: the next
rung with the settings that it changes, or None when there is none left. Never does: I/O; change the effective
batch; raise what a setting needs; take a rung that needs consent by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from advisor.run.thresholds import LadderRules
from advisor.types import Record, Value

Settings = Mapping[str, Value]
CONSENT = {"shorter_sequences": "shorter-sequences"}
"""Rung -> the word by which a person allows it: `run --allow shorter-sequences`."""
NEEDS_PLAN = ("four_bit",)
"""Rungs that change what is trained, and so need a new plan."""


class Trainee(Record, frozen=True, kw_only=True):
    """What is trained and where, as far as a rung depends on it."""

    objective: str
    tuner: str
    device: str = "cpu"
    """As the program names it: cpu, cuda:0, mps."""
    bitsandbytes: bool = False
    """Whether 8-bit optimisers are installed."""


class Rung(Record, frozen=True, kw_only=True):
    """One step down."""

    name: str
    changes: dict[str, Value]
    words: str
    """What is done and what it costs, in words."""
    consent: str = ""
    """The word by which a person must have allowed it; empty when none is needed."""


def next_rung(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    """Return the first rung that is left, in the order of the rules.

    Args:
        settings: of the attempt that ran out of memory.
        trainee: what it trains and where.
        rules: the ladder of kb/rules/policy.toml.
    """
    for name in rules.order:
        rung = RUNGS[name](settings, trainee, rules)
        if rung is not None:
            return rung
    return None


def _micro_batch(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    micro, effective = _whole(settings, "micro_batch"), _whole(settings, "effective_batch")
    if micro <= 1 or trainee.objective in rules.fixed_micro_batch_objectives:
        return None
    smaller = max(size for size in range(1, micro // 2 + 1) if effective % size == 0)
    return Rung(
        name="micro_batch",
        changes={"micro_batch": smaller},
        words=f"{smaller} instead of {micro} rows in memory at a time, accumulated over "
        f"{effective // smaller} instead of {effective // micro} passes: the same {effective} rows a step",
    )


def _gradient_checkpointing(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    if settings.get("gradient_checkpointing") or trainee.tuner in rules.no_checkpointing_tuners:
        return None
    return Rung(
        name="gradient_checkpointing",
        changes={"gradient_checkpointing": True},
        words="activations are computed again in the backward pass: the same result, about a third slower",
    )


def _chunked_loss(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    if settings.get("loss") != "full_logits" or trainee.objective not in rules.chunked_objectives:
        return None
    return Rung(
        name="chunked_loss",
        changes={"loss": "chunked"},
        words="the loss is computed in chunks: the same figure without the whole table of logits",
    )


def _optimizer_8bit(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    if (
        settings.get("optimizer", "adamw_torch") != "adamw_torch"
        or trainee.tuner not in rules.optimizer_tuners
        or not trainee.bitsandbytes
    ):
        return None
    return Rung(
        name="optimizer_8bit",
        changes={"optimizer": "adamw_8bit"},
        words="the optimiser holds its two moments in 8 bits; they begin anew at the checkpoint",
    )


def _paged_optimizer(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    if settings.get("optimizer") != "adamw_8bit" or not _on(trainee.device, rules.paged_devices):
        return None
    return Rung(
        name="paged_optimizer",
        changes={"optimizer": "paged_adamw_8bit"},
        words="the optimiser's moments move to the host's memory when the card is full; they begin anew",
    )


def _shorter_sequences(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    longest = _whole(settings, "max_seq_len")
    shorter = max(rules.shortest_tokens, int(longest * rules.shorter_factor) // 8 * 8)
    if shorter >= longest:
        return None
    return Rung(
        name="shorter_sequences",
        changes={"max_seq_len": shorter},
        words=f"rows of at most {shorter} instead of {longest} tokens; longer ones are cut or left out, so "
        "that other rows are trained on than planned",
        consent=CONSENT["shorter_sequences"],
    )


def _four_bit(settings: Settings, trainee: Trainee, rules: LadderRules) -> Rung | None:
    if trainee.tuner != "lora":
        return None
    return Rung(
        name="four_bit",
        changes={},
        words="the base in 4 bits (qlora) would need a quarter of the memory for it; that is another plan",
        consent="a new plan",
    )


def _whole(settings: Settings, name: str) -> int:
    value = settings.get(name)
    return value if isinstance(value, int) else 0


def _on(device: str, kinds: tuple[str, ...]) -> bool:
    return any(device.startswith(kind) for kind in kinds)


RUNGS: dict[str, Callable[[Settings, Trainee, LadderRules], Rung | None]] = {
    "micro_batch": _micro_batch,
    "gradient_checkpointing": _gradient_checkpointing,
    "chunked_loss": _chunked_loss,
    "optimizer_8bit": _optimizer_8bit,
    "paged_optimizer": _paged_optimizer,
    "shorter_sequences": _shorter_sequences,
    "four_bit": _four_bit,
}
