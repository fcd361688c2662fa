"""What gives marks: each reward function on answers whose mark is known, and the files that a plan takes
along."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from advisor.cli.planning import require_trainable, write_plan
from advisor.errors import InputError, RefusedError
from advisor.knowledge import load
from advisor.plan import make_plan
from advisor.probe.model import read_model
from advisor.storage import read_record
from advisor.types import Recipe
from cases import CPU, rows, scenario
from training import events_of, run_here, write_rows

torch = pytest.importorskip("torch")

from advisor.train.rewards import rewards_of  # noqa: E402 - after the check that torch is installed
from advisor.train.settings import ReinforcementSettings  # noqa: E402

TESTS = json.dumps([{"contains": "Oslo"}, {"lacks": "sorry"}, {"matches": "^It"}, {"number": "3"}])
SCHEMA = json.dumps({"type": "object", "required": ["town"], "properties": {"town": {"type": "string"}}})


def marks(name: str, answers: list[str], reference: str = "", **settings: Any) -> list[float]:
    """The marks that one function of a recipe gives."""
    chosen = ReinforcementSettings(
        learning_rate=1e-5, micro_batch=4, effective_batch=4, max_seq_len=64, reward_functions=[name],
        **settings,
    )  # fmt: skip
    found: Any = rewards_of(None, chosen, None, None, answered=bool(reference))  # type: ignore[arg-type]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return list(found[0](completions=completions, reference=[reference] * len(answers)))


@pytest.mark.parametrize(
    ("name", "reference", "settings", "good", "bad"),
    [
        ("exact_match", "Oslo", {}, " oslo. ", "It is Oslo"),
        ("contains", "Oslo", {}, "It is OSLO!", "It is Bergen"),
        ("number_match", "1,200", {}, "so 1200", "so 12"),
        ("regular_expression", "", {"reward_pattern": "^<b>.*</b>$"}, "<b>a\nb</b>", "<b>a"),
        ("valid_json", "", {}, '{"a": null}', "{a: null}"),
        ("valid_json", "", {}, "null", ""),
        ("json_schema", "", {"reward_schema": SCHEMA}, '{"town": "Oslo"}', '{"town": 3}'),
        ("json_schema", "", {"reward_schema": SCHEMA}, '{"town": "Oslo", "a": 1}', "Oslo"),
        ("checks", TESTS, {}, "It is Oslo, 3 times", "no"),
    ],
)
def test_a_good_answer_gets_more(
    name: str, reference: str, settings: dict[str, Any], good: str, bad: str
) -> None:
    """One for what is wanted; none for what is not, or the share of the checks that it passes."""
    right, wrong = marks(name, [good, bad], reference, **settings)
    assert right == 1.0
    assert wrong == (0.25 if name == "checks" else 0.0)


def test_length_falls_off_to_both_sides() -> None:
    """Full marks at the wanted number of words, fewer the further away."""
    exact, near, far = marks("length", ["a b c", "a b", ""], reward_length=3)
    assert exact == 1.0
    assert exact > near > far > 0


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("exact_match", {}, RefusedError),
        ("checks", {}, RefusedError),
        ("regular_expression", {}, RefusedError),
        ("regular_expression", {"reward_pattern": "("}, InputError),
        ("json_schema", {}, RefusedError),
        ("json_schema", {"reward_schema": '{"type": 3}'}, InputError),
        ("json_schema", {"reward_schema": "town"}, InputError),
    ],
)
def test_a_function_without_what_it_needs_is_refused(
    name: str, settings: dict[str, Any], error: type[Exception]
) -> None:
    """Before the model is loaded, with what to set."""
    with pytest.raises(error):
        marks(name, ["a"], **settings)


@pytest.mark.parametrize("answer", ["Oslo", "[]", '[{"contain": "Oslo"}]', '["Oslo"]'])
def test_checks_that_are_none_are_named(answer: str) -> None:
    """A row whose answer is no list of known checks stops the training instead of giving nought."""
    with pytest.raises(InputError, match="list of checks"):
        marks("checks", ["Oslo"], answer)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def reward(text, reference:", "cannot be loaded: SyntaxError"),
        ("import no_such_library", "cannot be loaded: ModuleNotFoundError"),
        ("def mark(text, reference): return 1", "has no function reward"),
        ("def reward(text): return 1", "fails on the answer 'a b': TypeError"),
        ("def reward(text, reference): return {}[text]", "fails on the answer 'a b': KeyError"),
        ("def reward(text, reference): return 'good'", "fails on the answer 'a b': ValueError"),
        ("def reward(text, reference): return float('nan')", "not a finite number"),
    ],
)
def test_own_code_that_fails_is_named(tmp_path: Path, code: str, words: str) -> None:
    """Whatever the person's own file does, the error says which answer it failed on and how."""
    file = tmp_path / "own.py"
    file.write_text(code)
    chosen = ReinforcementSettings(
        learning_rate=1e-5, micro_batch=4, effective_batch=4, max_seq_len=64, reward_file=str(file)
    )
    with pytest.raises(InputError, match=words) as caught:
        rewards_of(None, chosen, None, None, answered=False)[0](completions=["a b"])  # type: ignore[arg-type]
    assert str(file) in caught.value.message


def planned(folder: Path, model: Path, data: Path, *, kind: str, **overrides: Any) -> Path:
    """Plan reinforcement on a real model and file, and write the run folder."""
    usual = {"max_steps": 1, "micro_batch": 8, "effective_batch": 8, "max_completion_length": 8}
    case = scenario(
        rows(kind, 600), hardware=CPU, requested_method="lora+grpo", force=True, text="a reward function",
        overrides={**usual, **overrides},
    )  # fmt: skip
    files = tuple(
        msgspec.structs.replace(one, path=str(data), mapping={}, format="jsonl") for one in case.datasets
    )
    case = msgspec.structs.replace(
        case, spec=read_model(str(model), knowledge=load()), model=str(model), datasets=files
    )
    made = make_plan(case, load())
    require_trainable(made, case)
    return write_plan(made, folder, datetime(2026, 1, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_own_reward_and_schema_lie_in_the_run_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --set names is copied, so that the folder runs where it is moved to and both give marks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def reward(text, reference):\n    return text.count('e')\n")
    (tmp_path / "schema.json").write_text(SCHEMA)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"Say {word}."} for word in ("one", "two")])
    folder = planned(
        tmp_path / "run", tiny_model, data, kind="prompts", reward_file="own.py",
        reward_functions=["json_schema"], reward_schema="schema.json",
    )  # fmt: skip
    (tmp_path / "own.py").unlink()
    (tmp_path / "schema.json").unlink()
    recipe = read_record(folder / "recipe.yaml", Recipe)
    assert recipe.settings["reward_schema"] == SCHEMA
    moved = folder.rename(tmp_path / "moved")
    assert run_here(moved) == 0, events_of(moved, "error")
    assert events_of(moved, "data")[0]["rewards"] == ["json_schema", "own"]


def test_reinforcement_without_a_reward_is_refused_when_planned(tiny_model: Path, tmp_path: Path) -> None:
    """Prompts alone say nothing of how good an answer is; a missing file is named."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "Say one."}])
    with pytest.raises(RefusedError, match="how good an answer is") as caught:
        planned(tmp_path / "run", tiny_model, data, kind="prompts")
    assert "reward_functions" in caught.value.remedy
    with pytest.raises(InputError, match=r"missing\.py"):
        planned(tmp_path / "run", tiny_model, data, kind="prompts", reward_file="missing.py")
    assert not (tmp_path / "run").exists()
