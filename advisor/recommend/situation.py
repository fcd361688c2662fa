"""What is the case in front of us: machine, data and wish, reduced to the figures that the rules ask for?

Goes in: a Scenario and the knowledge base. Comes out: Situation. Never does: decide anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from advisor.errors import KnowledgeError
from advisor.goals import understand
from advisor.knowledge import Knowledge
from advisor.scenario import NamedModel, name_model
from advisor.types import (
    AcceleratorFacts,
    DataKind,
    DatasetProfile,
    Hardware,
    ModelSpec,
    Objective,
    Record,
    Scenario,
    UnderstoodGoal,
)

Device = Literal["cuda", "cpu", "mps"]
Precision = Literal["bf16", "fp16", "fp32"]
DEMONSTRATIONS: frozenset[DataKind] = frozenset(
    {"instruction", "chat", "prompt_completion", "qa", "classification", "tool_calling", "reasoning_chat"}
)
TEXT: frozenset[DataKind] = frozenset({"raw_text", "documents"})
MEGABYTE = 1000**2
REWARDS = ("reward_functions", "reward_file", "reward_model")
"""Settings that name what gives marks to answers."""


class Machine(Record, frozen=True, kw_only=True):
    """What the training device can do."""

    name: str
    device: Device
    vendor: str
    gpus: int
    free_bytes: int
    """Memory of one device that training may fill."""
    ram_bytes: int
    bf16: bool
    flash: bool
    bitsandbytes: bool
    facts: AcceleratorFacts | None = None

    @property
    def precision(self) -> Precision:
        """Compute precision that this device does natively."""
        if self.device == "cpu":
            return "bf16" if self.bf16 else "fp32"
        return "bf16" if self.bf16 else "fp16"


class Situation(Record, frozen=True, kw_only=True):
    """The case, in figures."""

    scenario: Scenario
    goal: UnderstoodGoal
    named: NamedModel
    spec: ModelSpec | None
    """The model asked for; None when it must be chosen."""
    machine: Machine
    train: tuple[DatasetProfile, ...]
    earlier: tuple[DatasetProfile, ...]
    demos: tuple[DatasetProfile, ...]
    pairs: tuple[DatasetProfile, ...]
    unpaired: tuple[DatasetProfile, ...]
    prompts: tuple[DatasetProfile, ...]
    """Prompts without answers."""
    answered: tuple[DatasetProfile, ...]
    """Prompts whose answers can be checked."""
    texts: tuple[DatasetProfile, ...]
    tasks: int
    tenants: int
    separate: bool
    """True when every task or tenant gets an adapter of its own."""
    task_kind: str
    languages: tuple[str, ...]
    force: bool

    @property
    def mixes(self) -> bool:
        """True when rows of several tasks, new or old, go into one training."""
        return bool(self.earlier) or (self.tasks > 1 and not self.separate)

    def wish(self, name: str) -> bool:
        """True when the person asked for this constraint."""
        return name in self.goal.wishes

    @property
    def marked(self) -> bool:
        """True when a program or a reward model gives marks to answers: so it was said, or a setting names
        it."""
        named = {key.rpartition(".")[2] for key in self.scenario.overrides}
        return self.wish("reward_function") or not named.isdisjoint(REWARDS)


def rule(knowledge: Knowledge, file: str, table: str) -> dict[str, Any]:
    """Return one table of kb/rules.

    Raises:
        KnowledgeError: the file or the table is missing.
    """
    try:
        return knowledge.rules[file][table]  # type: ignore[no-any-return]
    except KeyError as missing:
        raise KnowledgeError(
            f"kb/rules/{file}.toml has no table [{table}].", "Restore it from the distribution."
        ) from missing


def read_situation(scenario: Scenario, knowledge: Knowledge) -> Situation:
    """Reduce a scenario to the figures that the rules use; the order of datasets does not matter."""
    datasets = sorted(scenario.datasets, key=lambda d: (d.name, msgspec.json.encode(d)))
    train = tuple(d for d in datasets if d.role == "train")
    goal = understand(scenario.goal, knowledge)
    named = name_model(scenario.model, knowledge)
    if scenario.spec is not None:
        named = NamedModel(asked=scenario.model, how="known", spec=scenario.spec)
    demos = tuple(d for d in train if d.kind in DEMONSTRATIONS)
    tasks = max(sum(task_count(d) for d in demos), 1)
    tenants = max([d.tenants or 1 for d in train], default=1)
    apart = scenario.goal.storage_per_task_kb is not None and tasks > 1
    earlier = tuple(d for d in datasets if d.role == "earlier_task")
    return Situation(
        scenario=scenario, goal=goal, named=named, spec=named.spec,
        machine=read_machine(scenario.hardware, knowledge),
        train=train, earlier=earlier, demos=demos,
        pairs=tuple(d for d in train if d.kind == "preference"),
        unpaired=tuple(d for d in train if d.kind == "unpaired_preference"),
        prompts=tuple(d for d in train if d.kind == "prompts"),
        answered=tuple(d for d in train if d.kind == "prompts_with_answers"),
        texts=tuple(d for d in train if d.kind in TEXT),
        tasks=tasks, tenants=tenants, separate=apart or tenants > 1 or "tenants" in goal.wishes,
        task_kind=_task_kind(goal, demos, earlier, tasks),
        languages=tuple(sorted({code.lower() for d in train for code in d.languages})),
        force=scenario.goal.force,
    )  # fmt: skip


def task_count(dataset: DatasetProfile) -> int:
    """Number of tasks that a dataset holds."""
    listed = len(dataset.task_rows) if dataset.tasks is None else 0
    return max(dataset.tasks or 1, listed, 1)


def rows_of(datasets: Iterable[DatasetProfile]) -> int:
    """Training rows of some datasets, all tasks together."""
    total = 0
    for dataset in datasets:
        tasks = task_count(dataset)
        if len(dataset.task_rows) == tasks:
            total += sum(dataset.task_rows)
        elif dataset.task_rows and not dataset.rows:
            total += round(tasks * sum(dataset.task_rows) / len(dataset.task_rows))
        else:
            declared_tasks = tasks if dataset.origin == "declared" else 1
            total += dataset.rows * declared_tasks
    return total


def counted_rows(objective: Objective, situation: Situation, knowledge: Knowledge) -> int:
    """Rows of one training: of one task where each gets its own adapter, capped where unequal tasks mix."""
    datasets = datasets_of(objective, situation)
    if objective != "sft" or situation.tasks < 2:
        return rows_of(datasets)
    if situation.separate:
        return max(1, rows_of(datasets) // situation.tasks)
    rules = rule(knowledge, "data", "mixture")
    if unequal_ratio(situation) < rules["unequal_ratio"]:
        return rows_of(datasets)
    sizes = [size for d in datasets for size in (d.task_rows or (d.rows,))]
    return sum(min(size, rules["cap_rows"]) for size in sizes)


def megabytes_of(datasets: Iterable[DatasetProfile], knowledge: Knowledge) -> float:
    """Size of text datasets in MB; from rows and tokens where no size is known."""
    total, each = 0.0, float(rule(knowledge, "data", "text_volume")["bytes_per_token"])
    for dataset in datasets:
        if dataset.bytes is not None:
            total += dataset.bytes / MEGABYTE
        else:
            total += dataset.rows * (dataset.mean_tokens or 0.0) * each / MEGABYTE
    return total


def datasets_of(objective: Objective, situation: Situation) -> tuple[DatasetProfile, ...]:
    """The datasets that a stage trains on."""
    if objective == "cpt":
        return tuple(d for d in situation.train if d.kind in TEXT)
    if objective == "sft":
        return situation.demos or (situation.pairs if situation.pairs else situation.answered)
    if objective == "kto":
        return situation.unpaired or situation.pairs
    if objective in ("rloo", "grpo"):
        return situation.answered or situation.prompts or situation.pairs
    return situation.pairs


def unequal_ratio(situation: Situation) -> float:
    """Largest over smallest task, in rows."""
    sizes = [n for d in situation.demos for n in d.task_rows if n]
    sizes += [d.rows for d in situation.demos if d.rows and not d.task_rows]
    return max(sizes) / min(sizes) if len(sizes) > 1 else 1.0


def _task_kind(
    goal: UnderstoodGoal, demos: tuple[DatasetProfile, ...], earlier: tuple[DatasetProfile, ...], tasks: int
) -> str:
    if earlier or "continual" in goal.tasks:
        return "continual"
    if tasks > 1 or "multi_task" in goal.tasks:
        return "multi_task"
    kinds = {d.kind for d in demos}
    for kind, name in (
        ("tool_calling", "tool_calling"),
        ("classification", "classification"),
        ("reasoning_chat", "reasoning"),
    ):
        if kind in kinds:
            return name
    if goal.task in ("tool_calling", "classification", "reasoning"):
        return goal.task
    return "instruction"


def read_machine(hardware: Hardware, knowledge: Knowledge) -> Machine:
    """Reduce a machine to what decides about training on it."""
    rules = knowledge.rules["platform"]
    if not hardware.accelerators:
        fast = set(hardware.cpu_features) & set(rules["cpu"]["bf16_features"])
        return Machine(
            name=hardware.cpu_name or "CPU", device="cpu", vendor="cpu", gpus=1,
            free_bytes=round(hardware.ram_free_bytes * rules["cpu"]["memory_share"]),
            ram_bytes=hardware.ram_bytes, bf16=bool(fast), flash=False, bitsandbytes=True,
        )  # fmt: skip
    card = max(hardware.accelerators, key=lambda a: (a.free_bytes * a.count, a.name))
    facts = knowledge.accelerators.get(card.kb_id) if card.kb_id else None
    capability = float(card.compute_capability) if card.compute_capability else None
    limits = rules["nvidia"]
    flash = facts.flash_attention if facts else card.vendor == "nvidia" and card.supports_bf16
    if card.vendor == "nvidia" and capability is not None:
        flash = capability >= limits["flash_from"]
    quantises = facts.bitsandbytes if facts else card.vendor == "nvidia"
    if card.vendor == "nvidia" and capability is not None:
        quantises = capability >= limits["bitsandbytes_from"]
    return Machine(
        name=card.name, device="mps" if card.vendor == "apple" else "cuda", vendor=card.vendor,
        gpus=card.count, free_bytes=card.free_bytes, ram_bytes=hardware.ram_bytes,
        bf16=card.supports_bf16, flash=flash and card.vendor != "apple",
        bitsandbytes=quantises and card.vendor != "apple", facts=facts,
    )  # fmt: skip
