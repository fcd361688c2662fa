"""Models and datasets come from a hub, whole or not at all; every refusal names the next step."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advisor.probe.hub import _explained
from hub_server import COMMIT, Hub, Repository, running_hub
from tiny import make_tiny_model

CHILD = """
import json, sys
from advisor.errors import AdvisorError
from advisor.knowledge import load
from advisor.probe.dataset import profile_dataset
from advisor.probe.hub import fetch_model
from advisor.probe.model import read_model, tokenizer_file

def look(what, name, offline, revision):
    if what == "data":
        profile = profile_dataset(name, offline=offline)
        return {"rows": profile.rows, "kind": profile.kind, "path": profile.path}
    spec = read_model(name, offline=offline, revision=revision, knowledge=load())
    answer = {"id": spec.id, "revision": spec.revision, "parameters": spec.parameters,
              "licence": spec.licence, "template": spec.has_chat_template,
              "findings": [finding.code for finding in spec.findings],
              "tokenizer": tokenizer_file(spec) is not None}
    if what == "weights":
        folder = fetch_model(spec.id, revision=spec.revision, offline=offline).path
        answer["files"] = {f.name: f.stat().st_size for f in folder.iterdir()}
    return answer

for ask in json.loads(sys.argv[1]):
    try:
        answer = look(*ask)
    except AdvisorError as error:
        answer = {"code": error.code, "message": error.message, "remedy": error.remedy}
    print(json.dumps(answer))
"""
CHUNK_BYTES = 10 << 20
"""huggingface_hub writes in pieces of this size; what arrived beyond the last one is asked for again."""
TOKEN = "hf_" + "s" * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it lies on a hub, with files that must not be fetched."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with a plain and a gated model and a dataset."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_text("# about")
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(
            '{"prompt": "q", "completion": "a"}\n' * (7 if split == "train" else 2)
        )
    repositories = {
        "owner/plain": Repository(folder=model),
        "owner/closed": Repository(folder=model, gated=True, token=TOKEN),
        "owner/rows": Repository(folder=data, kind="dataset"),
    }
    with running_hub(repositories) as running:
        yield running


def _ask(
    home: Path, endpoint: str, what: str, name: str, *, offline: bool = False, revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return _ask_all(home, endpoint, (what, name, offline, revision), token=token)[0]


def _ask_all(
    home: Path, endpoint: str, *asks: tuple[str, str, bool, str | None], token: str | None = None
) -> list[dict[str, Any]]:
    """Run look-ups in a process of their own, as a person's command would."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_DISABLE_TELEMETRY", None)
    if token is not None:
        environment["HF_TOKEN"] = token
    arguments = json.dumps(asks)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _fetched(hub: Hub) -> list[str]:
    return [
        path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path
    ]


def test_looking_at_a_model_fetches_no_weights(hub: Hub, tmp_path: Path, model: Path) -> None:
    """Planning needs the configuration, tokenizer and card only; the commit is pinned."""
    answer = _ask(tmp_path / "home", hub.endpoint, "config", "owner/plain")
    assert answer["revision"] == COMMIT
    assert (answer["licence"], answer["template"], answer["findings"]) == ("apache-2.0", True, [])
    assert answer["tokenizer"]
    assert sorted(_fetched(hub)) == sorted(
        ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json"]
    )  # fmt: skip
    assert not any("telemetry" in path for _, path, _ in hub.requests)


