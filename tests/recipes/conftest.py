"""The real trainings that several tests look at; each costs about 15 CPU-seconds of imports, so they are
shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from advisor.types import RunReport
from tiny import make_tiny_model
from training import make_run, rows, run, write_rows


class Trained:
    """A finished run with what was seen while it went."""

    def __init__(self, folder: Path, report: RunReport, events: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.report = report
        self.events = events


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a ChatML template."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden=128)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions with answers."""
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows())


class Runs:
    """Uninterrupted runs by tuner; each is made when it is first asked for, so that no test waits for all."""

    def __init__(self, place: Path, model: Path, data: Path) -> None:
        self._place, self._model, self._data = place, model, data
        self._done: dict[str, Trained] = {}

    def __getitem__(self, tuner: str) -> Trained:
        if tuner not in self._done:
            precision = "bf16" if tuner == "qlora" else "fp32"
            curves = "tensorboard" if tuner == "lora" else "none"
            folder = make_run(
                self._place / tuner, tuner=tuner, model=self._model, data=self._data, precision=precision,
                report_to=curves,
            )  # fmt: skip
            seen: list[dict[str, Any]] = []
            self._done[tuner] = Trained(folder, run(folder, on_event=seen.append), seen)
        return self._done[tuner]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_file: Path) -> Runs:
    """One uninterrupted run of each tuner."""
    return Runs(tmp_path_factory.mktemp("runs"), tiny_model, data_file)
