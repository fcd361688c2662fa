"""The report of a run: all of it is told, and a browser shows it whole, narrow or wide, dark or light."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from advisor.errors import TrainingError
from advisor.knowledge import load
from advisor.run.charts import MOST_POINTS, charts_of, thinned, ticks
from advisor.run.events import EventWriter, read_events
from advisor.run.page import write_page
from advisor.run.report import build_report
from advisor.run.thresholds import thresholds_of
from advisor.run.verdict import judge
from advisor.storage import encode_yaml, file_sha256, read_record, write_atomic, write_json
from advisor.types import (
    Asked,
    Check,
    Export,
    ExportedFile,
    Measured,
    Recipe,
    RecipeDataset,
    RecipeModel,
    RowLoss,
    RunReport,
    Verification,
)
from cases import plan, rows

WIDTHS = (360, 800, 1440)
HERE = Path(__file__).parent
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
ARABIC = "عاصمة النرويج هي أوسلو، وهي مدينة كبيرة على البحر."
CARD = f"""---
library_name: gguf
---
# tea

| file | size |
|---|---|
| **tea-Q8_0.gguf** (recommended) | 3.29 MiB |

## Checksums (SHA-256)

- `tea-Q8_0.gguf`: `{"0f" * 32}`
- <script>alert(1)</script>
"""


def measured(loss: float, answer: str) -> Measured:
    """What was asked at one time."""
    asked = tuple(
        Asked(
            prompt=f"Question {n}? {LONG if n == 1 else ''}", answer=answer, tokens=9, ended=True, right=n < 5
        )
        for n in range(8)
    )
    lost = tuple(RowLoss(dataset="tone", tokens=10, loss=10 * loss + n % 3) for n in range(12))
    return Measured(rows=lost, samples=asked[:4], probes=asked[4:])


def make_folder(folder: Path, *, failed: bool = False) -> Path:
    """Write a run folder of two stages, the first one put away, the second one done, exported, or failed."""
    folder.mkdir()
    made = plan(rows(count=200), rows("preference", 150), text="our tone", deploy="Ollama on my laptop")
    write_json(folder / "plan.json", made)
    judged = judge(measured(3.0, ARABIC), measured(1.0, LONG), {}, load().rules["evaluation"])
    error = (
        TrainingError("The loss at step 30 is not a finite number.", "Lower the rate.") if failed else None
    )
    for number, (objective, stage) in enumerate(zip(("sft", "dpo"), made.stages, strict=True), 1):
        recipe = Recipe(
            program=objective, objective=objective, tuner="lora", seed=41 + number,
            model=RecipeModel(id="tiny", path="tiny"), settings=stage.settings,
            datasets=(RecipeDataset(name="tone", path="tone.jsonl", kind="chat"),),
        )  # fmt: skip
        name, last = f"{number}-{objective}", number == 2
        file = folder / f"recipe-{name}.yaml"
        write_atomic(file, encode_yaml(recipe))
        with EventWriter(folder / "events.jsonl", name) as events:
            tell(events)
        own = [event for event in read_events(folder / "events.jsonl") if event["stage"] == name]
        report = build_report(
            own, recipe, recipe_sha256=file_sha256(file), status="failed" if failed and last else "done",
            estimate=stage.estimate, artefacts={"adapter": "adapter"}, packages={"torch": "2.15.0"},
            error=error if last else None, limits=thresholds_of(load().rules["policy"]).forgetting,
            evaluation=None if failed and last else judged,
        )  # fmt: skip
        place = folder if last else folder / "stages" / name
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "report.json", report)
    if not failed:
        export(folder / "export")
    assert write_page(folder) is not None
    return folder


def tell(events: EventWriter) -> None:
    """Tell what a small training tells."""
    sample = [{"text": "Tea?\n", "trained": False}, {"text": f"Yes. {LONG}", "trained": True}]
    events.write("data", rows=180, heldout_rows=20, left_out={"too_long": 2}, sample=sample)
    events.write("heldout", when="before", step=0, loss=5.0, accuracy=0.0)
    for when in ("before", "after"):
        events.write("evaluation", when=when, rows=12, seconds=3.05)
    for step in range(1, 31):
        events.write("step", step=step, total=30, loss=5 / step, margin=step / 30, memory_bytes=2**31)
        if step % 10 == 0:
            events.write(
                "heldout", when="after" if step == 30 else "", step=step, loss=5.5 / step, accuracy=0.9
            )
    events.write(
        "decision", message="Memory ran out at step 3: micro_batch 8 -> 4, effective batch kept at 16."
    )
    events.write("end", status="done", seconds=61.5)


def export(place: Path) -> None:
    """Write what an export and its proofs leave, the files themselves empty."""
    place.mkdir()
    files = []
    for quant, passed in (("Q8_0", True), ("Q4_K_M", False)):
        name = f"tea-{quant}.gguf"
        (place / name).touch()
        files.append(
            ExportedFile(path=f"/elsewhere/{name}", kind="gguf", quant=quant, bytes=3 << 20, sha256="0f" * 32)
        )
        check = Check(name="logits", passed=passed, measured={}, bound={}, evidence=f"KL 0.1 on {LONG}")
        proof = Verification(passed=passed, gguf=name, against="tea", quant=quant, checks=(check,))
        write_json(place / f"tea-{quant}.verification.json", proof)
    write_json(place / "export.json", Export(source="tea", files=tuple(files), notes=("Good to know.",)))
    (place / "README.md").write_text(CARD, encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run and a failed one."""
    place = tmp_path_factory.mktemp("runs")
    return {"done": make_folder(place / "tea"), "failed": make_folder(place / f"f-{LONG}"[:90], failed=True)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, where the machine has one; its sandbox needs another user than root."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine, so no page can be looked at")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["done", "failed"])
