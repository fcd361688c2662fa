"""Recipes: one a stage, byte-stable, and refused with the key when they do not suit their program."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from advisor.errors import InputError, UnknownNameError, UsageError
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.recipe import check, decode, encode, recipes_of
from advisor.resources import recipes_dir
from advisor.types import Plan, Program, ProgramKey, Recipe
from cases import A100, CPU, plan, rows, scenario

PACKAGES = {"trl": "1.16.0", "torch": "2.15.0"}
PROGRAM = Program(
    objectives=("sft",),
    tuners=("lora",),
    keys={
        "learning_rate": ProgramKey(type="float", low=0, high=1, required=True),
        "epochs": ProgramKey(type="float", low=0),
        "packing": ProgramKey(type="bool"),
        "scheduler": ProgramKey(type="str", choices=("cosine", "linear")),
        "lora_r": ProgramKey(type="int", low=1, high=512),
    },
)


def recipe(**settings: object) -> Recipe:
    """The recipe of an ordinary plan, with only these settings."""
    made = recipes_of(plan(rows()), packages=PACKAGES, seed=1)[0]
    return msgspec.structs.replace(made, settings=settings)


def test_one_recipe_a_stage() -> None:
    """Each holds its program, model, datasets and settings."""
    made = plan(rows("chat"), rows("preference"))
    first, second = recipes_of(made, packages=PACKAGES, seed=7)
    assert (first.program, first.objective, second.program) == ("sft", "sft", "dpo")
    assert [d.name for d in first.datasets] == ["chat"]
    assert first.settings == made.stages[0].settings
    assert first.seed == 7
    assert list(first.packages) == ["torch", "trl"]


def test_a_plan_without_training_has_no_recipes() -> None:
    """There is nothing to run."""
    assert recipes_of(plan(rows(count=5)), packages={}, seed=1) == ()


def test_a_recipe_round_trips_to_the_same_bytes() -> None:
    """Written, read and written again it is the same file, with a header that says what it is."""
    made = recipes_of(plan(rows()), packages=PACKAGES, seed=1)[0]
    content = encode(made)
    assert decode(content, "recipe.yaml") == made
    assert encode(decode(content, "recipe.yaml")) == content
    assert content.startswith(b"# A training recipe of ftadvisor: program sft, sft with lora.")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "YAML"),
        (b"\xff\xfe\x00", "YAML"),
        (b"", "recipe.yaml"),
        (b"program: sft\n", "recipe.yaml"),
        (b"- 1\n", "recipe.yaml"),
    ],
)
def test_a_broken_recipe_names_its_file(content: bytes, named: str) -> None:
    """Corrupt, empty and incomplete files are input errors."""
    with pytest.raises(InputError) as caught:
        decode(content, "recipe.yaml")
    assert named in caught.value.message


def test_an_unknown_field_is_refused() -> None:
    """A misspelt field is not silently ignored."""
    content = encode(recipe(learning_rate=1e-4)).replace(b"seed:", b"sede:")
    with pytest.raises(InputError) as caught:
        decode(content, "recipe.yaml")
    assert "sede" in caught.value.message


def test_a_good_recipe_passes() -> None:
    """Known keys in their ranges."""
    check(recipe(learning_rate=1e-4, epochs=2, packing=False, scheduler="cosine", lora_r=16), PROGRAM)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"learning_rate": 1e-4, "lora_rr": 8}, UnknownNameError, "'lora_r'"),
        ({"learning_rate": 2.0}, UsageError, "between 0 and 1"),
        ({"learning_rate": True}, UsageError, "type float"),
        ({"learning_rate": 1e-4, "packing": 1}, UsageError, "type bool"),
        ({"learning_rate": 1e-4, "lora_r": 1.5}, UsageError, "type int"),
        ({"learning_rate": 1e-4, "scheduler": "cosin"}, UnknownNameError, "'cosine'"),
        ({"learning_rate": float("nan")}, UsageError, "between"),
        ({"epochs": 1}, UsageError, "lacks learning_rate"),
    ],
)
def test_a_recipe_that_does_not_suit_its_program(
    settings: dict[str, object], error: type[UsageError], named: str
) -> None:
    """The message names the key, the valid range and the nearest key."""
    with pytest.raises(error) as caught:
        check(recipe(**settings), PROGRAM)
    assert named in caught.value.message


def test_objective_and_tuner_must_be_the_programs() -> None:
    """A program is not handed what it cannot train."""
    good = recipe(learning_rate=1e-4)
    with pytest.raises(UnknownNameError):
        check(msgspec.structs.replace(good, tuner="ia3"), PROGRAM)
    with pytest.raises(UnknownNameError):
        check(msgspec.structs.replace(good, objective="dpo"), PROGRAM)


def shipped(name: str) -> Program:
    """The keys of a program in recipes/."""
    path = recipes_dir() / name / "program.toml"
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), type=Program)


PROGRAMS = sorted(
    p.parent.name for p in recipes_dir().glob("*/program.toml") if p.parent.name in load().objectives
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_plan_of_a_program_is_accepted_by_it(name: str) -> None:
    """Each tuner that a program trains gets a plan whose recipe the program takes."""
    program = shipped(name)
    for tuner in program.tuners:
        for hardware in (A100, CPU):
            made = _plan_for(name, tuner, hardware)
            assert made.method == tuner
            for one in recipes_of(made, packages={}, seed=1):
                if one.program == name:
                    check(one, program)


def _plan_for(name: str, tuner: str, hardware: dict[str, object]) -> Plan:
    kinds = load().objectives[name].data_kinds
    case = scenario(
        rows(kinds[0]),
        hardware=hardware,
        model="Qwen/Qwen2.5-0.5B-Instruct",
        requested_method=f"{tuner}+{name}",
        force=True,
    )
    return make_plan(case, load())


def test_programs_are_found() -> None:
    """The test above has something to test."""
    assert "sft" in PROGRAMS
    assert Path(recipes_dir()).is_dir()
