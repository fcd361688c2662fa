"""Writes a made plan as a run folder, or refuses to, with the reason.

Goes in: a Plan. Comes out: the run folder. Never does: change the plan.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from advisor.errors import ModelError, RefusedError
from advisor.probe.software import installed_packages
from advisor.recipe import recipes_of
from advisor.run.folder import create_run_folder, default_name
from advisor.types import Plan, Scenario

SEED = 42


def require_trainable(plan: Plan, scenario: Scenario) -> None:
    """Refuse a plan that should not be trained as asked, unless the person forces it.

    Raises:
        ModelError: the model cannot be taught turns.
        RefusedError: nothing fits, or the advice is to do something else first.
    """
    findings = scenario.spec.findings if scenario.spec else ()
    turns = any(stage.objective != "cpt" for stage in plan.stages) and plan.method != "classifier_head"
    if turns and any(finding.code == "no_chat_template" for finding in findings):
        raise ModelError(
            f"{scenario.model} has no chat template, so it is not known how it marks questions and answers.",
            "Choose the instruction-tuned model of the family (its name often ends in -Instruct or -it), or "
            "put its chat_template.jinja into the folder.",
            code="chat_template",
        )
    if not plan.stages:
        raise RefusedError(f"There is nothing to train: {plan.summary}", _next_step(plan), code=plan.verdict)
    if plan.verdict != "train" and not scenario.goal.force:
        raise RefusedError(
            f"Not advised as asked ({plan.verdict}): {plan.summary}",
            f"{_next_step(plan)} To take this plan as it is, add --force.",
            code=plan.verdict,
        )


def write_plan(plan: Plan, out: Path | None, now: datetime) -> Path:
    """Write the run folder (default: a name made of model, method and time, here) and return it."""
    recipes = recipes_of(plan, packages=installed_packages(), seed=SEED)
    return create_run_folder(out or Path(default_name(plan, now)), plan, recipes)


def _next_step(plan: Plan) -> str:
    if plan.alternatives:
        return plan.alternatives[0].message
    musts = [warning.remedy for warning in plan.warnings if warning.severity == "must"]
    return musts[0] if musts else "Look at the whole plan with --dry-run."
