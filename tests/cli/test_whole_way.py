"""The whole way through the command line on the embedded model, with the network blocked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from advisor.resources import starter_dir

pytestmark = pytest.mark.slow


def ftadvisor(*arguments: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command line; it must end with `status`."""
    answer = subprocess.run(
        [sys.executable, "-m", "advisor", *arguments], capture_output=True, text=True, cwd=cwd, check=False,
        stdin=subprocess.DEVNULL, timeout=280,
    )  # fmt: skip
    assert answer.returncode == status, answer.stderr + answer.stdout[-2000:]
    return answer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The demo, run once as a person runs it, with its JSON answer."""
    folder = tmp_path_factory.mktemp("demo")
    answer = ftadvisor("demo", "--out", "tea", "--json", cwd=folder)
    return folder, json.loads(answer.stdout)


def test_demo_changes_the_voice_and_keeps_the_rest(demo: tuple[Path, dict[str, object]]) -> None:
    """At most 10% of held-out answers are in the brand voice before, at least 80% after; facts stay right."""
    _, answer = demo
    assert answer["schema"] == "ftadvisor.demo/1"
    assert answer["ok"] is True
    assert answer["voice_before"] <= 0.10  # type: ignore[operator]
    assert answer["voice_after"] >= 0.80  # type: ignore[operator]
    assert answer["general_before"] >= 0.80  # type: ignore[operator]
    assert answer["general_after"] >= answer["general_before"] - 0.15  # type: ignore[operator]


def test_demo_proves_every_file(demo: tuple[Path, dict[str, object]]) -> None:
    """F16, Q8_0 and Q4_K_M are each proved by all checks; the arithmetic where logits differ anyway."""
    folder, _ = demo
    proofs = [
        json.loads(path.read_text())
        for path in sorted((folder / "tea" / "export").glob("*.verification.json"))
    ]
    assert {proof["quant"] for proof in proofs} == {"F16", "Q8_0", "Q4_K_M"}
    names = {"token_ids", "logits", "greedy_text", "chat_template", "special_tokens", "metadata", "tensors"}
    for proof in proofs:
        assert proof["passed"] is True
        own = set() if proof["quant"] == "F16" else {"arithmetic"}
        assert {check["name"] for check in proof["checks"]} == names | own
        assert all(check["evidence"] for check in proof["checks"])


def test_demo_leaves_a_whole_run_folder(demo: tuple[Path, dict[str, object]]) -> None:
    """The folder holds what the contract names, and its report says predicted and measured."""
    folder, _ = demo
    run = folder / "tea"
    for name in (
        "plan.json",
        "recipe.yaml",
        "events.jsonl",
        "report.json",
        "report.html",
        "export",
        "checkpoints",
    ):
        assert (run / name).exists(), name
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "done"
    assert report["measured_peak_bytes"] > 0
    assert report["predicted_peak_bytes"]["expected"] > 0
    assert report["heldout_loss_after"] < report["heldout_loss_before"]
    assert report["evaluation"]["verdict"] == "better"
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_moved_run_folder_still_works(demo: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """The folder is moved whole; it is listed, explained, verified and talked to at its new place."""
    folder, _ = demo
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", str(folder / "tea"), str(moved)], check=True)
    (gguf,) = moved.glob("export/*Q8_0.gguf")
    listed = json.loads(ftadvisor("runs", str(tmp_path), "--json", cwd=tmp_path).stdout)
    assert [run["status"] for run in listed["runs"]] == ["done"]
    for proved in moved.glob("export/*.verification.json"):
        proved.unlink()
    proof = json.loads(ftadvisor("verify", str(gguf), "--against", str(moved), "--json", cwd=tmp_path).stdout)
    assert proof["schema"] == "ftadvisor.verification/1"
    assert proof["passed"] is True
    page, card = ((moved / name).read_text() for name in ("report.html", "export/README.md"))
    assert f'{gguf.name}: <span class="good">proved' in page
    assert page.count(">not verified<") == len(list(moved.glob("export/*.gguf"))) - 1
    assert card.count("token_ids, ") == 1, "card and page tell the one proof that is there"
    said = json.loads(ftadvisor("chat", str(gguf), "--prompt", "Hello!", "--json", cwd=tmp_path).stdout)
    assert said["answers"][str(gguf)].startswith("Ahoy")
    assert "learning_rate" in ftadvisor("explain", str(moved), cwd=tmp_path).stdout
    (moved / "report.html").unlink()
    (moved / "report.html").mkdir()  # nothing can be written there
    more = ("--quant", "Q8_0", "--no-verify", "--out", "more", "--json")
    made = json.loads(ftadvisor("export", str(moved), *more, cwd=tmp_path).stdout)["export"]
    assert (tmp_path / made["files"][0]["path"]).is_file()
    assert "the report of the run does not tell of these files" in made["notes"][-1]


def test_verify_fails_for_another_model(demo: tuple[Path, dict[str, object]]) -> None:
    """A file that was not made from the model is not proved: exit 1, with the checks that failed."""
    folder, _ = demo
    (own,) = (folder / "tea" / "export").glob("*Q8_0.gguf")
    answer = ftadvisor("verify", str(own), "--against", str(starter_dir()), "--json", cwd=folder, status=1)
    proof = json.loads(answer.stdout)
    assert proof["passed"] is False
    assert not next(check for check in proof["checks"] if check["name"] == "logits")["passed"]
    kept = json.loads(own.with_suffix(".verification.json").read_text())
    assert kept["passed"] is True, "the file's own proof stays"


def test_second_run_into_a_used_folder_is_refused(demo: tuple[Path, dict[str, object]]) -> None:
    """A trained folder is not trained again; nothing in it changes."""
    folder, _ = demo
    before = (folder / "tea" / "report.json").read_bytes()
    answer = ftadvisor("run", "tea", cwd=folder, status=3)
    assert "tea" in answer.stderr
    assert (folder / "tea" / "report.json").read_bytes() == before


def test_qlora_on_cpu_from_alpaca_rows_to_an_answer(tmp_path: Path) -> None:
    """QLoRA trains on the processor, is merged into the unquantised base, exported, proved and answers."""
    rows = [
        {"instruction": f"Add {i} and 1.", "input": "", "output": f"The sum is {i + 1}."} for i in range(300)
    ]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    made = ftadvisor(
        "plan", "--model", "starter", "--data", "sums.json", "--goal", "answer sums", "--method", "qlora",
        "--set", "max_steps=6", "--out", "run", "--json", cwd=tmp_path,
    )  # fmt: skip
    plan = json.loads(made.stdout)
    assert plan["method"] == "qlora"
    assert plan["stages"][0]["settings"]["max_steps"] == 6
    report = json.loads(ftadvisor("run", "run", "--json", cwd=tmp_path).stdout)
    assert report["steps"] == 6
    assert report["last_loss"] < report["first_loss"]
    exported = json.loads(ftadvisor("export", "run", "--json", cwd=tmp_path).stdout)
    assert exported["ok"] is True
    (file,) = (one for one in exported["export"]["files"] if one["kind"] == "gguf")
    assert plan["export"]["quant"] in file["path"], "the planned quantisation, unless told otherwise"
    said = json.loads(
        ftadvisor("chat", file["path"], "--prompt", "Add 3 and 1.", "--json", cwd=tmp_path).stdout
    )
    assert said["answers"][file["path"]]


def _is_whole(file: Path) -> bool:
    """Whether a GGUF has its final name and all of its last tensor."""
    last = gguf.GGUFReader(file).tensors[-1]
    return file.suffix == ".gguf" and file.stat().st_size >= last.data_offset + last.n_bytes


def test_ctrl_c_while_the_data_are_read(tmp_path: Path) -> None:
    """Ctrl-C in a plan ends with 130 and a plain line, and leaves no folder behind."""
    data = tmp_path / "many.jsonl"
    row = json.dumps({"prompt": "a question", "completion": "an answer " * 20}) + "\n"
    data.write_text(row * 400_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "advisor", "plan", "--data", str(data), "--out", str(tmp_path / "run")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "Reading" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["export", "verify", "chat"])
def test_ctrl_c_in_each_stage(demo: tuple[Path, dict[str, object]], tmp_path: Path, stage: str) -> None:
    """Ctrl-C ends with 130, without a traceback and without a half file; what was there stays usable."""
    folder, answer = demo
    gguf = str(folder / str(answer["gguf"]))
    commands = {
        "export": ["export", "tea", "--quant", "F16,Q4_K_M", "--out", str(tmp_path / "out")],
        "verify": ["verify", gguf, "--against", "tea"],
        "chat": [
            "chat",
            gguf,
            "--prompt",
            "Tell me a very long story.",
            "--temperature",
            "5",
            "--max-tokens",
            "900",
        ],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "advisor", *commands[stage]], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep({"export": 1.2, "verify": 3.0, "chat": 1.0}[stage])
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors
    if process.returncode == 130:
        assert all(_is_whole(file) for file in tmp_path.glob("out/*"))
    assert Path(gguf).stat().st_size > 0


def test_starter_is_what_the_demo_used(demo: tuple[Path, dict[str, object]]) -> None:
    """The plan of the demo names the embedded model and its data."""
    folder, _ = demo
    plan = json.loads((folder / "tea" / "plan.json").read_text())
    assert plan["model"]["id"] == "starter"
    assert Path(plan["model"]["path"]) == starter_dir()
