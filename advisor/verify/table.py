"""Which of the exported files should one take?

Goes in: the files, their proofs, the plan with its goal. Comes out: a row for each file, one of them
recommended. Never does: invent a figure: what was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from advisor.goals import understand
from advisor.knowledge import Knowledge
from advisor.running import FileFacts, read_facts
from advisor.types import Check, Export, ExportedFile, FileRow, Plan, Verification
from advisor.units import from_gib


def file_table(
    made: Export, proofs: Sequence[Verification], plan: Plan | None, knowledge: Knowledge
) -> tuple[FileRow, ...]:
    """Return a row for each GGUF model file; at most one is recommended.

    Args:
        made: What was exported.
        proofs: Of the files; without one, its measured figures are left out.
        plan: Of the run, whose goal names the device; None for a plain folder.
        knowledge: Rules of quantisation and devices.
    """
    by_path = {proof.gguf: proof for proof in proofs}
    files = [file for file in made.files if file.kind == "gguf"]
    rows = [_row(file, by_path.get(file.path), plan, knowledge) for file in files]
    chosen = recommended(rows, None if plan is None or plan.export is None else plan.export.quant, knowledge)
    return tuple(msgspec.structs.replace(row, recommended=True) if row is chosen else row for row in rows)


def _row(file: ExportedFile, proof: Verification | None, plan: Plan | None, knowledge: Knowledge) -> FileRow:
    checks = {} if proof is None else {check.name: check for check in proof.checks}
    running = _running_bytes(read_facts(Path(file.path)), plan, knowledge)
    room = _room(plan, knowledge)
    return FileRow(
        path=file.path,
        quant=str(file.quant),
        importance=file.importance,
        bytes=file.bytes,
        bits_per_weight=file.bits_per_weight or 0.0,
        proved=None if proof is None else proof.passed,
        kl_mean=_figure(checks.get("logits"), "kl_mean"),
        top1=_figure(checks.get("logits"), "top1"),
        perplexity_change=_figure(checks.get("logits"), "perplexity_change"),
        tokens_per_second=_figure(checks.get("greedy_text"), "tokens_per_second"),
        running_bytes=running,
        fits=None if room is None else running <= room,
    )


def _figure(check: Check | None, name: str) -> float | None:
    value = None if check is None else check.measured.get(name)
    return float(value) if isinstance(value, int | float) else None


def _running_bytes(facts: FileFacts, plan: Plan | None, knowledge: Knowledge) -> int:
    """Return file, key-value cache of the wanted context in 16 bits, and overhead."""
    rules = knowledge.rules["deploy"]["quantisation"]
    wanted = (plan.goal.context_tokens if plan else None) or rules["default_context"]
    tokens = min(wanted, facts.trained_tokens)
    return facts.file_bytes + 2 * tokens * facts.layers * facts.cache_width + from_gib(rules["overhead_gib"])


def _room(plan: Plan | None, knowledge: Knowledge) -> int | None:
    """Return the memory that the model may take on the device that the goal names."""
    if plan is None:
        return None
    goal = understand(plan.goal, knowledge)
    if goal.device_bytes is None:
        return None
    share: float = knowledge.rules["deploy"][goal.deploy]["share"]
    return round(goal.device_bytes * share)


def recommended(rows: Sequence[FileRow], planned: str | None, knowledge: Knowledge) -> FileRow | None:
    """Return the plan's choice where it holds, else the smallest that loses little, else the best one."""
    usable = [row for row in rows if row.proved is not False and row.fits is not False]
    for row in usable:
        if row.quant == planned:
            return row
    accepted = knowledge.rules["deploy"]["quantisation"]["accepted_perplexity"]
    near = [row for row in usable if row.perplexity_change is not None and row.perplexity_change <= accepted]
    if near:
        return min(near, key=lambda row: row.bytes)
    measured = [row for row in usable if row.kl_mean is not None]
    return min(measured, key=lambda row: row.kl_mean or 0.0, default=None)
