"""Every objective beside SFT on a tiny model: it learns what it should, and a resumed run ends in the same
bits."""

from __future__ import annotations

import ast
import shutil
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from advisor.errors import RefusedError
from advisor.estimate.memory import trainable_parameters
from advisor.knowledge import load
from advisor.probe.model import read_model
from advisor.resources import recipes_dir
from advisor.storage import read_record
from advisor.types import MemorySettings, Program, Recipe
from training import COLOURS, THINGS, events_of, make_run, run_here, write_rows

torch = pytest.importorskip("torch")

from advisor.train import settings as records  # noqa: E402 - after the check that torch is installed
from advisor.train.preference import orpo_loss, simpo_loss  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
ROOT = Path(__file__).parent.parent.parent
RECORDS = {
    "sft": records.SftSettings, "cpt": records.CptSettings, "dpo": records.DpoSettings,
    "kto": records.KtoSettings, "orpo": records.OrpoSettings, "simpo": records.SimpoSettings,
    "reward": records.RewardSettings, "rloo": records.ReinforcementSettings,
    "grpo": records.ReinforcementSettings, "classify": records.ClassifySettings,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {"kto": {"beta": 0.1}, "cpt": {"loss_on": "all"}, "dpo": {"beta": 0.1}}
PAIRED = ("dpo", "orpo", "simpo", "reward")


def judged() -> list[dict[str, Any]]:
    """Pairs whose better answer is the polite one."""
    return [
        {
            "prompt": f"Is the {thing} {colour}?",
            "chosen": f"Yes, please see the {colour} {thing}.",
            "rejected": f"No. Go away, {colour} {thing}.",
        }
        for colour in COLOURS
        for thing in THINGS
    ]


def marked() -> list[dict[str, Any]]:
    """The same answers one by one, with thumbs."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in judged()
        for name in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Data by objective, with its kind."""
    place = tmp_path_factory.mktemp("judged")
    pairs = write_rows(place / "pairs.jsonl", judged())
    thumbs = write_rows(place / "thumbs.jsonl", marked())
    text = write_rows(place / "text.jsonl", [{"text": row["chosen"] * 3} for row in judged()])
    return {
        **dict.fromkeys(PAIRED, (pairs, "preference")),
        "kto": (thumbs, "unpaired_preference"),
        "cpt": (text, "raw_text"),
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, files: Any) -> Any:
    """Runs by objective and tuner, made when first asked for."""
    place, made = tmp_path_factory.mktemp("objectives"), dict[tuple[str, str], Path]()

    def get(objective: str, tuner: str = "lora") -> Path:
        key = (objective, tuner)
        if key not in made:
            data, kind = files[objective]
            made[key] = make_run(
                place / f"{objective}-{tuner}", tuner=tuner, model=tiny_model, data=data, kind=kind,
                objective=objective, keep_checkpoints=3, weight_bits=32,
                learning_rate=1e-3 if tuner == "full" else 1e-2, **MORE.get(objective, {}),
            )  # fmt: skip
            assert run_here(made[key]) == 0, events_of(made[key], "error")
        return made[key]

    return get


def heldout(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured on rows that were not trained on, by time."""
    return {event["when"]: event for event in events_of(folder, "heldout")}


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto", "reward", "cpt"])
def test_it_learns_what_it_should(done: Any, objective: str, tuner: str) -> None:
    """On prompts that were never trained on, the better answers gain on the worse ones."""
    found = heldout(done(objective, tuner))
    assert found["after"]["loss"] < 0.98 * found["before"]["loss"]
    if objective != "cpt":
        assert found["after"]["margin"] > found["before"]["margin"] + 0.02
    if objective in PAIRED:
        assert found["after"]["accuracy"] >= 0.75


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto", "reward", "cpt"])
def test_it_trains_as_many_weights_as_the_plan_says(
    done: Any, objective: str, tuner: str, tiny_model: Path
) -> None:
    """The count of the estimate is the count of the trained model, the head for marks included."""
    wanted = trainable_parameters(
        read_model(str(tiny_model), knowledge=load()),
        MemorySettings(tuner=tuner, objective=objective, lora_r=8),
    )
    assert events_of(done(objective, tuner), "model")[0]["trainable_parameters"] == wanted


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_the_loss_in_chunks_is_the_same(
    done: Any, objective: str, tiny_model: Path, files: Any, tmp_path: Path
) -> None:
    """Tile by tile or with all logits at once: the same figures before, in and after training."""
    data, kind = files[objective]
    folder = make_run(
        tmp_path / "run", tuner="full", model=tiny_model, data=data, kind=kind, objective=objective,
        weight_bits=32, learning_rate=1e-3, loss="chunked", **MORE.get(objective, {}),
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    whole = done(objective, "full")
    losses = [[step["loss"] for step in events_of(one, "step")] for one in (whole, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for when in ("before", "after"):
        found, wanted = heldout(folder)[when], heldout(whole)[when]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert found["margin"] == pytest.approx(wanted["margin"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto", "reward"])
def test_it_resumes_exactly(done: Any, objective: str, tmp_path: Path) -> None:
    """From the checkpoint of step 4 on, the same bits; also the reference is the one of the beginning."""
    tuner = "full" if objective == "dpo" else "lora"
    whole, folder = done(objective, tuner), tmp_path / "run"
    shutil.copytree(whole, folder)
    name = "model" if tuner == "full" else "adapter"
    for gone in (folder / name, *(folder / "checkpoints" / f"checkpoint-{step}" for step in (8, 10))):
        shutil.rmtree(gone)
    assert run_here(folder) == 0
    file = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    first, second = load_file(whole / name / file), load_file(folder / name / file)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("objective", sorted(RECORDS))
def test_every_accepted_key_is_read(objective: str) -> None:
    """program.toml and the settings record name the same keys, and each key means the same everywhere."""
    toml = tomllib.loads((recipes_dir() / objective / "program.toml").read_text())
    program, record = msgspec.convert(toml, Program), RECORDS[objective]
    assert set(program.keys) == set(record.__struct_fields__)
    required = {field.name for field in msgspec.structs.fields(record) if field.required}
    assert {name for name, key in program.keys.items() if key.required} == required
    sources = [*(ROOT / "advisor" / "train").glob("*.py"), recipes_dir() / objective / "train.py"]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert set(record.__struct_fields__) - read == set()
    sft = msgspec.convert(tomllib.loads((recipes_dir() / "sft" / "program.toml").read_text()), Program)
    for name, key in program.keys.items():
        assert key.doc.endswith("."), name
        if name in sft.keys and name != "loss_on":
            assert (key.type, key.high) == (sft.keys[name].type, sft.keys[name].high)
            # KTO compares the rows of a batch with one another, and needs two.
            least = 2.0 if (objective, name) == ("kto", "micro_batch") else sft.keys[name].low
            assert key.low == least


@pytest.mark.parametrize(("tuner", "bits"), [("qlora", 4), ("lora", 16)])
def test_a_head_in_32_bits_reads_32_bits(
    tuner: str, bits: int, files: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """A reward model on a smaller base trains without autocast too."""
    data, kind = files["reward"]
    folder = make_run(
        tmp_path / "run", tuner=tuner, model=tiny_model, data=data, kind=kind, objective="reward",
        weight_bits=bits, precision="fp32", max_steps=2,
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    assert events_of(folder, "heldout")[-1]["margin"] is not None


def test_accumulated_batches_are_one_batch(files: Any, tiny_model: Path, tmp_path: Path) -> None:
    """ORPO and SimPO with two halves accumulated begin with the same loss and gradient as in one batch."""
    data, kind = files["simpo"]
    found = []
    for micro in (8, 4):
        folder = make_run(
            tmp_path / str(micro), tuner="full", model=tiny_model, data=data, kind=kind, objective="simpo",
            micro_batch=micro, max_steps=1, heldout_fraction=0.0,
        )  # fmt: skip
        assert run_here(folder) == 0
        found.append(events_of(folder, "step")[0])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)


def test_losses_without_a_reference_by_hand() -> None:
    """ORPO and SimPO against their formulas on two pairs."""
    chosen, rejected = torch.tensor([-2.0, -6.0]), torch.tensor([-4.0, -3.0])
    long, short = torch.tensor([2, 3]), torch.tensor([4, 3])
    better, worse = np.array([-1.0, -2.0]), np.array([-1.0, -1.0])
    margin = 2.0 * (better - worse) - 1.0
    assert float(simpo_loss(2.0, 1.0)(chosen, rejected, long, short)) == pytest.approx(
        np.mean(np.log1p(np.exp(-margin)))
    )
    odds = [np.log(np.exp(x) / (1 - np.exp(x))) for x in (better, worse)]
    wanted = 8 / 5 + 0.1 * np.mean(np.log1p(np.exp(-(odds[0] - odds[1]))))
    assert float(orpo_loss(0.1)(chosen, rejected, long, short)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "tuner", "changes", "word"),
    [
        ("dpo", "lora", {"lora_init": "pissa", "weight_bits": 32}, "compares with the model without"),
        ("kto", "lora", {"lora_init": "pissa", "weight_bits": 32}, "compares with the model without"),
        ("kto", "lora", {"micro_batch": 1}, "one row has none"),
        ("kto", "lora", {"per_step_batch": 8}, "is not micro_batch"),
        ("grpo", "lora", {"num_generations": 3}, "whole groups"),
        ("rloo", "lora", {"lora_init": "pissa", "weight_bits": 32}, "compares with the model without"),
        ("dpo", "lora", {"packing": True, "micro_batch": 1}, "row by row"),
    ],
)
def test_what_would_be_silently_wrong_cannot_be_run(
    objective: Any, tuner: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    """Refused before a model is loaded, with what to do instead."""
    folder = make_run(
        tmp_path / "run", tuner=tuner, model=tmp_path, data=tmp_path, objective=objective, **changes
    )
    with pytest.raises(RefusedError, match=word) as caught:
        records.read_settings(read_record(folder / "recipe.yaml", Recipe), RECORDS[objective], cuda=False)
    assert caught.value.remedy


def test_answers_without_a_comparison_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Marks that are all the same teach no difference; pairs of one answer are counted out."""
    data = write_rows(tmp_path / "data.jsonl", [row for row in marked() if row["label"]])
    folder = make_run(
        tmp_path / "run", tuner="lora", model=tiny_model, data=data, kind="unpaired_preference",
        objective="kto",
    )  # fmt: skip
    assert run_here(folder) == 1
    assert "same mark" in events_of(folder, "error")[0]["message"]


RL: dict[str, Any] = {
    "effective_batch": 16, "micro_batch": 16, "num_generations": 8, "max_completion_length": 12,
    "learning_rate": 2e-2, "weight_bits": 32, "keep_checkpoints": 3, "scheduler": "constant",
    "lora_dropout": 0.0, "kl_beta": 0.01,
}  # fmt: skip


def _rl(folder: Path, model: Path, objective: Any, *, count: int | None = None, **changes: Any) -> Path:
    prompts = write_rows(
        folder.parent / f"{folder.name}.jsonl", [{"prompt": row["prompt"]} for row in judged()[:count]]
    )
    return make_run(
        folder, tuner="lora", model=model, data=prompts, kind="prompts", objective=objective,
        **{**RL, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["rloo", "grpo"])
def test_reinforcement_raises_the_reward_and_resumes_exactly(
    objective: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Marks of a file of one's own rise on sampled answers; from step 8, in the second pass over the prompts,
    on the same bits."""
    (tmp_path / "own.py").write_text(
        "def reward(text, reference):\n    return text.count('e') / (len(text) + 1)\n"
    )
    own = str(tmp_path / "own.py")
    whole = _rl(tmp_path / "whole", tiny_model, objective, count=14, reward_file=own)
    assert run_here(whole) == 0, events_of(whole, "error")
    found = heldout(whole)
    assert found["after"]["reward"] > 1.3 * found["before"]["reward"]
    steps = events_of(whole, "step")
    assert all("reward" in step for step in steps)
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    for gone in (folder / "adapter", *(folder / "checkpoints" / f"checkpoint-{step}" for step in (10,))):
        shutil.rmtree(gone)
    assert run_here(folder) == 0
    _same_weights(whole / "adapter", folder / "adapter")


def test_reinforcement_against_a_reward_model(done: Any, tiny_model: Path, tmp_path: Path) -> None:
    """RLHF's last stage: the marks of the reward model rise, and the policy is told how far it moved."""
    judge = tmp_path / "judge"
    judge.mkdir()
    shutil.copytree(done("reward") / "adapter", judge / "adapter")
    folder = _rl(tmp_path / "run", tiny_model, "rloo", reward_model=str(judge))
    assert run_here(folder) == 0, events_of(folder, "error")
    found = heldout(folder)
    assert found["after"]["reward"] > found["before"]["reward"]
    assert events_of(folder, "data")[0]["rewards"] == ["reward_model"]
    assert all(step["kl"] is not None for step in events_of(folder, "step"))


def test_a_model_that_never_succeeds_is_not_reinforced(tiny_model: Path, tmp_path: Path) -> None:
    """Where all tried answers have the same mark, and where nothing gives marks, it is refused before."""
    folder = _rl(
        tmp_path / "alike", tiny_model, "grpo", reward_functions=["regular_expression"], reward_pattern="^42$"
    )
    assert run_here(folder) == 1
    assert events_of(folder, "error")[0]["code"] == "no_reward_signal"
    assert not events_of(folder, "step")
    folder = _rl(tmp_path / "none", tiny_model, "grpo")
    assert run_here(folder) == 1
    assert "Nothing says how good" in events_of(folder, "error")[0]["message"]


def _same_weights(first: Path, second: Path) -> None:
    one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_a_later_stage_goes_on_with_the_adapter_and_compares_with_it(
    done: Any, files: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """DPO after another stage begins at a loss of ln 2 against that stage's result, keeps one plain adapter,
    and resumes to the same bits."""
    data, kind = files["dpo"]
    folders = [tmp_path / name for name in ("whole", "again")]
    for folder in folders:
        (folder / "stages" / "1-cpt").mkdir(parents=True)
        shutil.copytree(done("cpt") / "adapter", folder / "stages" / "1-cpt" / "adapter")
        make_run(
            folder, tuner="lora", model=tiny_model, data=data, kind=kind, objective="dpo",
            after="stages/1-cpt", weight_bits=32, lora_dropout=0.0, keep_checkpoints=3,
        )  # fmt: skip
    whole, again = folders
    assert run_here(whole) == 0, events_of(whole, "error")
    assert events_of(whole, "step")[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert heldout(whole)["after"]["accuracy"] >= 0.75
    shutil.copytree(whole / "checkpoints" / "checkpoint-4", again / "checkpoints" / "checkpoint-4")
    assert run_here(again) == 0
    assert events_of(again, "step")[0]["step"] == 5
    _same_weights(whole / "adapter", again / "adapter")
    assert not [path for path in (whole / "adapter").iterdir() if path.is_dir()]


def test_an_adapter_after_a_whole_model_is_refused(files: Any, tiny_model: Path, tmp_path: Path) -> None:
    """It would later be looked for on another base than the one it was trained on."""
    data, kind = files["dpo"]
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder / "stages" / "1-sft" / "model")
    make_run(
        folder, tuner="lora", model=tiny_model, data=data, kind=kind, objective="dpo", after="stages/1-sft"
    )
    assert run_here(folder) == 1
    assert "left a whole model" in events_of(folder, "error")[0]["message"]
