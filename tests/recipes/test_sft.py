"""Full, LoRA and QLoRA training through the supervisor, and the parts whose figures can be checked alone."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from advisor.errors import AdvisorError, InputError, RefusedError, UnknownNameError
from advisor.export import export_model
from advisor.recipe import check
from advisor.resources import recipes_dir
from advisor.run.events import read_events
from advisor.storage import read_record
from advisor.types import Program, Recipe
from advisor.verify import heldout_rows, verify_gguf
from training import LORA, SETTINGS, make_run, run_here

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402 - after the check that it is installed

from advisor.train.data import IGNORED  # noqa: E402
from advisor.train.session import trainer_arguments  # noqa: E402
from advisor.train.settings import SftSettings, read_settings  # noqa: E402
from advisor.train.trainer import AnswerTrainer, mean_token_loss  # noqa: E402
from advisor.train.tuners import lora_config, prepare_model, target_modules  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
TUNERS = ("full", "lora", "qlora")
PROGRAM = msgspec.convert(tomllib.loads((recipes_dir() / "sft" / "program.toml").read_text()), Program)


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_learns(trained: Any, tuner: str) -> None:
    """The loss falls, on rows that were never trained on too."""
    report = trained[tuner].report
    assert (report.status, report.steps, report.steps_planned) == ("done", 10, 10)
    assert report.last_loss < 0.8 * report.first_loss
    assert report.heldout_loss_after < 0.8 * report.heldout_loss_before
    assert report.measured_peak_bytes > 0
    assert report.tokens_per_second > 0


def test_curves_are_written_for_tensorboard_where_that_was_asked_for(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point a step and one a measurement, in the run folder by its stage. Who did not ask gets the known
    files only, whatever login happens to be there."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "https://example.invalid")
    recipe = read_record(trained["full"].folder / "recipe.yaml", Recipe)
    settings = read_settings(recipe, SftSettings, cuda=False)
    assert trainer_arguments(recipe, settings)["report_to"] == "none"
    files = (trained["lora"].folder / "tensorboard" / "sft").iterdir()
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    points = sorted((value.tag, event.step) for event in events for value in event.summary.value)
    assert [step for tag, step in points if tag == "train/loss"] == list(range(1, 11))
    assert [step for tag, step in points if tag == "eval/loss"] == [0, 4, 8, 10]
    assert {path.name for path in trained["full"].folder.iterdir()} == {
        ".lock", "checkpoints", "events.jsonl", "heldout.jsonl", "model", "recipe.yaml", "report.json",
        "train.log",
    }  # fmt: skip


@pytest.mark.parametrize("tuner", TUNERS)
def test_labels_are_proved_before_the_first_step(trained: Any, tuner: str) -> None:
    """The data event comes before any step and shows that answers with their end token are trained on."""
    names = [event["event"] for event in trained[tuner].events]
    assert names.index("data") < names.index("model") < names.index("step")
    data = next(event for event in trained[tuner].events if event["event"] == "data")
    assert data["rows"] + data["heldout_rows"] == data["rows_read"] == 42
    assert data["end_trained_rows"] == data["rows"]
    assert 0 < data["supervised_min"] <= data["supervised_mean"] <= data["supervised_max"]
    assert data["supervised_tokens"] < data["tokens"]
    shown = [piece["text"] for piece in data["sample"] if piece["trained"]]
    assert len(shown) == 1
    assert shown[0].startswith("The ")
    assert shown[0].endswith("<|im_end|>")


@pytest.mark.parametrize("tuner", TUNERS)
def test_each_step_is_told(trained: Any, tuner: str) -> None:
    """Step events count up and carry what the live view needs."""
    steps = [event for event in trained[tuner].events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 11))
    for event in steps:
        assert event["total"] == 10
        for name in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes"):
            assert event[name] is not None, name
    assert steps[-1]["seconds_remaining"] == 0
    saved = [event["step"] for event in trained[tuner].events if event["event"] == "checkpoint"]
    assert saved == [4, 8, 10]
    kept = sorted(path.name for path in (trained[tuner].folder / "checkpoints").iterdir())
    assert kept == ["checkpoint-10", "checkpoint-8"]


def test_full_tuning_moves_and_saves_all_weights(trained: Any, tiny_model: Path) -> None:
    """Every tensor differs from the base; the saved folder is complete and ends turns with the template's
    token."""
    folder = trained["full"].folder / "model"
    before, after = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert trained["full"].report.trainable_parameters == sum(value.size for value in before.values())
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 3
    assert config["pad_token_id"] == generation["pad_token_id"] == 1
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|pad|>")
    assert config["use_cache"] is True
    assert "generation" in (folder / "chat_template.jinja").read_text()


def test_the_tiled_loss_judges_after_the_training_too(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    """All weights in 16 bits, where the libraries take the tiled head away at the end of the training: the
    held-out loss is measured all the same, and the weights are kept."""
    folder = make_run(
        tmp_path, tuner="full", model=tiny_model, data=data_file, precision="bf16", loss="chunked",
        max_steps=2,
    )  # fmt: skip
    assert run_here(folder) == 0
    told = [event for event in read_events(folder / "events.jsonl") if event["event"] == "heldout"]
    assert [event["when"] for event in told] == ["before", "after"]
    assert told[1]["loss"] < told[0]["loss"]
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("tuner", ["lora", "qlora"])
def test_only_adapters_move(trained: Any, tiny_model: Path, tuner: str) -> None:
    """The adapter holds A and B of every linear layer in fp32, all moved, and nothing else was trained."""
    folder = trained[tuner].folder / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    linear = {n.removesuffix(".weight"): v.shape for n, v in base.items() if n.endswith("proj.weight")}
    expected = {
        f"base_model.model.{name}.lora_{side}.weight": shape
        for name, (rows, columns) in linear.items()
        for side, shape in (("A", (8, columns)), ("B", (rows, 8)))
    }
    assert {name: value.shape for name, value in saved.items()} == expected
    assert all(value.dtype == np.float32 and np.any(value != 0) for value in saved.values())
    assert trained[tuner].report.trainable_parameters == sum(value.size for value in saved.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
    assert (folder / "chat_template.jinja").is_file()
    assert not (trained[tuner].folder / "model").exists()


def test_adapters_on_four_bits_train_in_fp32(trained: Any) -> None:
    """Their optimiser moments are fp32 too; in bf16 small updates would vanish."""
    state = torch.load(
        trained["qlora"].folder / "checkpoints" / "checkpoint-10" / "optimizer.pt", weights_only=True
    )
    assert {value["exp_avg"].dtype for value in state["state"].values()} == {torch.float32}
    with safe_open(trained["qlora"].folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        values = file.get_tensor(next(iter(file.keys())))
    assert not torch.equal(values, values.bfloat16().float())


def test_every_accepted_key_is_read() -> None:
    """program.toml, the settings record and the code that reads it name the same keys."""
    fields = set(SftSettings.__struct_fields__)
    assert set(PROGRAM.keys) == fields
    sources = [*(ROOT / "advisor" / "train").glob("*.py"), recipes_dir() / "sft" / "train.py"]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "settings"
    }
    assert fields - read == set()
    for name, key in PROGRAM.keys.items():
        assert key.doc.endswith("."), name
        assert key.required == (name in {f.name for f in msgspec.structs.fields(SftSettings) if f.required})


def test_recipes_are_checked_against_the_program(tmp_path: Path) -> None:
    """The recipes of these tests pass; an unknown, missing or wrong key is named before training."""
    for tuner in TUNERS:
        folder = make_run(tmp_path / tuner, tuner=tuner, model=tmp_path, data=tmp_path)
        recipe = read_record(folder / "recipe.yaml", Recipe)
        check(recipe, PROGRAM)
        read_settings(recipe, SftSettings, cuda=False)
    for change, kind in (
        ({"learning_rat": 1.0}, InputError),
        ({"scheduler": "zigzag"}, InputError),
        ({"packing": True}, RefusedError),
        ({"effective_batch": 6}, RefusedError),
        ({"weight_bits": 32}, RefusedError),
        ({"precision": "fp16"}, RefusedError),
        ({"attention": "flash"}, RefusedError),
    ):
        wrong = msgspec.structs.replace(recipe, settings={**recipe.settings, **change})
        with pytest.raises(AdvisorError) as caught:
            read_settings(wrong, SftSettings, cuda=False)
        assert isinstance(caught.value, kind), change
        assert caught.value.remedy


def _settings(**changes: Any) -> SftSettings:
    return SftSettings(**{**SETTINGS, "weight_bits": 32, **changes})


def test_targets_are_layers_that_the_model_has(tiny_model: Path) -> None:
    """Groups become the model's own names; a wrong name is answered with the nearest, the output layer
    refused."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert target_modules(model, "attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert target_modules(model, "q_v") == ["q_proj", "v_proj"]
    assert target_modules(model, "mlp") == ["gate_proj", "up_proj", "down_proj"]
    assert target_modules(model, "q_proj, up_proj") == ["q_proj", "up_proj"]
    with pytest.raises(UnknownNameError, match="q_proj"):
        target_modules(model, "q_prj")
    with pytest.raises(RefusedError, match="lm_head"):
        target_modules(model, "lm_head")
    config = lora_config(model, _settings(use_rslora=True, use_dora=True, lora_r=4))
    assert config is not None
    assert (config.use_rslora, config.use_dora, config.r) == (True, True, 4)
    with pytest.raises(UnknownNameError):
        prepare_model(model, "lorra", _settings(), tokenizer=None)


