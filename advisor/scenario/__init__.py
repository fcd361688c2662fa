"""What was declared: reads a scenario file's values, a hardware name and a model name into records.

Goes in: plain values (already parsed YAML) and the knowledge base. Comes out: Scenario, Hardware, ModelSpec.
Never does: look at the machine, open a file, judge.
"""

from __future__ import annotations

import msgspec

from advisor.errors import UsageError
from advisor.knowledge import Knowledge
from advisor.scenario.entries import DatasetEntry, ScenarioEntry, decode_entry
from advisor.scenario.hardware import declared_hardware, hardware_of
from advisor.scenario.models import NamedModel, base_twin, name_model, spec_for
from advisor.types import DatasetProfile, Goal, Scenario

__all__ = [
    "NamedModel",
    "base_twin",
    "declared_hardware",
    "decode_scenario",
    "name_model",
    "spec_for",
]


def decode_scenario(data: object, knowledge: Knowledge) -> Scenario:
    """Read the parsed YAML of a scenario file.

    Args:
        data: what the YAML loader returned.
        knowledge: fills in what is left out of the hardware.

    Raises:
        UsageError: an unknown key, a wrong type or a value out of range, named with the valid ones.
        UnknownNameError: the accelerator has no known name and no size was given.
    """
    entry = decode_entry(data, ScenarioEntry, "scenario")
    goal = entry.goal
    return Scenario(
        hardware=hardware_of(entry.hardware, knowledge),
        model=entry.model.strip(),
        datasets=_profiles(entry.datasets),
        goal=Goal(
            text=goal.text, deploy=goal.deploy, priorities=_words(goal.priorities),
            context_tokens=goal.context_tokens, commercial=goal.commercial,
            must_not_forget=goal.must_not_forget, requested_method=goal.requested_method,
            storage_per_task_kb=goal.storage_per_task_kb, max_hours=goal.max_hours,
            model_state=entry.model_state, force=goal.force,
        ),
        overrides=entry.overrides,
    )  # fmt: skip


def _words(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _profiles(entries: tuple[DatasetEntry, ...]) -> tuple[DatasetProfile, ...]:
    """Profiles in an order that depends on what they hold only, with a name each."""
    found: list[DatasetProfile] = []
    taken: set[str] = set()
    for entry in sorted(entries, key=lambda e: msgspec.json.encode(e)):
        base = entry.name or entry.kind
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        found.append(_profile(entry, name))
    return tuple(found)


def _profile(entry: DatasetEntry, name: str) -> DatasetProfile:
    if entry.p95_tokens and entry.mean_tokens and entry.p95_tokens < entry.mean_tokens:
        raise UsageError(
            f"{name}: p95_tokens {entry.p95_tokens:g} lies below mean_tokens {entry.mean_tokens:g}.",
            "95% of the rows have at most p95_tokens tokens; give both from the same count.",
        )
    return DatasetProfile(
        name=name, origin="declared", kind=entry.kind, rows=entry.rows,
        bytes=None if entry.size_mb is None else round(entry.size_mb * 1000**2),
        mean_tokens=entry.mean_tokens,
        p95_tokens=None if entry.p95_tokens is None else round(entry.p95_tokens),
        languages=_words(entry.languages), classes=entry.classes, tasks=entry.tasks,
        task_rows=entry.task_rows, tenants=entry.tenants, holdout_rows=entry.holdout_rows,
        duplicate_fraction=entry.duplicate_fraction, mixed_templates=entry.mixed_templates,
        has_tools_column=entry.has_tools_column, on_policy=entry.on_policy,
        positive_fraction=entry.positive_fraction, pair_similarity=entry.pair_similarity,
        baseline_pass_rate=entry.baseline_pass_rate, role=entry.role,
    )  # fmt: skip
