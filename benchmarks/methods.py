"""Does every method do what it promises? Trains each tuner with each objective of kb/ and keeps the table.

Goes in: the objectives and tuners of kb/, recipes/*/program.toml, the embedded starter with its data. Comes
out: benchmarks/results/methods-<date>.md and the same on the screen, a row for each pair; a pair that no
program trains has the planner's reason instead of figures. Never does: hide a row that failed; list a method
by hand.

What a row promises:

- learned: the held-out figure gets better than with the same run at learning rate 0, by more than the noise.
  For a loss or a margin of fixed rows that is a hundredth of the figure before; for sampled rewards, whose
  answers differ from sample to sample, twice the standard error of both means.
- moved: every weight of the result differs from its value in the run at rate 0, and none beside them does.
- counted: exactly as many weights are trained as the plan predicts.
- reloaded: saved and loaded anew on the untouched base, the logits are those of the model that was trained;
  that the base did not move follows from it.
- resumed: from the checkpoint in the middle on, the same bits.
- exported: to GGUF and proved by `verify`, or refused with the reason shown.

A row that is measured goes into FILE of --rows at once, and is taken from there the next time: a run that was
cut short goes on where it was, and rows of another day keep their date.

    python benchmarks/methods.py [--steps 16] [--only sft/lora,dpo/full] [--rows FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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
from advisor.recommend.gates import program_of  # noqa: E402
from advisor.resources import starter_dir  # noqa: E402
from advisor.storage import encode_yaml  # noqa: E402
from advisor.train import bottleneck, session  # noqa: E402
from advisor.train.model import load_model  # noqa: E402
from advisor.train.settings import Settings  # noqa: E402
from advisor.types import MemorySettings, ModelSpec, Recipe, RecipeDataset, Record  # noqa: E402
from advisor.verify import verify_gguf  # noqa: E402
from cases import CPU, rows, scenario  # noqa: E402 - tests/ holds the ways to plan and run in one process
from training import events_of, run_here  # noqa: E402

HIGHER_IS_BETTER = ("margin", "reward")
REINFORCED = ("rloo", "grpo")
ROWS, PROMPTS, CLASSES = 96, 24, 2
PROBE = torch.arange(4, 68).reshape(2, 32)
"""Token ids whose logits are compared, of shape (2, 32)."""
LEAST_GAIN = 0.01
"""Of a figure that is measured on fixed rows, as a share of what it was; it does not move by itself."""
LOGITS_ATOL = 1e-4


class Row(Record, frozen=True, kw_only=True):
    """One pair, measured."""

    objective: str
    tuner: str
    learning_rate: float = 0.0
    figure: str = ""
    before: float = 0.0
    after: float = 0.0
    still: float = 0.0
    """The figure after the same run with learning rate 0."""
    noise: float = 0.0
    """By so much the figure must get better than that to count."""
    trained: int = 0
    promises: dict[str, bool] = {}
    """learned, moved, counted, reloaded, resumed: whether each holds."""
    logits: float = 0.0
    """Largest difference of a logit between the trained model and the reloaded one."""
    export: str = ""
    seconds: float = 0.0
    problem: str = ""
    day: str = ""
    """When it was measured."""


def combinations() -> list[tuple[str, str]]:
    """Return every objective with every tuner of the knowledge base."""
    return [(objective, tuner) for objective in load().objectives for tuner in load().tuners]


def is_offered(objective: str, tuner: str) -> bool:
    """Tell whether a program trains the pair."""
    program = load().programs.get(program_of(objective, load().tuners[tuner], load()))
    return program is not None and tuner in program.tuners


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
        "classification": [
            {"text": pair[name], "label": label}
            for pair in pairs
            for name, label in (("chosen", "sailor"), ("rejected", "plain"))
        ],
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
    """Return the recipe that a plan gives for a pair on the starter, or why there is none."""
    kind = load().objectives[objective].data_kinds[0]
    if tuner == "classifier_head" and objective == "sft":
        kind = "classification"
    overrides: dict[str, Any] = {
        "max_steps": steps, "save_every_steps": max(1, steps // 2), "micro_batch": 8, "effective_batch": 8,
        "precision": "fp32",
    }  # fmt: skip
    if objective in REINFORCED:
        overrides |= {"max_completion_length": 24, "effective_batch": 16, "micro_batch": 16}
        overrides |= {"reward_functions": ["length"], "reward_length": 12}
    case = scenario(
        rows(kind, ROWS), hardware=CPU, model="starter", requested_method=f"{tuner}+{objective}", force=True,
        overrides=overrides,
    )  # fmt: skip
    made = make_plan(msgspec.structs.replace(case, spec=spec), load())
    found = [one for one in recipes_of(made, packages={}, seed=7) if one.objective == objective]
    if made.method != tuner or not found or not is_offered(objective, tuner):
        reasons = [c.reasons for c in made.candidates if c.method == tuner and c.verdict == "rejected"]
        return " ".join(reasons[0]) if reasons else "no program trains it"
    return msgspec.structs.replace(
        found[0],
        settings={**found[0].settings, "keep_checkpoints": 3, "heldout_fraction": 0.1, "packing": False},
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


def measure(objective: str, tuner: str, steps: int, place: Path, data: dict[str, Path]) -> Row:
    """Train one pair and check every promise."""
    begun = time.monotonic()
    spec = read_model(str(starter_dir()), knowledge=load())
    recipe = recipe_of(objective, tuner, steps, data, spec)
    if isinstance(recipe, str):
        return Row(objective=objective, tuner=tuner, problem=f"refused: {recipe}")
    whole, still, again = (place / f"{objective}-{tuner}-{name}" for name in ("whole", "still", "again"))
    at_rest = msgspec.structs.replace(recipe, settings={**recipe.settings, "learning_rate": 0.0})
    try:
        with logits_at_the_end() as logits:
            found, rest = train(whole, recipe), train(still, at_rest)
        after = {**found["after"]}
        figure = next((name for name in HIGHER_IS_BETTER if name in after), "loss")
        noise = noise_of(figure, found)
        gain = (1 if figure == "loss" else -1) * (rest["after"][figure] - after[figure])
        reloaded = float((logits[0] - logits_reloaded(whole, recipe)).abs().max())
        counted = events_of(whole, "model")[0]["trainable_parameters"]
        promises = {
            "learned": gain > noise,
            "moved": moved(result_of(whole), result_of(still), tuner),
            "counted": counted == predicted_count(recipe, spec),
            "reloaded": reloaded < LOGITS_ATOL and not torch.equal(logits[0], logits[1]),
            "resumed": resumes(whole, again, steps),
        }
        export = exported(whole)
    except (AdvisorError, RuntimeError, ValueError) as problem:
        return Row(objective=objective, tuner=tuner, problem=f"**failed**: {problem}")
    return Row(
        objective=objective, tuner=tuner, learning_rate=float(str(recipe.settings["learning_rate"])),
        figure=figure, before=found["before"][figure], after=after[figure], still=rest["after"][figure],
        noise=noise, trained=counted, promises=promises, logits=reloaded, export=export,
        seconds=time.monotonic() - begun, day=today(),
    )  # fmt: skip


def today() -> str:
    """Return the date."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def noise_of(figure: str, found: dict[str, dict[str, Any]]) -> float:
    """Return by how much a figure may differ without that anything was learned."""
    if figure == "reward":
        return 2 * float(np.hypot(*(found[when]["reward_error"] for when in ("before", "after"))))
    return LEAST_GAIN * max(abs(found["before"][figure]), abs(found["before"].get("loss") or 0.0))


