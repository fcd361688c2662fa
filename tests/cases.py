"""Builds scenarios for tests of the judgement in a few words, on the real knowledge base.

Goes in: what differs from an ordinary case. Comes out: Scenario. Never does: probe or open anything.
"""

from __future__ import annotations

from typing import Any

from advisor.knowledge import Knowledge, load
from advisor.plan import make_plan
from advisor.scenario import decode_scenario
from advisor.types import Plan, Scenario

RTX_4090 = {"accelerator": "RTX 4090", "memory_gib": 24, "compute_capability": "8.9", "bf16": True}
RTX_3060 = {"accelerator": "RTX 3060", "memory_gib": 12, "compute_capability": "8.6", "bf16": True}
A100 = {"accelerator": "A100", "memory_gib": 80, "compute_capability": "8.0", "bf16": True}
T4 = {"accelerator": "T4", "memory_gib": 16, "compute_capability": "7.5", "bf16": False}
M2 = {"accelerator": "M2", "vendor": "apple", "memory_gib": 16, "ram_gib": 16}
CPU = {"accelerator": "none", "ram_gib": 32, "cpu_cores": 8}
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def rows(kind: str = "instruction", count: int = 4000, **more: Any) -> dict[str, Any]:
    """One dataset entry."""
    return {"kind": kind, "rows": count, "mean_tokens": 300, **more}


def scenario(
    *datasets: dict[str, Any], hardware: dict[str, Any] = RTX_4090, model: str = "Qwen/Qwen3-8B",
    knowledge: Knowledge | None = None, overrides: dict[str, Any] | None = None,
    state: str | None = None, **goal: Any,
) -> Scenario:  # fmt: skip
    """Decode one scenario; keyword arguments beyond the named ones go into the goal."""
    data: dict[str, Any] = {
        "hardware": hardware, "model": model, "datasets": list(datasets), "goal": goal,
        "overrides": overrides or {},
    }  # fmt: skip
    if state:
        data["model_state"] = state
    return decode_scenario(data, knowledge or load())


def plan(*datasets: dict[str, Any], **options: Any) -> Plan:
    """Plan one scenario on the real knowledge base."""
    return make_plan(scenario(*datasets, **options), load())


def codes(made: Plan) -> set[str]:
    """Codes of a plan's warnings."""
    return {warning.code for warning in made.warnings}


def chain(made: Plan) -> list[str]:
    """Objectives of a plan's stages."""
    return [stage.objective for stage in made.stages]


def rejected(made: Plan, method: str) -> str:
    """The reasons why a method was rejected, in one string; empty when it was not."""
    found = [c for c in made.candidates if c.method == method and c.verdict == "rejected"]
    return " ".join(reason for candidate in found for reason in candidate.reasons)
