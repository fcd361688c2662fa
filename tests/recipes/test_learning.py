"""The lessons that benchmarks/learning.py measures with, and the quickest of its checks."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.probe.model import read_model
from advisor.resources import starter_dir
from cases import CPU, rows, scenario
from training import events_of, make_run, run_here

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import lessons  # noqa: E402 - lies in benchmarks/, which is no package


def test_a_style_keeps_its_own_rule_and_no_other_one_does() -> None:
    """Else a model that learned another manner, or none, would count as having learned this one."""
    train, _ = lessons.facts(7)
    for name, style in lessons.STYLES.items():
        for fact in train[:40]:
            assert style.follows(lessons.answer(name, fact), fact), name
            for other in lessons.STYLES.keys() - {name, "plain"}:
                assert not lessons.STYLES[other].follows(lessons.answer(name, fact), fact), (name, other)


def test_nothing_is_asked_that_was_trained_on() -> None:
    """Other facts, and other wordings."""
    train, asked = lessons.facts(7)
    assert len(train) > 300
    assert len(asked) > 80
    assert not {fact.question for fact in train} & {fact.question for fact in asked}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_reward_model_ranks_pairs_that_it_never_saw(tmp_path: Path) -> None:
    """At the plan's learning rate, a few steps on the starter rank four of five held-out pairs right."""
    pytest.importorskip("torch")
    train, _ = lessons.facts(7)
    pairs = lessons.write(
        tmp_path / "pairs.jsonl", [lessons.pair("harbour", "plain", fact) for fact in train[:120]]
    )
    case = scenario(rows("preference", 160), hardware=CPU, model="starter", requested_method="lora+reward")
    starter = read_model("starter", knowledge=load())
    made = make_plan(msgspec.structs.replace(case, spec=starter), load())
    rate = made.stages[-1].settings["learning_rate"]
    folder = make_run(
        tmp_path / "run", tuner="lora", model=starter_dir(), data=pairs, kind="preference",
        objective="reward", learning_rate=rate, max_steps=6, save_every_steps=6, effective_batch=16,
        micro_batch=16, heldout_fraction=0.25, weight_bits=32, lora_dropout=0.0,
    )  # fmt: skip
    assert run_here(folder) == 0, events_of(folder, "error")
    (after,) = [event for event in events_of(folder, "heldout") if event["when"] == "after"]
    assert after["accuracy"] >= 0.8
