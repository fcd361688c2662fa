"""Every tuner of supervised fine-tuning: what moves, how much, and whether the saved result is what was
trained."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from advisor.errors import RefusedError, UnknownNameError
from advisor.estimate.memory import trainable_parameters
from advisor.export import export_model
from advisor.knowledge import load
from advisor.probe.model import read_model
from advisor.recipe import check
from advisor.storage import encode_yaml, read_record
from advisor.types import MemorySettings, Recipe
from advisor.verify import verify_gguf
from tiny import make_tiny_model
from training import events_of, make_run, rows, run_here, write_rows

torch = pytest.importorskip("torch")
from peft import PeftModel  # noqa: E402 - after the check that it is installed
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: E402

from advisor.train import bottleneck  # noqa: E402
from advisor.train.settings import SftSettings, read_settings  # noqa: E402
from advisor.train.tuners import prepare_model  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
SMALL: dict[str, dict[str, Any]] = {
    "osf": {"learning_rate": 1e-2, "preserved_share": 0.4},
    "ia3": {"target": "keys-values-feedforward", "learning_rate": 3e-2},
    "ln_tuning": {"learning_rate": 1e-2},
    "bitfit": {"learning_rate": 1e-2},
    "adapter": {"bottleneck": 16, "learning_rate": 1e-2},
    "prompt_tuning": {"virtual_tokens": 8, "learning_rate": 3e-2},
    "p_tuning": {"virtual_tokens": 8, "learning_rate": 1e-2},
    "prefix_tuning": {"virtual_tokens": 8, "learning_rate": 3e-2},
}
LORA_LIKE: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"lora_init": "pissa", "weight_bits": 32, "lora_dropout": 0.0},
}


class Done:
    """A finished run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = events_of(folder, "step")
        self.heldout = {event["when"]: event for event in events_of(folder, "heldout")}
        self.model = events_of(folder, "model")[-1]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_file: Path) -> Any:
    """Runs by name, made when first asked for."""
    place, made = tmp_path_factory.mktemp("tuners"), dict[str, Done]()

    def get(name: str, **changes: Any) -> Done:
        key = name + json.dumps(changes, sort_keys=True)
        if key not in made:
            tuner = name if name in SMALL else "lora"
            settings = {**SMALL.get(name, LORA_LIKE.get(name, {})), **changes}
            folder = make_run(
                place / f"{len(made)}-{name}",
                tuner=tuner,
                model=tiny_model,
                data=data_file,
                keep_checkpoints=3,
                **settings,
            )
            assert run_here(folder) == 0, events_of(folder, "error")
            made[key] = Done(folder)
        return made[key]

    return get


@pytest.mark.parametrize("name", [*SMALL, *LORA_LIKE])
def test_it_learns(done: Any, name: str) -> None:
    """The loss falls, on rows that were never trained on too."""
    found = done(name)
    assert len(found.steps) == 10
    assert found.heldout["after"]["loss"] < 0.97 * found.heldout["before"]["loss"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in (*SMALL, *LORA_LIKE)), ("adapter", {"bottleneck_style": "pfeiffer"})],
)
def test_it_trains_as_many_weights_as_the_plan_says(
    done: Any, name: str, changes: dict[str, Any], tiny_model: Path
) -> None:
    """The count of the estimate is the count of the trained model."""
    settings = {"lora_r": 8, **SMALL.get(name, {}), **changes}
    known = {key: value for key, value in settings.items() if key in MemorySettings.__struct_fields__}
    wanted = trainable_parameters(
        read_model(str(tiny_model), knowledge=load()),
        MemorySettings(tuner={"rslora": "lora"}.get(name, name), **known),
    )
    assert done(name, **changes).model["trainable_parameters"] == wanted


