"""Writes a made plan as a run folder, or refuses to, with the reason.

Goes in: a Plan. Comes out: the run folder, with a copy of what its recipes name beside the data: a file of
reward code, a JSON schema, the adapter that is trained further. Never does: change the plan.
"""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import msgspec

from advisor.errors import InputError, RefusedError
from advisor.probe.software import installed_packages
from advisor.recipe import EARLIER, recipes_of
from advisor.recommend.situation import REWARDS
from advisor.run.folder import create_run_folder, default_name
from advisor.storage import write_atomic
from advisor.types import Plan, Recipe, Scenario

SEED = 42
DATA_FLAWS = (
    "no_contrast", "needs_nonzero_success", "tools_column", "chat_template", "dedupe",
    "likelihood_displacement",
)  # fmt: skip
"""Warnings about data that are to be mended first."""
OWN_REWARD = "own_reward.py"
"""The person's reward file in the run folder, which is moved whole."""


def require_trainable(plan: Plan, scenario: Scenario) -> None:
    """Refuse a plan that should not be trained as asked, unless the person forces it.

    Raises:
        RefusedError: nothing fits, or the advice is to do something else first.
    """
    if not plan.stages:
        raise RefusedError(f"There is nothing to train: {plan.summary}", _next_step(plan), code=plan.verdict)
    _require_reward(plan)
    if plan.verdict != "train" and not scenario.goal.force:
        chain = " then ".join(dict.fromkeys(stage.objective for stage in plan.stages))
        raise RefusedError(
            f"Not advised as asked ({plan.verdict}): {plan.summary}",
            f"{_next_step(plan)} To take this plan ({plan.method}, {chain}) as it is, add --force.",
            code=plan.verdict,
        )


def _require_reward(plan: Plan) -> None:
    """Refuse reinforcement in which nothing says how good an answer is.

    Raises:
        RefusedError: prompts without answers, no reward model before, no reward named.
    """
    kinds = {profile.name: profile.kind for profile in plan.datasets}
    judged = any(stage.objective == "reward" for stage in plan.stages)
    for stage in plan.stages:
        if stage.objective not in ("rloo", "grpo") or judged:
            continue
        answered = any(kinds.get(name) == "prompts_with_answers" for name in stage.datasets)
        if not answered and not any(stage.settings.get(name) for name in REWARDS):
            raise RefusedError(
                f"{stage.objective} needs to know how good an answer is, and these prompts come without "
                "answers.",
                "Add answers to the prompts, pairs for a reward model, --set reward_functions=length (see: "
                "ftadvisor explain reward_functions), or --set reward_file=FILE.py of your own.",
                code="no_reward",
            )


def write_plan(plan: Plan, out: Path | None, now: datetime) -> Path:
    """Write the run folder (default: a name made of model, method and time, here) and return it.

    Raises:
        InputError: a file that a setting names is missing.
        RefusedError, DiskError: the folder is in use, or cannot be written.
    """
    recipes = recipes_of(plan, packages=installed_packages(), seed=SEED)
    found = [_with_files(recipe) for recipe in recipes]
    folder = create_run_folder(
        out or Path(default_name(plan, now)), plan, tuple(recipe for recipe, _ in found)
    )
    if plan.start is not None and plan.start.result == "adapter":
        shutil.copytree(Path(plan.start.folder) / "adapter", folder / EARLIER / "adapter")
    for _, code in found:
        if code is not None:
            write_atomic(folder / OWN_REWARD, code)
    return folder


def _with_files(recipe: Recipe) -> tuple[Recipe, bytes | None]:
    """Return a recipe that names nothing outside its folder but data and models, and the reward file's
    content."""
    settings, code = dict(recipe.settings), None
    if isinstance(name := settings.get("reward_file"), str):
        code = _content("reward_file", Path(name))
        settings["reward_file"] = OWN_REWARD
    if isinstance(name := settings.get("reward_schema"), str) and not name.lstrip().startswith(("{", "true")):
        settings["reward_schema"] = _content("reward_schema", Path(name)).decode()
    name = settings.get("reward_model")
    if isinstance(name, str) and not name.startswith("stages/"):
        settings["reward_model"] = str(Path(name).resolve())
    return msgspec.structs.replace(recipe, settings=settings), code


def _content(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise InputError(
            f"{setting}={file} cannot be read: {problem.strerror}.", f"Correct --set {setting}=FILE."
        ) from problem


def _next_step(plan: Plan) -> str:
    if plan.alternatives:
        return plan.alternatives[0].message
    musts = [one for one in plan.warnings if one.severity == "must" and not one.handled]
    flaws = [one for one in musts if one.code in DATA_FLAWS] if plan.verdict == "fix_data_first" else []
    return (flaws or musts)[0].remedy if musts else "Look at the whole plan with --dry-run."
