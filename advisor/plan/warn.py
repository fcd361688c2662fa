"""Which risks must or should the person know, in words, with the way out?

Goes in: a Case and kb/warnings.toml. Comes out: PlanWarning records, the musts first. One small function
a code says when it applies and with which figures; the texts live in kb. Never does: change the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from advisor.errors import KnowledgeError
from advisor.knowledge import Knowledge
from advisor.plan import warn_data, warn_machine, warn_method
from advisor.plan.case import Case
from advisor.types import PlanWarning
from advisor.units import format_bytes, format_count, format_seconds, gib

Check = Callable[[Case, Knowledge], "dict[str, Any] | None"]
CHECKS: tuple[tuple[str, Check], ...] = (*warn_method.CHECKS, *warn_data.CHECKS, *warn_machine.CHECKS)


class _Values(dict[str, Any]):
    """Placeholders of a text; one that the case cannot fill is a mistake in kb."""

    def __missing__(self, key: str) -> str:
        raise KnowledgeError(
            f"kb/warnings.toml uses the placeholder {{{key}}}, which no plan provides.",
            f"Use one of: {', '.join(sorted(self))}",
        )


def warnings_of(case: Case, knowledge: Knowledge) -> tuple[PlanWarning, ...]:
    """Return all warnings that apply, musts first, each once."""
    found: list[PlanWarning] = []
    common = _common(case)
    for code, check in CHECKS:
        values = check(case, knowledge)
        if values is not None:
            found.append(_warning(code, {**common, **values}, knowledge))
    return tuple(sorted(found, key=lambda warning: warning.severity != "must"))


def _warning(code: str, values: dict[str, Any], knowledge: Knowledge) -> PlanWarning:
    facts = knowledge.warnings.get(code)
    if facts is None:
        raise KnowledgeError(f"kb/warnings.toml has no table [{code}].", "Restore it from the distribution.")
    detail = values.pop("detail", "")
    filled = _Values(values)
    message = facts.message.format_map(filled)
    if detail:
        message = f"{message.rstrip('.')}: {detail}."
    return PlanWarning(
        code=code, severity=values.get("severity", facts.severity), message=message,
        remedy=facts.remedy.format_map(filled), source=facts.source,
        handled=values.get("handled", facts.handled),
    )  # fmt: skip


def _common(case: Case) -> dict[str, Any]:
    """Figures that any text may use."""
    situation = case.situation
    high = max([stage.estimate.peak_bytes.high for stage in case.stages], default=0.0)
    return {
        "model": case.spec.id if case.spec else situation.named.asked, "asked": situation.named.asked,
        "method": case.tuner, "rows": f"{case.rows:,}", "device": situation.machine.name,
        "needed_gib": f"{gib(high):.1f}", "available_gib": f"{gib(situation.machine.free_bytes):.1f}",
        "free": format_bytes(situation.machine.free_bytes), "peak": format_bytes(high),
        "ram": format_bytes(situation.machine.ram_bytes), "gpus": situation.machine.gpus,
        "time": format_seconds(case.seconds()), "tokens": f"{case.longest():,}",
        "parameters": format_count(case.spec.parameters) if case.spec else "",
        "licence": (case.spec.licence or "unknown") if case.spec else "",
        "quant": case.export.quant if case.export else "",
        "family": case.spec.family if case.spec else "", "shorter": max(1, case.longest() // 2),
    }  # fmt: skip