def reloaded(folder: Path, base: Path) -> Any:
    """The result of a run as anyone loads it, on the base as it lay on disk."""
    if (folder / "model").is_dir():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if bottleneck.is_saved_in(folder / "adapter"):
        bottleneck.load(model, folder / "adapter")
        return model.eval()
    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def heldout_loss(model: Any, folder: Path) -> float:
    """Mean loss over the answers that were held out, by nothing but the model's own forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(result(folder))
    total, tokens = 0.0, 0
    for line in (folder / "heldout.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        answer = messages[-1]["content"] + tokenizer.eos_token
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        total += float(loss) * (ids.shape[1] - start)
        tokens += ids.shape[1] - start
    return total / tokens


def result(folder: Path) -> Path:
    """Where the trained weights of a run lie."""
    return folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"


@pytest.mark.parametrize("name", [*SMALL, *LORA_LIKE])
def test_the_saved_result_on_the_untouched_base_is_what_was_trained(
    done: Any, name: str, tiny_model: Path
) -> None:
    """Loaded anew it has the loss that training measured at its end: nothing else had moved, nothing is
    lost."""
    changes = {"weight_bits": 32} if name in LORA_LIKE else {}
    found = done(name, **changes)
    loss = heldout_loss(reloaded(found.folder, tiny_model), found.folder)
    assert loss == pytest.approx(found.heldout["after"]["loss"], abs=2e-4)
    assert abs(loss - found.heldout["before"]["loss"]) > 0.01


def test_bitfit_moves_biases_only(done: Any, tiny_model: Path) -> None:
    """Every bias is new and has moved; every other tensor is bit-equal to the base's."""
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(done("bitfit").folder / "model" / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    added = set(after) - set(before)
    assert added
    assert all(name.endswith("proj.bias") and np.any(after[name] != 0) for name in added)


@pytest.mark.parametrize("name", [*SMALL, "dora", "pissa"])
def test_it_resumes_exactly(done: Any, name: str, tmp_path: Path) -> None:
    """From the checkpoint of step 4 on, the same bits as without interruption."""
    whole = done(name)
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for gone in (result(folder), *(folder / "checkpoints" / f"checkpoint-{step}" for step in (8, 10))):
        shutil.rmtree(gone)
    assert run_here(folder) == 0
    weights = ("adapter_model.safetensors", "model.safetensors")
    files = [result(whole.folder) / one for one in weights if (result(whole.folder) / one).is_file()]
    for file in files:
        first, second = load_file(file), load_file(result(folder) / file.name)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)


def test_orthogonal_subspaces_leave_a_whole_model(done: Any, tiny_model: Path) -> None:
    """The change is added to every linear layer; embeddings, output matrix and norms are bit-equal."""
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(done("osf").folder / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in after if name.endswith("_proj.weight")}


def test_layers_that_cannot_be_taken_apart_are_refused(done: Any) -> None:
    """PEFT would pass over the layers of GPT-2 without a word."""
    recipe = read_record(done("osf").folder / "recipe.yaml", Recipe)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(RefusedError, match="take apart"):
        prepare_model(model, "osf", read_settings(recipe, SftSettings, cuda=False), tokenizer=None)


def test_adapters_are_swapped_on_one_base(done: Any, tiny_model: Path) -> None:
    """Two bottleneck adapters on one base: each answers as it does alone, and none as the base does."""
    first, second = done("adapter").folder, done("adapter", bottleneck_style="pfeiffer").folder
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        plain = model(ids).logits
        alone = [reloaded(folder, tiny_model)(ids).logits for folder in (first, second)]
        bottleneck.load(model, first / "adapter", name="a")
        bottleneck.load(model, second / "adapter", name="b")
        model.eval()
        for name, wanted in (("a", alone[0]), ("b", alone[1]), (None, plain), ("a", alone[0])):
            bottleneck.choose(model, name)
            assert torch.equal(model(ids).logits, wanted)
    assert bottleneck.names(model) == ("a", "b")
    with pytest.raises(UnknownNameError):
        bottleneck.choose(model, "c")


