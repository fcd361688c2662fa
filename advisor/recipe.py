"""The file that a training program runs: all settings of one stage, for a person to read, edit and run again.

Goes in: a Plan, or the bytes of a recipe file. Comes out: Recipe records, or byte-stable YAML. Checks a
recipe against the keys that its program accepts. Never does: read or write files; choose a setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import yaml

from advisor.errors import InputError, UnknownNameError, UsageError
from advisor.programs import check_value
from advisor.storage import encode_yaml
from advisor.types import (
    DatasetProfile,
    Plan,
    PlanModel,
    Program,
    Recipe,
    RecipeDataset,
    RecipeModel,
    RecipeParallel,
    Stage,
    StartFrom,
)

HEADER = """\
# A training recipe of ftadvisor: program {program}, {objective} with {tuner}.
# The reason of every setting is in plan.json beside it.
# Edit the settings and run it again: ftadvisor run FOLDER
"""


EARLIER = "stages/0-earlier"
"""In a run folder: the result of the run that is continued."""


def recipes_of(plan: Plan, *, packages: Mapping[str, str], seed: int) -> tuple[Recipe, ...]:
    """Return one recipe for each stage of a plan.

    Args:
        plan: with a model and stages; a plan without stages gives no recipes.
        packages: name -> version installed now, kept as information.
        seed: of every random choice in training.
    """
    if plan.model is None:
        return ()
    return tuple(
        _recipe(number, plan, plan.model, packages, seed) for number in range(1, len(plan.stages) + 1)
    )


def _before(number: int, stages: Sequence[Stage], *, marks: bool) -> str | None:
    """Return the folder of the nearest earlier stage that trained the model itself, or (`marks`) its
    judge."""
    for earlier in range(number - 1, 0, -1):
        objective = stages[earlier - 1].objective
        if (objective == "reward") is marks:
            return f"stages/{earlier}-{objective}"
    return None


def _recipe(number: int, plan: Plan, model: PlanModel, packages: Mapping[str, str], seed: int) -> Recipe:
    stage = plan.stages[number - 1]
    judge = _before(number, plan.stages, marks=True) if stage.objective in ("rloo", "grpo") else None
    before = None if plan.apart else _before(number, plan.stages, marks=False)
    named = {profile.name: profile for profile in plan.datasets}
    return Recipe(
        program=stage.program, objective=stage.objective, tuner=plan.method,
        model=RecipeModel(
            id=model.id, path=model.path, revision=model.revision,
            after=before or _start(plan),
        ),
        datasets=tuple(_dataset(named[name], plan.start) for name in stage.datasets if name in named),
        settings={**stage.settings, **({"reward_model": judge} if judge else {})}, seed=seed,
        parallel=None if plan.parallel == "none"
        else RecipeParallel(kind=plan.parallel, processes=plan.processes),
        packages=dict(sorted(packages.items())),
    )  # fmt: skip


def _start(plan: Plan) -> str | None:
    """Return where the adapter of an earlier run lies in the run folder."""
    return EARLIER if plan.start is not None and plan.start.result == "adapter" else None


def _dataset(profile: DatasetProfile, start: StartFrom | None) -> RecipeDataset:
    return RecipeDataset(
        name=profile.name, path=profile.path or "", kind=profile.kind, sha256=profile.sha256,
        mapping=profile.mapping, format=profile.format, role=profile.role,
        untrained_loss=start.untrained_losses.get(profile.name) if start else None,
    )  # fmt: skip


def encode(recipe: Recipe) -> bytes:
    """Return a recipe as YAML below a comment that says what it is; byte-stable."""
    head = HEADER.format(program=recipe.program, objective=recipe.objective, tuner=recipe.tuner)
    return head.encode() + encode_yaml(recipe)


def decode(content: bytes, where: str) -> Recipe:
    """Read a recipe file.

    Args:
        content: its bytes.
        where: its path, for messages.

    Raises:
        InputError: it is not YAML, or a field is unknown, missing or of the wrong type.
    """
    remedy = f"Mend {where}, or plan again: ftadvisor plan"
    try:
        plain = yaml.load(content, Loader=yaml.CSafeLoader)
        return msgspec.convert(plain, type=Recipe)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise InputError(f"{where} is not valid YAML: {problem}", remedy) from problem
    except msgspec.ValidationError as problem:
        raise InputError(f"{where}: {problem}", remedy) from problem


def check(recipe: Recipe, program: Program) -> None:
    """Compare the settings of a recipe with the keys that its program accepts.

    Raises:
        UsageError: a key is unknown (the nearest is named) or missing, or a value is out of its range.
    """
    if program.objectives and recipe.objective not in program.objectives:
        raise UnknownNameError(f"objective for {recipe.program}", recipe.objective, program.objectives)
    if program.tuners and recipe.tuner not in program.tuners:
        raise UnknownNameError(f"tuner for {recipe.program}", recipe.tuner, program.tuners)
    see = f"See recipes/{recipe.program}/program.toml"
    for key, value in recipe.settings.items():
        if key not in program.keys:
            raise UnknownNameError(f"setting of {recipe.program}", key, program.keys, see)
        check_value(key, value, program.keys[key], see)
    missing = [key for key, facts in program.keys.items() if facts.required and key not in recipe.settings]
    if missing:
        raise UsageError(f"The recipe lacks {', '.join(missing)}.", see)
