"""The figures by which a running training is judged: kb/rules/policy.toml as typed records.

Goes in: the tables of that file. Comes out: Thresholds. Never does: judge; hold a figure of its own.
"""

from __future__ import annotations

from typing import Any

import msgspec

from advisor.errors import KnowledgeError
from advisor.types import Record


class _Sourced(Record, frozen=True, kw_only=True):
    source: str
    checked: str
    verified: bool = True


class LadderRules(_Sourced, frozen=True, kw_only=True):
    """What may be changed after running out of memory, in which order."""

    order: tuple[str, ...]
    optimizer_tuners: tuple[str, ...]
    chunked_objectives: tuple[str, ...]
    fixed_micro_batch_objectives: tuple[str, ...]
    no_checkpointing_tuners: tuple[str, ...]
    paged_devices: tuple[str, ...]
    shorter_factor: float
    shortest_tokens: int
    killed_memory_share: float


class RateRules(_Sourced, frozen=True, kw_only=True):
    """How a learning rate is lowered."""

    divide_by: float
    most_times: int


class LossRules(_Sourced, frozen=True, kw_only=True):
    """When a loss is called zero, flat or diverging."""

    window: int
    zero_steps: int
    diverging_factor: float
    flat_after_share: float
    flat_after_steps: int
    flat_change: float


class GradientRules(_Sourced, frozen=True, kw_only=True):
    """When gradients are called exploding."""

    exploding_norm: float
    exploding_steps: int


class HeldoutRules(_Sourced, frozen=True, kw_only=True):
    """When training on is called of no use."""

    worse_by: float
    patience: int


class ReinforcementRules(_Sourced, frozen=True, kw_only=True):
    """When a run against rewards goes astray."""

    kl_runaway: float
    kl_steps: int
    cut_off_share: float
    cut_off_steps: int
    entropy_collapse: float
    entropy_steps: int
    no_reward_steps: int


class PreferenceRules(_Sourced, frozen=True, kw_only=True):
    """When a run on pairs goes astray."""

    displaced_reward: float
    low_accuracy: float
    after_steps: int


class MachineRules(_Sourced, frozen=True, kw_only=True):
    """When the machine does not do what it did."""

    slow_factor: float
    slow_steps: int
    disk_checkpoints: float
    slept_seconds: float
    hot_clock_share: float
    hot_sensors: tuple[str, ...]
    hot_looks: int
    hot_steps: int


class ForgettingRules(_Sourced, frozen=True, kw_only=True):
    """When too much of an earlier task was lost, or too little was learned, for a run to be a success."""

    kept_at_least: float
    exact_from: float
    loss_kept_at_least: float
    loss_rise_at_most: float
    loss_fall_at_least: float


class Thresholds(Record, frozen=True, kw_only=True):
    """All of kb/rules/policy.toml."""

    ladder: LadderRules
    rate: RateRules
    loss: LossRules
    gradient: GradientRules
    heldout: HeldoutRules
    forgetting: ForgettingRules
    reinforcement: ReinforcementRules
    preference: PreferenceRules
    machine: MachineRules


def thresholds_of(rules: dict[str, Any]) -> Thresholds:
    """Return the tables of kb/rules/policy.toml as records.

    Raises:
        KnowledgeError: a table or key is missing, unknown or of the wrong type.
    """
    try:
        return msgspec.convert(rules, Thresholds)
    except msgspec.ValidationError as problem:
        raise KnowledgeError(f"kb/rules/policy.toml: {problem}", "Correct it there.") from problem