def test_a_copied_model_uses_its_own_adapters(tiny_model: Path) -> None:
    """Training the original does not change what a copy answers, as a reference model must not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    bottleneck.add(model, bottleneck.BottleneckConfig(style="houlsby", bottleneck=4))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        copied, before = copy.deepcopy(model), model(ids).logits
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert torch.equal(copied(ids).logits, before)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("tuner", "changes", "word"),
    [
        ("prompt_tuning", {"packing": True, "micro_batch": 1}, "packing"),
        ("p_tuning", {"packing": True, "micro_batch": 1}, "packing"),
        ("prefix_tuning", {"packing": True, "micro_batch": 1}, "packing"),
        ("prefix_tuning", {"gradient_checkpointing": True}, "checkpointing"),
        ("lora", {"packing": True, "micro_batch": 1, "attention": "eager"}, "eager"),
        ("lora", {"lora_init": "pissa", "use_dora": True}, "lora_init"),
        ("qlora", {"lora_init": "pissa"}, "lora_init"),
        ("ia3", {"weight_bits": 4}, "weight_bits"),
        ("ia3", {"weight_bits": 16, "precision": "fp32"}, "32-bit weights among 16-bit"),
        ("osf", {"weight_bits": 16, "precision": "bf16"}, "16 bits would round"),
        ("lora", {"cpu_offload": True}, "sharded"),
    ],
)
def test_what_would_be_silently_wrong_cannot_be_run(
    tuner: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    """The run ends before a model is loaded, with the reason and what to do instead."""
    folder = make_run(tmp_path / "run", tuner=tuner, model=tmp_path, data=tmp_path, **changes)
    assert run_here(folder) == 1
    (error,) = events_of(folder, "error")
    assert error["kind"] == "RefusedError"
    assert word in error["message"]
    assert error["remedy"]


def test_added_biases_are_exported(done: Any, tmp_path: Path) -> None:
    """A Llama has none of its own; those that were added at zero and trained are in the proved file."""
    made = export_model(done("bitfit").folder, quants=("F16",), out=tmp_path, offline=True)
    file = next(tmp_path / Path(one.path).name for one in made.files if one.kind == "gguf")
    assert verify_gguf(file, against=done("bitfit").folder).passed


def test_a_tuner_that_never_prunes_is_not_trained(done: Any, tiny_model: Path) -> None:
    """AdaLoRA's ranks are never cut by these trainers: no program takes it, nor would it be prepared."""
    recipe = read_record(done("rslora").folder / "recipe.yaml", Recipe)
    adalora = msgspec.structs.replace(recipe, tuner="adalora")
    with pytest.raises(UnknownNameError, match="adalora"):
        check(adalora, load().programs["sft"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = read_settings(recipe, SftSettings, cuda=False)
    with pytest.raises(UnknownNameError, match="adalora"):
        prepare_model(model, "adalora", settings, tokenizer=None)


def test_packed_rows_do_not_see_each_other(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    """Rows packed into one sequence have the loss that they have alone; a recipe cannot ask for the kind of
    packing that cuts them into each other."""
    losses = []
    for packing in (True, False):
        folder = make_run(
            tmp_path / str(packing), tuner="full", model=tiny_model, data=data_file, packing=packing,
            micro_batch=1 if packing else 6, effective_batch=1 if packing else 6, max_steps=1,
            max_seq_len=480, heldout_fraction=0.0, learning_rate=0.0,
        )  # fmt: skip
        recipe = read_record(folder / "recipe.yaml", Recipe)
        few = write_rows(tmp_path / f"{packing}.jsonl", rows(6))
        only = msgspec.structs.replace(recipe.datasets[0], path=str(few))
        (folder / "recipe.yaml").write_bytes(encode_yaml(msgspec.structs.replace(recipe, datasets=(only,))))
        assert run_here(folder) == 0, events_of(folder, "error")
        losses.append(events_of(folder, "step")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    wrapped = msgspec.structs.replace(recipe, settings={**recipe.settings, "packing_strategy": "wrapped"})
    with pytest.raises(UnknownNameError, match="packing_strategy"):
        check(wrapped, load().programs["sft"])


def test_bitfit_without_biases_is_refused(tmp_path: Path) -> None:
    """A family that has a place for only some biases is not given any."""
    model = make_tiny_model(tmp_path / "model", architecture="qwen3", hidden=64, layers=1)
    data = write_rows(tmp_path / "data.jsonl", rows(20))
    folder = make_run(tmp_path / "run", tuner="bitfit", model=model, data=data)
    assert run_here(folder) == 1
    error = events_of(folder, "error")[0]
    assert error["kind"] == "RefusedError"
    assert "BitFit" in error["message"]