def _adapter_gradients(model: Any) -> dict[str, Any]:
    from peft import get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model, lora_config(model, _settings(lora_r=4)))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=torch.manual_seed(len(name))) * 0.1)
    tokens = torch.arange(4, 44).reshape(2, 20)
    wrapped.eval()
    with torch.no_grad():
        wrapped(input_ids=tokens)
    wrapped.train()
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    return {name: value.grad for name, value in wrapped.named_parameters() if value.requires_grad}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_four_bit_layers_pass_gradients_after_an_evaluation(tiny_model: Path) -> None:
    """QLoRA's gradients equal those of LoRA on the same, dequantised weights, also once it was evaluated."""
    from bitsandbytes.functional import dequantize_4bit

    from advisor.train.model import load_model
    from advisor.types import RecipeModel

    source = RecipeModel(id="tiny", path=str(tiny_model))
    quantised = load_model(source, _settings(weight_bits=4, precision="bf16", double_quant=True))
    plain = load_model(source, _settings(weight_bits=16, precision="bf16"))
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if type(module).__name__ == "Linear4bit":
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
    found, expected = _adapter_gradients(quantised), _adapter_gradients(plain)
    for name, value in expected.items():
        assert torch.linalg.vector_norm(found[name] - value) < 0.1 * torch.linalg.vector_norm(value), name


