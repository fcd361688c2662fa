"""What may stand in a scenario file: its tables, keys and bounds.

Goes in: plain values (already parsed YAML). Comes out: entries, or an error that names the key and the valid
ones. Never does: fill anything in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from advisor.errors import UnknownNameError, UsageError
from advisor.types import DataKind, Record, Value

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
REMEDY = "The keys and their values: ftadvisor explain scenario"


class HardwareEntry(Record, frozen=True, kw_only=True):
    """The `hardware` table of a scenario file."""

    accelerator: str | None = "none"
    vendor: Literal["nvidia", "amd", "apple", "intel"] | None = None
    count: Annotated[int, msgspec.Meta(ge=0)] = 1
    memory_gib: Positive | None = None
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)?$")] | Positive | None = None
    bf16: bool | None = None
    ram_gib: Positive | None = None
    cpu_cores: Annotated[int, msgspec.Meta(ge=1)] | None = None


class DatasetEntry(Record, frozen=True, kw_only=True):
    """One entry of the `datasets` list of a scenario file."""

    kind: DataKind
    name: str | None = None
    rows: Count = 0
    mean_tokens: Positive | None = None
    p95_tokens: Positive | None = None
    size_mb: Positive | None = None
    languages: tuple[str, ...] | str = ()
    classes: Annotated[int, msgspec.Meta(ge=2)] | None = None
    tasks: Annotated[int, msgspec.Meta(ge=1)] | None = None
    task_rows: tuple[Count, ...] = ()
    tenants: Count | None = None
    holdout_rows: Count | None = None
    duplicate_fraction: Share | None = None
    mixed_templates: bool = False
    has_tools_column: bool | None = None
    on_policy: bool | None = None
    positive_fraction: Share | None = None
    pair_similarity: Share | None = None
    baseline_pass_rate: Share | None = None
    role: Literal["train", "earlier_task"] = "train"


class GoalEntry(Record, frozen=True, kw_only=True):
    """The `goal` table of a scenario file."""

    text: str = ""
    deploy: str = ""
    priorities: tuple[str, ...] | str = ()
    context_tokens: Annotated[int, msgspec.Meta(gt=0)] | None = None
    commercial: bool | None = None
    must_not_forget: bool = False
    requested_method: str | None = None
    storage_per_task_kb: Positive | None = None
    max_hours: Positive | None = None
    force: bool = False


class ScenarioEntry(Record, frozen=True, kw_only=True):
    """A scenario file."""

    hardware: HardwareEntry
    model: str
    model_state: Literal["own_sft", "merged", "has_adapter"] | None = None
    datasets: tuple[DatasetEntry, ...] = ()
    goal: GoalEntry = GoalEntry()
    overrides: dict[str, Value] = {}


def decode_entry(data: object, kind: type[T], where: str) -> T:
    """Decode one table.

    Raises:
        UnknownNameError: a key is not known; the nearest are named.
        UsageError: a value is of the wrong type or out of bounds.
    """
    _check_keys(data, kind, where)
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as problem:
        raise UsageError(f"The {where} is not valid: {problem}", REMEDY) from problem


def _check_keys(data: object, kind: Any, where: str) -> None:
    """Name an unknown key and its nearest valid ones; the decoder would only say that it is unknown."""
    if not isinstance(data, Mapping):
        raise UsageError(
            f"The {where} must be a table of key: value, not {type(data).__name__}.",
            f"Keys: {', '.join(kind.__struct_fields__)}",
        )
    for key, value in data.items():
        if key not in kind.__struct_fields__:
            raise UnknownNameError(f"key in {where}", str(key), kind.__struct_fields__, REMEDY)
        if kind is ScenarioEntry and key == "hardware":
            _check_keys(value, HardwareEntry, "hardware")
        if kind is ScenarioEntry and key == "goal":
            _check_keys(value, GoalEntry, "goal")
        if kind is ScenarioEntry and key == "datasets" and isinstance(value, list):
            for number, item in enumerate(value, start=1):
                _check_keys(item, DatasetEntry, f"datasets, entry {number}")