def predicted_count(recipe: Recipe, spec: ModelSpec) -> int:
    """Return how many weights the planner says are trained."""
    fields = MemorySettings.__struct_fields__
    known = {name: value for name, value in recipe.settings.items() if name in fields and value is not None}
    given = {**known, "tuner": recipe.tuner, "objective": recipe.objective, "classes": labels_of(recipe)}
    return trainable_parameters(spec, msgspec.convert(given, MemorySettings))


@contextlib.contextmanager
def logits_at_the_end() -> Iterator[list[torch.Tensor]]:
    """Collect the logits of every model as it is when its training has saved it."""
    found: list[torch.Tensor] = []
    save = session.save_result

    def save_and_look(trainer: Any, *args: Any, **more: Any) -> Any:
        saved = save(trainer, *args, **more)
        found.append(logits_of(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)))
        return saved

    session.save_result = save_and_look
    try:
        yield found
    finally:
        session.save_result = save


def logits_of(model: Any) -> torch.Tensor:
    """Return what a model says of the probe, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=PROBE, attention_mask=torch.ones_like(PROBE)).logits
    return found.float()


def logits_reloaded(folder: Path, recipe: Recipe) -> torch.Tensor:
    """Load a result as anyone does, on the base as it lies on disk, and return what it says of the probe."""
    result = result_of(folder)
    labels = labels_of(recipe)
    if result.name == "model":
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        return logits_of(kind.from_pretrained(result))
    known = {name: recipe.settings[name] for name in Settings.__struct_fields__ if name in recipe.settings}
    base = load_model(recipe.model, msgspec.convert(known, Settings), labels=labels)
    if bottleneck.is_saved_in(result):
        bottleneck.load(base, result)
        return logits_of(base)
    return logits_of(PeftModel.from_pretrained(base, str(result)))


def labels_of(recipe: Recipe) -> int:
    """Return how many outputs a result has in place of a vocabulary."""
    return CLASSES if recipe.tuner == "classifier_head" else int(recipe.objective == "reward")


def weights_of(folder: Path) -> dict[str, Any]:
    """Return the saved weights of a result."""
    return load_file(next(folder.glob("*model.safetensors")))


def result_of(folder: Path) -> Path:
    """Return where the result of a run lies."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"


