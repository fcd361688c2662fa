"""An invented GPU, model, tuner and objective in a person's own kb folder take part in the advice at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.errors import KnowledgeError
from advisor.knowledge import Knowledge, read
from advisor.plan import make_plan
from advisor.resources import kb_dir
from cases import rows, scenario

GPU = """
[aurora-9000]
name = "Aurora 9000"
vendor = "nvidia"
aliases = ["aurora"]
memory_gib = 40
compute_capability = "9.9"
bf16 = true
flash_attention = true
bitsandbytes = true
tflops = 400
source = "judgement"
checked = "2026-11-25"
"""
MODEL = """
["northwind/Fjord-7B-Chat"]
family = "fjord"
architecture = "LlamaForCausalLM"
model_type = "llama"
layers = 32
hidden = 4096
intermediate = 11008
heads = 32
kv_heads = 8
head_dim = 128
vocab = 32000
tied = false
parameters = 6_000_000_000
context_tokens = 65536
instruct = true
licence = "apache-2.0"
commercial = true
gated = false
languages = ["en", "is", "fo"]
strengths = ["chat", "multilingual"]
released = "2026-11"
gguf_architecture = "llama"
source = "judgement"
checked = "2026-11-25"
"""
TUNER = """
title = "Sail"
plain = "An invented tuner that a test adds."
exact = "LoRA by another name."
group = "lora"
gguf = "merged"
quality = 1.2
forgetting = 0.0
source = "judgement"
checked = "2026-11-25"
[settings]
lora_r = 16
target = "all-linear"
"""
OBJECTIVE = """
title = "Rowing"
plain = "An invented objective."
exact = "Nothing."
program = "rowing"
data_kinds = ["preference"]
source = "judgement"
checked = "2026-11-25"
[learning_rate.lora]
value = 1e-6
low = 1e-7
high = 1e-5
source = "judgement"
"""


def overlay(folder: Path, **files: str) -> Knowledge:
    """The shipped knowledge base with some files on top."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path = path.with_suffix(".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return read(kb_dir(), folder)


def test_an_invented_gpu_is_planned_for(tmp_path: Path) -> None:
    """Its memory and rate come from the overlay."""
    knowledge = overlay(tmp_path, hardware__own=GPU)
    case = scenario(rows(), hardware={"accelerator": "Aurora"}, knowledge=knowledge)
    made = make_plan(case, knowledge)
    assert made.method == "lora"
    assert "40 GiB" in made.summary


def test_an_invented_model_is_recommended(tmp_path: Path) -> None:
    """It alone knows the language of the data, so it wins the free choice."""
    knowledge = overlay(tmp_path, models__own=MODEL)
    case = scenario(rows("chat", languages=["fo"]), model="auto", knowledge=knowledge)
    made = make_plan(case, knowledge)
    assert made.model is not None
    assert made.model.id == "northwind/Fjord-7B-Chat"
    assert (
        make_plan(scenario(rows(), model="Fjord 7B Chat", knowledge=knowledge), knowledge).model == made.model
    )


def test_an_invented_tuner_is_recommended(tmp_path: Path) -> None:
    """A tuner of an estimated kind, better than LoRA by its file, is chosen."""
    knowledge = overlay(tmp_path, tuners__sail=TUNER)
    made = make_plan(scenario(rows(), knowledge=knowledge), knowledge)
    assert made.method == "sail"
    assert made.stages[0].settings["learning_rate"] == 2e-4


def test_what_an_invented_tuner_holds_is_told_or_said_to_be_unknown(tmp_path: Path) -> None:
    """Without a table of its memory it counts as its group, which the plan says; the band is wider."""
    silent = overlay(tmp_path, tuners__sail=TUNER)
    told = overlay(tmp_path, tuners__sail=TUNER + '[memory]\ntrained = { "out*r" = 1 }\n')
    vague, exact = (
        make_plan(scenario(rows(), knowledge=one), one).stages[0].estimate for one in (silent, told)
    )
    assert "sail is not known: counted as lora" in vague.notes[0]
    assert not [note for note in exact.notes if "counted as" in note]
    assert exact.trainable_parameters < vague.trainable_parameters
    widths = [one.peak_bytes.high / one.peak_bytes.low for one in (vague, exact)]
    assert widths[0] > widths[1]
    with pytest.raises(KnowledgeError, match="width"):
        overlay(tmp_path, tuners__sail=TUNER + '[memory]\ntrained = { "width*r" = 1 }\n')


def test_an_invented_objective_is_kept_with_its_reason(tmp_path: Path) -> None:
    """It is listed with why the data do not call for it, and can be asked for where they allow it."""
    knowledge = overlay(tmp_path, methods__rowing=OBJECTIVE)
    made = make_plan(scenario(rows(), knowledge=knowledge), knowledge)
    reasons = [c.reasons[0] for c in made.candidates if c.method == "rowing"]
    assert reasons
    assert "preference" in reasons[0]


def test_an_unknown_key_names_file_and_key(tmp_path: Path) -> None:
    """A mistake in a person's own folder is told, not ignored."""
    with pytest.raises(KnowledgeError) as caught:
        overlay(tmp_path, tuners__sail=TUNER.replace("quality", "qality"))
    assert "sail.toml" in caught.value.message
    assert "qality" in caught.value.message


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """Every fact names a source that is there."""
    with pytest.raises(KnowledgeError) as caught:
        overlay(tmp_path, hardware__own=GPU.replace('"judgement"', '"hearsay"'))
    assert "hearsay" in caught.value.message