def test_a_browser_shows_all_of_it(
    browser: Browser, folders: dict[str, Path], which: str, scheme: Any
) -> None:
    """Nothing overflows, is cut or lies on top of something else; every text can be read; nothing is asked of
    anyone; headings, tables, pictures and links mean something to who does not see them."""
    page = browser.new_page(color_scheme=scheme)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    address = (folders[which] / "report.html").as_uri()
    page.goto(address)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    script = (HERE / "page_checks.js").read_text(encoding="utf-8")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(script) == [], f"{which}, {width} px, {scheme}"
    assert requests == [address]
    _tab_through(page)
    page.close()


def _tab_through(page: Page) -> None:
    """The keyboard reaches the first link of the contents, and one sees where it is."""
    page.keyboard.press("Tab")
    focused = page.evaluate(
        "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    )
    assert focused == ["A", "solid"]


def test_on_paper_nothing_is_folded_away(browser: Browser, folders: dict[str, Path]) -> None:
    """Printed, the closed parts are open: without them the reasons would be missing."""
    page = browser.new_page()
    page.goto((folders["done"] / "report.html").as_uri())
    hidden = "[...document.querySelectorAll('details table')].filter(t => !t.checkVisibility()).length"
    assert page.evaluate(hidden) > 0
    page.emulate_media(media="print")
    height = "[...document.querySelectorAll('details')].filter(d => d.offsetHeight < 60).length"
    assert page.evaluate(height) == 0
    page.close()


def test_the_page_tells_the_whole_run(folders: dict[str, Path]) -> None:
    """From the wish to the proof, for both stages; what is in a card or an answer is never markup."""
    page = (folders["done"] / "report.html").read_text(encoding="utf-8")
    for told in (
        "our tone", "Ollama on my laptop", "seed 42", "seed 43", "torch 2.15.0", "Memory ran out at step 3",
        "SFT with lora", "DPO with lora", "Held out: 5 at step 0, 0.1833 at step 30", "better", "rejected",
        "outside the band", "too long", ARABIC, "ftadvisor chat export/tea-Q8_0.gguf", "FAILED, do not use",
        "(recommended)", "Good to know.", 'data-label="size">3.29 MiB</td>', "Reward margin",
        "10% of the time",
    ):  # fmt: skip
        assert told in page, told
    assert "<script" not in page
    assert "library_name" not in page
    failed = (folders["failed"] / "report.html").read_text(encoding="utf-8")
    assert "The loss at step 30 is not a finite number." in failed
    assert "Lower the rate." in failed
    assert "ftadvisor chat" not in failed


def test_a_head_is_loaded_and_not_talked_to(tmp_path: Path) -> None:
    """A model that gives scores is no GGUF; the page says how to load it, with as many outputs as it has."""
    folder = make_folder(tmp_path / "tea")
    shutil.rmtree(folder / "export")
    report = read_record(folder / "report.json", RunReport)
    for program, artefact in (("reward", "model"), ("dpo", "stages/1-stars/adapter")):
        changed = msgspec.structs.replace(report, program=program, artefacts={"it": artefact})
        write_json(folder / "report.json", changed)
        assert write_page(folder) is not None
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert ("num_labels=1" in page) == (program == "reward")
        assert ("ftadvisor chat tea" in page) == (program == "dpo")
        assert "ftadvisor export tea" not in page


def test_a_curve_is_what_was_measured() -> None:
    """A step trained again counts once, a long line is thinned to means, and ticks hold all values."""
    events = [
        {"event": "step", "step": step, "loss": loss}
        for step, loss in ((1, 9.0), (2, 8.0), (2, 4.0), (3, 3.0))
    ]
    (chart,) = charts_of(events)
    assert chart.told == ("Training: 9 at step 1, 3 at step 3; lowest 3 at step 3, highest 9 at step 1.",)
    assert [tick.text for tick in chart.steps] == ["0", "1", "2", "3"]
    assert charts_of(events[:1]) == ()
    many = thinned([(step, float(step % 2)) for step in range(10 * MOST_POINTS)])
    assert len(many) == MOST_POINTS
    assert {value for _, value in many} == {0.5}
    for low, high in ((0.0, 1.0), (-3e-5, 4e-5), (2.0, 2.0), (0.0, 0.0), (0.134, 5.39)):
        marks = ticks(low, high)
        assert marks[0] <= low <= high <= marks[-1]
        assert 2 <= len(marks) <= 7
