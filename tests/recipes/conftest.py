"""The real trainings that several tests look at; each costs about 15 CPU-seconds of imports, so they are
shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model
from training import make_run, rows, run, write_rows

from advisor.types import RunReport


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


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_file: Path
) -> dict[str, Trained]:
    """One uninterrupted run of each tuner."""
    done = {}
    for tuner in ("full", "lora", "qlora"):
        folder = make_run(
            tmp_path_factory.mktemp(tuner) / "run", tuner=tuner, model=tiny_model, data=data_file,
            **({"precision": "bf16"} if tuner == "qlora" else {}),
        )  # fmt: skip
        seen: list[dict[str, Any]] = []
        done[tuner] = Trained(folder, run(folder, on_event=seen.append), seen)
    return done
