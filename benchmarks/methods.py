"""Does every method do what it promises? Trains each tuner with each objective that has a program, and
keeps the table.

Goes in: the objectives and tuners of kb/ and recipes/*/program.toml, the embedded starter or a tiny random
model. Comes out:
benchmarks/results/methods-<date>.md and the same on the screen. Each row: trained (the held-out figure gets
better by more than the same run with learning rate 0 moves), counted (as many weights as the plan predicts),
resumed (from a checkpoint in the middle to the same bits), reloaded (the saved weights on the untouched base
give the figure that training measured), exported or refused with the reason. Never does: hide a row that
failed.

    python benchmarks/methods.py [--steps 16] [--tiny] [--only sft/lora,dpo/full] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from advisor.errors import AdvisorError  # noqa: E402
from advisor.estimate.memory import trainable_parameters  # noqa: E402
from advisor.export.exporter import export_model  # noqa: E402
from advisor.knowledge import load  # noqa: E402
from advisor.plan import make_plan  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.model import read_model  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.recipe import recipes_of  # noqa: E402
from advisor.resources import recipes_dir, starter_dir  # noqa: E402
from advisor.storage import encode_yaml  # noqa: E402
from advisor.types import MemorySettings, ModelSpec, Recipe, RecipeDataset, Record  # noqa: E402
from cases import CPU, rows, scenario  # noqa: E402 - tests/ holds the ways to plan and run in one process
from tiny import make_tiny_model  # noqa: E402
from training import events_of, run_here  # noqa: E402

HIGHER_IS_BETTER = ("margin", "reward")
REINFORCED = ("rloo", "grpo")
ROWS, PROMPTS = 96, 24


class Row(Record, frozen=True, kw_only=True):
    """One method, measured."""

    objective: str
    tuner: str
    learning_rate: float = 0.0
    figure: str = ""
    before: float = 0.0
    after: float = 0.0
    still: float = 0.0
    """The figure after the same run with learning rate 0."""
    learned: bool = False
    counted: bool = False
    resumed: bool = False
    reloaded: str = ""
    """yes, no, or `tests` where going on from the saved result is refused and tests/recipes loads it."""
    export: str = ""
    seconds: float = 0.0
    problem: str = ""


def combinations() -> list[tuple[str, str]]:
    """Return every objective and tuner for which a program exists."""
    found = []
    for objective, facts in load().objectives.items():
        file = recipes_dir() / facts.program / "program.toml"
        if file.is_file():
            found += [(objective, tuner) for tuner in tomllib.loads(file.read_text())["tuners"]]
    return found


def write_data(place: Path) -> dict[str, Path]:
    """Write the starter's own data in the form of every kind."""
    lines = (starter_dir() / "brand_voice_train.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"][-2:] for line in lines][:ROWS]
    pairs = [
        {"prompt": ask["content"], "chosen": answer["content"], "rejected": _without_voice(answer["content"])}
        for ask, answer in chats
    ]
    questions = [json.loads(line) for line in (starter_dir() / "general_prompts.jsonl").open()]
    content: dict[str, list[dict[str, Any]]] = {
        "instruction": [
            {"instruction": ask["content"], "output": answer["content"]} for ask, answer in chats
        ],
        "preference": pairs,
        "unpaired_preference": [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for pair in pairs
            for name in ("chosen", "rejected")
        ],
        "raw_text": [{"text": pair["chosen"]} for pair in pairs],
        "prompts_with_answers": [
            {"prompt": one["prompt"], "answer": one["expect"][0]} for one in questions[:PROMPTS]
        ],
    }
    for kind, table in content.items():
        text = "".join(json.dumps(row) + "\n" for row in table)
        (place / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    return {kind: place / f"{kind}.jsonl" for kind in content}


def _without_voice(answer: str) -> str:
    return answer.replace("Ahoy there! ", "").replace("Ahoy! ", "").replace(" Fair winds!", "")


def recipe_of(objective: str, tuner: str, steps: int, data: dict[str, Path], spec: ModelSpec) -> Recipe | str:
    """Return the recipe that a plan gives for a method on the starter, or why there is none."""
    kind = load().objectives[objective].data_kinds[0]
    overrides: dict[str, Any] = {
        "max_steps": steps, "save_every_steps": max(1, steps // 2), "packing": False, "micro_batch": 8,
        "effective_batch": 8, "precision": "fp32",
    }  # fmt: skip
    if objective == "kto":
        overrides["per_step_batch"] = 8
    if objective in REINFORCED:
        overrides |= {"max_completion_length": 16, "effective_batch": 16, "micro_batch": 16}
    case = scenario(
        rows(kind, ROWS), hardware=CPU, model="starter", requested_method=f"{tuner}+{objective}", force=True,
        overrides=overrides,
    )  # fmt: skip
    made = make_plan(msgspec.structs.replace(case, spec=spec), load())
    found = [one for one in recipes_of(made, packages={}, seed=7) if one.objective == objective]
    if made.method != tuner or not found:
        reasons = [c.reasons for c in made.candidates if c.method == tuner and c.verdict == "rejected"]
        return " ".join(reasons[0]) if reasons else f"the plan says {made.method}"
    settings = {**found[0].settings, "keep_checkpoints": 3, "heldout_fraction": 0.1}
    if objective in REINFORCED:
        settings["reward_functions"] = ["contains", "length"]
        settings["reward_length"] = 8
    return msgspec.structs.replace(
        found[0],
        settings=settings,
        model=msgspec.structs.replace(found[0].model, id=spec.id, path=spec.path, after=None),
        datasets=(RecipeDataset(name="data", path=str(data[kind]), kind=kind),),
    )


def train(folder: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Run a recipe and return what was measured, by time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_bytes(encode_yaml(recipe))
    if run_here(folder) != 0:
        raise AdvisorError(events_of(folder, "error")[-1]["message"], "")
    return {event["when"]: event for event in events_of(folder, "heldout")}


def measure(objective: str, tuner: str, steps: int, place: Path, data: dict[str, Path], model: Path) -> Row:
    """Train one method and check every promise."""
    begun = time.monotonic()
    spec = read_model(str(model), knowledge=load())
    recipe = recipe_of(objective, tuner, steps, data, spec)
    if isinstance(recipe, str):
        return Row(objective=objective, tuner=tuner, problem=f"not planned: {recipe}")
    whole = place / f"{objective}-{tuner}"
    try:
        found = train(whole, recipe)
        still = train(
            place / f"{objective}-{tuner}-still",
            msgspec.structs.replace(recipe, settings={**recipe.settings, "learning_rate": 0.0}),
        )
    except AdvisorError as problem:
        return Row(objective=objective, tuner=tuner, problem=problem.message)
    figure = next((name for name in HIGHER_IS_BETTER if name in found["after"]), "loss")
    sign = 1 if figure == "loss" else -1
    before, after, rest = (one[figure] for one in (found["before"], found["after"], still["after"]))
    known = {
        k: v for k, v in recipe.settings.items() if k in MemorySettings.__struct_fields__ and v is not None
    }
    predicted = trainable_parameters(
        spec, msgspec.convert(known | {"tuner": tuner, "objective": objective}, MemorySettings)
    )
    return Row(
        objective=objective,
        tuner=tuner,
        learning_rate=float(recipe.settings["learning_rate"]),  # type: ignore[arg-type]  # a number in every plan
        figure=figure,
        before=before,
        after=after,
        still=rest,
        learned=sign * (rest - after) > 3 * abs(rest - before) and sign * (before - after) > 0,
        counted=events_of(whole, "model")[0]["trainable_parameters"] == predicted,
        resumed=_resumes(whole, place / f"{objective}-{tuner}-again", steps),
        reloaded=_reloads(whole, recipe, found["after"], place / f"{objective}-{tuner}-reload"),
        export=_exports(whole),
        seconds=time.monotonic() - begun,
    )


def _weights(folder: Path) -> dict[str, Any]:
    return load_file(next(folder.glob("*model.safetensors")))


def _result(folder: Path) -> Path:
    return folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"


def _resumes(whole: Path, folder: Path, steps: int) -> bool:
    shutil.copytree(whole, folder)
    for gone in (_result(folder), folder / "checkpoints" / f"checkpoint-{steps}"):
        shutil.rmtree(gone)
    if run_here(folder) != 0:
        return False
    first, second = (_weights(_result(one)) for one in (whole, folder))
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def _reloads(whole: Path, recipe: Recipe, after: dict[str, Any], folder: Path) -> str:
    """Go on from the saved result at rate 0: what is measured first is the result as loaded."""
    result = _result(whole)
    judge = recipe.objective == "reward" and result.name == "adapter"
    if judge or recipe.objective == "kto" or recipe.tuner in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        return "tests"
    (folder / "stages" / "0-saved").mkdir(parents=True)
    shutil.copytree(result, folder / "stages" / "0-saved" / result.name)
    settings = {**recipe.settings, "learning_rate": 0.0, "max_steps": 1}
    model = msgspec.structs.replace(recipe.model, after="stages/0-saved")
    again = train(folder, msgspec.structs.replace(recipe, settings=settings, model=model))["before"]
    name = next(name for name in ("preferred", "reward", "loss") if name in after)
    return "yes" if abs(again[name] - after[name]) < 2e-3 * max(1.0, abs(after[name])) else "**no**"


def _exports(whole: Path) -> str:
    try:
        made = export_model(whole, quants=("F16",), out=whole / "export", offline=True)
    except AdvisorError as problem:
        return f"refused: {problem.message[:90]}"
    return (
        ", ".join(Path(file.path).suffix.lstrip(".") for file in made.files if file.kind == "gguf") or "none"
    )


def table_of(found: list[Row], steps: int, what: str) -> str:
    """Return the rows as Markdown below what they were measured with."""
    packages, (cpu, _) = installed_packages(), cpu_identity(Path("/proc"))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl"))
    lines = [
        f"# Methods on {what}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {versions}; CPU {cpu}; {steps} steps each, "
        "settings of the plan. `python benchmarks/methods.py`",
        "",
        "| objective | tuner | rate | figure | before | after | at rate 0 | learned | counted | resumed | "
        "reloaded | export | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.problem:
            lines.append(f"| {row.objective} | {row.tuner} | {row.problem} |" + " |" * 10)
            continue
        marks = " | ".join("yes" if mark else "**no**" for mark in (row.learned, row.counted, row.resumed))
        lines.append(
            f"| {row.objective} | {row.tuner} | {row.learning_rate:g} | {row.figure} | {row.before:.4f} | "
            f"{row.after:.4f} | {row.still:.4f} | {marks} | {row.reloaded} | {row.export} | "
            f"{row.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of the starter")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    only = set(filter(None, given.only.split(",")))
    name = f"methods-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.md"
    out = given.out or HERE / "results" / name
    what = "a tiny random model" if given.tiny else "the starter"
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = write_data(Path(scratch))
        model = make_tiny_model(Path(scratch) / "tiny", hidden=128) if given.tiny else starter_dir()
        for objective, tuner in combinations():
            if only and f"{objective}/{tuner}" not in only:
                continue
            found.append(measure(objective, tuner, given.steps, Path(scratch), data, model))
            for folder in Path(scratch).glob(f"{objective}-{tuner}*"):
                shutil.rmtree(folder)
            out.write_text(table_of(found, given.steps, what), encoding="utf-8")
            print(out.read_text(encoding="utf-8").splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