def test_whole_model_is_fetched_and_then_works_offline(hub: Hub, tmp_path: Path, model: Path) -> None:
    """Weights come when training needs them, without pickles and copies; afterwards no network is needed."""
    home = tmp_path / "home"
    answer = _ask(home, hub.endpoint, "weights", "owner/plain")
    assert answer["files"]["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert not {"pytorch_model.bin", "params.json"} & set(_fetched(hub))
    hub.requests.clear()
    assert _ask(home, hub.endpoint, "weights", "owner/plain", offline=True) == answer
    assert hub.requests == []


def test_offline_says_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    """Without network and without the files the error names the command that fetches them."""
    nothing, config, weights = _ask_all(
        tmp_path / "home",
        hub.endpoint,
        ("config", "owner/plain", True, None),
        ("config", "owner/plain", False, None),
        ("weights", "owner/plain", True, None),
    )
    assert nothing["code"] == weights["code"] == "hub_offline"
    assert "hf download owner/plain" in nothing["remedy"]
    assert config["revision"] == COMMIT
    assert "model.safetensors" in weights["message"]
    assert "model.safetensors" not in _fetched(hub)


def test_cut_download_resumes(hub: Hub, tmp_path: Path) -> None:
    """A transfer that breaks off twice goes on where it stopped, and the file is whole."""
    folder = make_tiny_model(tmp_path / "large", vocab=8192, hidden=768, layers=1)
    hub.repositories["owner/large"] = Repository(
        folder=folder, cut_after={"model.safetensors": [CHUNK_BYTES + 1000, CHUNK_BYTES + 1000]}
    )
    answer = _ask(tmp_path / "home", hub.endpoint, "weights", "owner/large")
    assert "code" not in answer, answer
    ranges = [span for method, path, span in hub.requests if method == "GET" and "model.safetensors" in path]
    assert ranges == [None, f"bytes={CHUNK_BYTES}-", f"bytes={2 * CHUNK_BYTES}-"]
    (stored,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    assert stored.read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_" + "x" * 30, 403)])
def test_gated_model_asks_to_accept_its_terms(
    hub: Hub, tmp_path: Path, token: str | None, status: int
) -> None:
    """A gated model, signed in or not, is answered with its page and the command that signs in."""
    answer = _ask(tmp_path / "home", hub.endpoint, "config", "owner/closed", token=token)
    assert answer["code"] == "hub_gated"
    assert f"HTTP {status}" in answer["message"]
    assert f"{hub.endpoint}/owner/closed" in answer["remedy"]
    assert "hf auth login" in answer["remedy"]


def test_gated_model_opens_with_the_right_token(hub: Hub, tmp_path: Path) -> None:
    """With a token that may read it, a gated model is like any other; the token is never shown."""
    assert (
        _ask(tmp_path / "home", hub.endpoint, "config", "owner/closed", token=TOKEN)["id"] == "owner/closed"
    )


@pytest.mark.parametrize("token", [None, TOKEN])
def test_missing_model_names_the_nearest(hub: Hub, tmp_path: Path, token: str | None) -> None:
    """A mistyped id is answered with ids that are known."""
    answer = _ask(tmp_path / "home", hub.endpoint, "config", "Qwen/Qwen3-0.6BB", token=token)
    assert answer["code"] == "hub_missing"
    assert "Did you mean Qwen/Qwen3-0.6B" in answer["message"]


def test_missing_revision_is_named(hub: Hub, tmp_path: Path) -> None:
    """A revision that the repository lacks is told apart from a missing repository."""
    answer = _ask(tmp_path / "home", hub.endpoint, "config", "owner/plain", revision="v9")
    assert answer["code"] == "hub_missing"
    assert "revision" in answer["message"]


def test_hub_out_of_reach(tmp_path: Path) -> None:
    """Without a network the error names --offline and local folders, at once."""
    answer = _ask(tmp_path / "home", "http://127.0.0.1:9", "config", "owner/plain")
    assert answer["code"] == "hub_unreachable"
    assert "--offline" in answer["remedy"]


def test_dataset_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """A dataset id is fetched, its training split read, and found again offline."""
    answer = _ask(tmp_path / "home", hub.endpoint, "data", "owner/rows")
    assert (answer["rows"], answer["kind"]) == (7, "prompt_completion")
    assert Path(answer["path"]).is_dir()
    hub.requests.clear()
    assert _ask(tmp_path / "home", hub.endpoint, "data", "owner/rows", offline=True) == answer
    assert hub.requests == []


def test_download_that_the_disk_cannot_hold_does_not_begin(hub: Hub, tmp_path: Path, model: Path) -> None:
    """The size is known before the transfer; too little space is an error that names both figures."""
    hub.claimed_bytes["model.safetensors"] = 1 << 60
    answer = _ask(tmp_path / "home", hub.endpoint, "weights", "owner/plain")
    assert answer["code"] == "disk"
    assert "needs" in answer["message"]
    assert "HF_HOME" in answer["remedy"]
    assert "model.safetensors" not in _fetched(hub)


def test_disk_that_fills_up_is_told_apart() -> None:
    """A disk that fills during the transfer is not taken for a fault of the network."""
    full = OSError(errno.ENOSPC, "No space left on device")
    assert _explained(full, "owner/plain", "model", offline=False, known=()).code == "disk"


def test_missing_dataset(hub: Hub, tmp_path: Path) -> None:
    """A dataset that the hub lacks is an error of the hub."""
    assert _ask(tmp_path / "home", hub.endpoint, "data", "owner/nothing")["code"] == "hub_missing"