def moved(result: Path, at_rest: Path, tuner: str) -> bool:
    """Tell whether exactly the weights that the tuner is to train have other values than at rate 0."""
    first, second = weights_of(result), weights_of(at_rest)
    changed = {name for name in first if not np.array_equal(first[name], second[name])}
    end = {"bitfit": ".bias", "osf": "_proj.weight"}.get(tuner, "")
    wanted = {name for name in first if name.endswith(end)}
    return first.keys() == second.keys() and changed == wanted


def resumes(whole: Path, folder: Path, steps: int) -> bool:
    """Go on from the checkpoint in the middle, and tell whether the end is the same to the bit."""
    shutil.copytree(whole, folder)
    for gone in (result_of(folder), folder / "checkpoints" / f"checkpoint-{steps}"):
        shutil.rmtree(gone)
    if run_here(folder) != 0 or not events_of(folder, "note"):
        return False
    first, second = (weights_of(result_of(one)) for one in (whole, folder))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def exported(whole: Path) -> str:
    """Export a result and prove it; return what came of it."""
    try:
        made = export_model(whole, quants=("F16",), out=whole / "export", offline=True)
        files = [Path(file.path) for file in made.files if file.kind == "gguf"]
        proofs = [verify_gguf(whole / "export" / file.name, against=whole) for file in files]
    except AdvisorError as problem:
        return f"refused: {problem.message}"
    return "proved" if proofs and all(proof.passed for proof in proofs) else "**not proved**"


def rows_of(file: Path | None) -> dict[tuple[str, str], Row]:
    """Return the rows that were measured before, by pair."""
    lines = file.read_bytes().splitlines() if file is not None and file.is_file() else []
    known = [msgspec.json.decode(line, type=Row) for line in lines]
    return {(row.objective, row.tuner): row for row in known}


def keep(row: Row, file: Path | None) -> None:
    """Put a row that was trained among those that are not measured again."""
    if file is not None and not row.problem:
        with file.open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")


PROMISES = ("learned", "moved", "counted", "reloaded", "resumed")


def table_of(found: list[Row], steps: int) -> str:
    """Return the rows as Markdown below what they were measured with."""
    packages, (cpu, _) = installed_packages(), cpu_identity(Path("/proc"))
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl"))
    measured = [row for row in found if not row.problem]
    lines = [
        "# Every objective with every tuner, on the starter",
        "",
        f"{today()}, {versions}; CPU {cpu}, one thread; {steps} steps "
        f"each, settings of the plan, fp32. {len(found)} pairs of the knowledge base, {len(measured)} "
        f"trained in {sum(row.seconds for row in measured) / 60:.0f} minutes. "
        "`python benchmarks/methods.py`; what each column promises stands at its top.",
        "",
        "| objective | tuner | rate | figure | before | after | at rate 0 | noise | trained | "
        + " | ".join(PROMISES)
        + " | logits differ by | export | s | day |",
        "|---" * (13 + len(PROMISES)) + "|",
    ]
    for row in measured:
        marks = " | ".join("yes" if row.promises[name] else "**no**" for name in PROMISES)
        lines.append(
            f"| {row.objective} | {row.tuner} | {row.learning_rate:g} | {row.figure} | {row.before:.4f} | "
            f"{row.after:.4f} | {row.still:.4f} | {row.noise:.4f} | {row.trained:,} | {marks} | "
            f"{row.logits:.1g} | {row.export} | {row.seconds:.0f} | {row.day} |"
        )
    rest = [row for row in found if row.problem]
    if rest:
        lines += [
            "",
            "Not trained, and what is said instead:",
            "",
            "| objective | tuner | |",
            "|---|---|---|",
        ]
        lines += [f"| {row.objective} | {row.tuner} | {row.problem} |" for row in rest]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    only = set(filter(None, given.only.split(",")))
    out = given.out or HERE / "results" / f"methods-{today()}.md"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = rows_of(given.rows)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = write_data(Path(scratch))
        for objective, tuner in combinations():
            if only and f"{objective}/{tuner}" not in only:
                continue
            row = known.get((objective, tuner))
            if row is None:
                row = measure(objective, tuner, given.steps, Path(scratch), data)
                keep(row, given.rows)
            found.append(row)
            for folder in Path(scratch).glob(f"{objective}-{tuner}-*"):
                shutil.rmtree(folder)
            out.write_text(table_of(found, given.steps), encoding="utf-8")
            print(f"{objective}/{tuner}", found[-1], file=sys.stderr, flush=True)
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
