"""A head that picks a class: planned, trained, resumed, loaded again, and why it is no GGUF."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from advisor.cli.planning import write_plan
from advisor.errors import ExportError
from advisor.export.exporter import export_model
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.probe.dataset import profile_dataset
from advisor.probe.model import read_model
from advisor.storage import read_record
from advisor.types import Plan, Recipe
from cases import CPU, scenario
from training import COLOURS, THINGS, events_of, run_here, write_rows

torch = pytest.importorskip("torch")
from peft import PeftModel  # noqa: E402 - after the check that it is installed
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
WORDS = {"ask": "Where is", "thank": "Thank you for", "want": "I would like"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run that was planned as a person plans it, and trained."""
    place = tmp_path_factory.mktemp("classes")
    texts = [
        {"text": f"{words} the {colour} {thing}.", "label": label}
        for label, words in WORDS.items()
        for colour in COLOURS
        for thing in THINGS
    ]
    data = write_rows(place / "data.jsonl", texts)
    case = scenario(
        hardware=CPU, requested_method="classifier_head", force=True,
        overrides={"learning_rate": 1e-2, "max_steps": 20, "save_every_steps": 10, "precision": "fp32"},
    )  # fmt: skip
    case = msgspec.structs.replace(
        case, spec=read_model(str(tiny_model), knowledge=load()), model=str(tiny_model),
        datasets=(profile_dataset(str(data)),),
    )  # fmt: skip
    folder = write_plan(make_plan(case, load()), place / "run", datetime(2026, 1, 1))
    assert run_here(folder) == 0, events_of(folder, "error")
    return folder


def heldout(folder: Path) -> dict[str, Any]:
    """What was measured before and after, on rows that were not trained on."""
    return {event["when"]: event for event in events_of(folder, "heldout")}


def test_it_learns_the_classes(done: Path) -> None:
    """Held-out texts are told apart far better than by the most frequent class, and than before."""
    found = heldout(done)
    assert found["after"]["accuracy"] >= 0.9
    assert found["after"]["accuracy"] > found["before"]["accuracy"] + 0.2
    assert found["after"]["most_frequent_class"] == pytest.approx(1 / 3, abs=0.05)
    assert set(events_of(done, "data")[0]["classes"]) == set(WORDS)


def test_the_plan_knew_how_many_weights(done: Path) -> None:
    """LoRA on every linear layer and a row of the head for every class; the recipe names the program."""
    made = read_record(done / "plan.json", Plan)
    assert made.stages[0].program == read_record(done / "recipe.yaml", Recipe).program == "classify"
    counted = events_of(done, "model")[0]["trainable_parameters"]
    assert made.stages[0].estimate.trainable_parameters == counted


def test_loaded_again_it_names_the_held_out_classes_as_measured(done: Path, tiny_model: Path) -> None:
    """On the untouched base, by nothing but transformers and peft and the names in labels.json."""
    names = json.loads((done / "adapter" / "labels.json").read_text())
    assert names == sorted(WORDS)
    tokenizer = AutoTokenizer.from_pretrained(done / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=len(names))
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, str(done / "adapter")).eval()
    right = 0
    for label, words in WORDS.items():
        ids = tokenizer(f"{words} the purple spoon." + tokenizer.eos_token, return_tensors="pt")
        with torch.no_grad():
            right += names[int(model(input_ids=ids["input_ids"]).logits.argmax())] == label
    assert right == len(WORDS)


def test_it_resumes_exactly(done: Path, tmp_path: Path) -> None:
    """From the checkpoint in the middle on, body and head to the same bits."""
    again = tmp_path / "run"
    shutil.copytree(done, again)
    for gone in (again / "adapter", again / "checkpoints" / "checkpoint-20"):
        shutil.rmtree(gone)
    assert run_here(again) == 0
    assert events_of(again, "step")[-1]["step"] == 20
    first, second = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (done, again))
    assert any("score" in name for name in first)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_its_export_is_refused_with_another_way(done: Path, tmp_path: Path) -> None:
    """It writes no text; labels as text would."""
    with pytest.raises(ExportError, match="picks a class") as caught:
        export_model(done, out=tmp_path / "out", offline=True)
    assert "--method lora" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_one_class_is_refused(tiny_model: Path, done: Path, tmp_path: Path) -> None:
    """Nothing could be told apart."""
    data = write_rows(tmp_path / "data.jsonl", [{"text": f"{n}", "label": "a"} for n in range(9)])
    recipe = read_record(done / "recipe.yaml", Recipe)
    only = msgspec.structs.replace(recipe.datasets[0], path=str(data))
    (tmp_path / "recipe.yaml").write_bytes(
        msgspec.yaml.encode(msgspec.structs.replace(recipe, datasets=(only,)))
    )
    assert run_here(tmp_path) == 1
    assert events_of(tmp_path, "error")[0]["code"] == "one_class"