def _trainer(model_folder: Path, rows: Any, place: Path, *, plain: bool, accumulate: int) -> AnswerTrainer:
    from transformers import AutoTokenizer
    from trl import SFTConfig

    trainer = AnswerTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(place), per_device_train_batch_size=len(rows) // accumulate,
            gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd", bf16=False, activation_checkpointing=False, max_grad_norm=0.0, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
            dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )  # fmt: skip
    trainer.plain_loss = plain
    return trainer


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_plain_loss_equals_the_tiled_one(tiny_model: Path, tmp_path: Path) -> None:
    """With rows of different lengths and masks, accumulated or not, one SGD step ends in the same weights;
    the held-out loss is the mean over tokens, not over rows."""
    from datasets import Dataset

    random = np.random.default_rng(0)
    tokens = [random.integers(4, 500, size).tolist() for size in (30, 7, 22, 15)]
    labels = [[IGNORED] * skip + row[skip:] for row, skip in zip(tokens, (20, 3, 21, 0), strict=True)]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": labels})
    weights, losses = {}, {}
    for plain, accumulate in ((False, 1), (True, 1), (True, 2), (True, 4)):
        trainer = _trainer(tiny_model, rows, tmp_path, plain=plain, accumulate=accumulate)
        means = [mean_token_loss(trainer, rows, _settings(micro_batch=size)) for size in (1, 3, 4)]
        assert means == pytest.approx([means[0]] * 3, rel=1e-5)
        trainer.train()
        losses[plain, accumulate] = trainer.state.log_history[0]["loss"]
        assert losses[plain, accumulate] == pytest.approx(means[0], rel=1e-5)
        weights[plain, accumulate] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    base = torch.cat(
        [p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()]
    )
    moved = (weights[False, 1] - base).norm()
    for key, value in weights.items():
        assert (value - weights[False, 1]).norm() < 1e-4 * moved, key


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_what_four_bits_cost_is_measured(trained: Any, tmp_path: Path) -> None:
    """After QLoRA the proof tells the loss with the base as trained, and merged as exported."""
    run_folder = trained["qlora"].folder
    file = Path(export_model(run_folder, quants=("F16",), out=tmp_path).files[0].path)
    proof = verify_gguf(file, against=run_folder, rows=heldout_rows(run_folder))
    assert proof.passed, [check.evidence for check in proof.checks if not check.passed]
    found = next(check for check in proof.checks if check.name == "four_bit_base")
    before, after = (float(found.measured[key] or 0) for key in ("loss_as_trained", "loss_merged"))
    assert before != after
    assert abs(before - after) < 0.2
    assert int(found.measured["tokens"] or 0) > 20


def test_a_4_bit_training_is_merged_into_the_weights_as_stored(
    trained: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """The exported model is the untouched base with the adapter's change: no weight has seen 4 bits."""
    run_folder = trained["qlora"].folder
    export_model(run_folder, to=("merged",), out=tmp_path, offline=True)
    base, merged = (
        load_file(tiny_model / "model.safetensors"),
        load_file(next(tmp_path.rglob("*.safetensors"))),
    )
    adapter = load_file(run_folder / "adapter" / "adapter_model.safetensors")
    scale = LORA["lora_alpha"] / LORA["lora_r"]
    assert base.keys() == merged.keys()
    for name, stored in base.items():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        change = scale * adapter[f"{lora}B.weight"] @ adapter[f"{lora}A.weight"] if "proj" in name else 0.0
        assert np.abs(merged[name] - (stored + change)).max() < 1e-6, name
