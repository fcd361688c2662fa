"""Tasks of lm-evaluation-harness, where it is installed: asked of the base and of what a run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advisor.errors import UsageError
from advisor.run.harness import Tasks, check_tasks, with_tasks
from advisor.run.stages import REPORT
from advisor.storage import read_record
from advisor.types import RunReport
from training import make_run, run

pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
pytestmark = pytest.mark.slow
TASK = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_is_asked_before_and_after(tmp_path: Path, tiny_model: Path, data_file: Path) -> None:
    """A task of one's own over what was trained goes up; an unknown one is refused before the training."""
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    asked = [{"question": row["instruction"], "choices": [row["output"], "No."], "label": 0} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "tasks").mkdir()
    text = TASK.replace("FILE", str(tmp_path / "rows.jsonl"))
    (tmp_path / "tasks" / "colours.yaml").write_text(text)
    folder = make_run(tmp_path / "run", tuner="full", model=tiny_model, data=data_file, max_steps=20)
    with pytest.raises(UsageError, match="nosuch"):
        check_tasks(folder, Tasks(names=("nosuch",), folder=tmp_path / "tasks", offline=True))
    tasks = Tasks(names=("colours",), folder=tmp_path / "tasks", offline=True)
    check_tasks(folder, tasks)
    (score,) = with_tasks(folder, run(folder), tasks).tasks
    assert (score.task, score.metric) == ("colours", "acc")
    assert score.before < 0.9 < score.after
    assert read_record(folder / REPORT, RunReport).tasks == (score,)
