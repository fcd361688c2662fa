"""Writes report.html: one self-contained page that tells a run from wish to proof.

Goes in: a run folder (plan.json, recipes, reports, events.jsonl, export/). Comes out: report.html.
Never does: load anything from elsewhere, compute what the records do not say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from advisor.run.charts import Chart, charts_of
from advisor.run.continual import losses_by_task
from advisor.run.events import read_events, stage_of
from advisor.run.stages import EVENTS, PLAN, REPORT, recipe_files
from advisor.run.verdict import is_share
from advisor.storage import file_sha256, read_record, write_atomic
from advisor.types import (
    Band,
    Candidate,
    Change,
    Export,
    ExportedFile,
    Plan,
    Recipe,
    Record,
    RunReport,
    Verification,
)
from advisor.units import format_bytes, format_count, format_score, format_seconds

CARDS = ("MODEL_CARD.md", "README.md")
"""What export writes beside its files; the first where another's README.md stands."""
ROLES = {
    "table_open": "table", "thead_open": "rowgroup", "tbody_open": "rowgroup", "tr_open": "row",
    "th_open": "columnheader", "td_open": "cell",
}  # fmt: skip
VERDICTS = {
    "better": "better", "no_different": "no different", "worse": "worse", "forgot": "forgot",
    "not_learned": "not learned", "unknown": "not judged",
}  # fmt: skip


class Told(Record, frozen=True, kw_only=True):
    """One stage: what it was to do, what came of it."""

    name: str
    title: str
    recipe: Recipe
    report: RunReport | None
    """None: it has not ended."""
    charts: tuple[Chart, ...]
    account: dict[str, object]
    """What the program counted in the data before its first step; empty: it never came so far."""


class Comparison(Record, frozen=True, kw_only=True):
    """A quantity that was predicted and measured, in words."""

    name: str
    predicted: str = ""
    first_steps: str = ""
    measured: str = ""
    agrees: str = ""


def write_page(folder: Path) -> Path | None:
    """Write report.html of a run folder; None when the run has no report yet, or no plan.

    Raises:
        InputError: a record of the folder cannot be decoded.
        DiskError: the page cannot be written.
    """
    if not (folder / REPORT).is_file() or not (folder / PLAN).is_file():
        return None
    plan, exported = read_record(folder / PLAN, Plan), folder / "export"
    stages = _stages(folder)
    made = [read_record(path, Export) for path in exported.glob("export.json")]
    files = tuple(file for one in made for file in (*one.files, *one.kept))
    notes = tuple(note for one in made for note in one.notes)
    proofs = _proofs(exported)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            plan=plan,
            report=read_record(folder / REPORT, RunReport),
            stages=stages,
            comparisons={stage.name: comparisons_of(stage.report) for stage in stages if stage.report},
            files=files,
            notes=notes,
            proofs=proofs,
            best=_best(files, proofs, plan),
            card=_card(exported),
            modelfile=(exported / "Modelfile").is_file(),
            name=folder.resolve().name,
        )
    )
    target = folder / "report.html"
    write_atomic(target, page.encode())
    return target


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("advisor.run", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        bytes=format_bytes, count=format_count, seconds=format_seconds, value=_value, band=_band,
        before=_before, after=_after, change=_change, verdict=VERDICTS.__getitem__,
        score=format_score, way=_way, times=lambda band: _band(band, format_seconds),
        file=lambda path: Path(path).name, losses_by_task=losses_by_task,
    )  # fmt: skip
    return environment


def _stages(folder: Path) -> tuple[Told, ...]:
    """Return the stages in order; the report in the run folder itself is of the last one that was begun."""
    events = list(read_events(folder / EVENTS))
    now = read_record(folder / REPORT, RunReport)
    found = []
    for file in recipe_files(folder):
        recipe = read_record(file, Recipe)
        name = stage_of(file.name, recipe.objective)
        put_away = folder / "stages" / name / REPORT
        if put_away.is_file():
            report: RunReport | None = read_record(put_away, RunReport)
        else:
            report = now if now.recipe_sha256 == file_sha256(file) else None
        own = [event for event in events if event.get("stage") == name]
        account = next((event for event in reversed(own) if event["event"] == "data"), {})
        title = f"{recipe.objective.upper()} with {recipe.tuner}"
        found.append(
            Told(name=name, title=title, recipe=recipe, report=report, charts=charts_of(own), account=account)
        )
    return tuple(found)


def _proofs(exported: Path) -> dict[str, Verification]:
    """Return the proof of each GGUF file that is there, by its name."""
    found = {}
    for path in sorted(exported.glob("*.verification.json")):
        proof = read_record(path, Verification)
        name = Path(proof.gguf).name
        if (exported / name).is_file():
            found[name] = proof
    return found


def _best(files: tuple[ExportedFile, ...], proofs: dict[str, Verification], plan: Plan) -> str:
    """Return the file to use: what the plan chose, else the last that did not fail; empty without one."""
    usable = {
        file.quant: name
        for file in files
        if file.kind == "gguf" and ((name := Path(file.path).name) not in proofs or proofs[name].passed)
    }
    chosen = None if plan.export is None else plan.export.quant
    return usable.get(chosen) or next(reversed(usable.values()), "")


def comparisons_of(report: RunReport) -> tuple[Comparison, ...]:
    """Return what was predicted beside what was measured."""
    done = report.status == "done"
    asking = report.evaluation_seconds
    share = f", {asking / report.seconds:.0%} of the time" if asking and report.seconds else ""
    return (
        Comparison(
            name="Memory at the peak",
            predicted=_band(report.predicted_peak_bytes, format_bytes),
            first_steps=_band(report.whole_peak_bytes, format_bytes),
            measured=_maybe(report.measured_peak_bytes, format_bytes),
            agrees=_agrees(report.predicted_peak_bytes, report.measured_peak_bytes),
        ),
        Comparison(
            name="Time" if done else "Time, as far as it went",
            predicted=_band(report.predicted_seconds, format_seconds),
            first_steps=_band(report.whole_seconds, format_seconds),
            measured=format_seconds(report.seconds),
            agrees=_agrees(report.predicted_seconds, report.seconds) if done else "",
        ),
        *(
            [Comparison(name="Of it, asking before and after", measured=f"{format_seconds(asking)}{share}")]
            if asking is not None
            else []
        ),
    )


def _agrees(band: Band | None, measured: float | None) -> str:
    """Return how far the measured figure is from the expected one, and whether the band holds it."""
    if band is None or measured is None or not band.expected:
        return ""
    within = "within" if band.low <= measured <= band.high else "outside"
    return f"{100 * (measured / band.expected - 1):+.0f} % of expected, {within} the band"


def _maybe(value: float | None, words: Callable[[float], str]) -> str:
    return "" if value is None else words(value)


def _band(band: Band | None, words: Callable[[float], str] = format_bytes) -> str:
    if band is None:
        return ""
    return f"{words(band.expected)} ({words(band.low)} to {words(band.high)})"


def _way(candidate: Candidate) -> str:
    """Return method, objectives and model; a way that is named after its objective says it once."""
    return " ".join(dict.fromkeys((candidate.method, "+".join(candidate.objectives), candidate.model)))


def _before(change: Change) -> str:
    return _figure(change, change.before)


def _after(change: Change) -> str:
    return _figure(change, change.after)


def _figure(change: Change, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(change) else f"{value:.3g}"


def _change(change: Change) -> str:
    if change.low is None or change.high is None:
        return ""
    if is_share(change):
        return f"{100 * change.low:+.1f} to {100 * change.high:+.1f} points"
    return f"{change.low:+.3g} to {change.high:+.3g}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _card(exported: Path) -> Markup:
    """Return the model card of an export as HTML, its headings below those of the page; empty without one."""
    file = next((exported / name for name in CARDS if (exported / name).is_file()), None)
    if file is None:
        return Markup()
    text = file.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        _, _, text = text.removeprefix("---\n").partition("\n---\n")
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = reader.parse(text)
    heads: list[str] = []
    column = 0
    for token, inside in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type in ROLES:  # as the template's own tables: on a narrow screen rows become blocks
            token.attrSet("role", ROLES[token.type])
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        elif token.type == "thead_open":
            heads = []
        elif token.type == "tr_open":
            column = 0
        elif token.type == "th_open":
            token.attrSet("scope", "col")
            heads.append(inside.content if inside else "")
        elif token.type == "td_open":
            token.attrSet("data-label", heads[column])
            column += 1
    # markdown-it escapes what stands in the card, and raw HTML is off.
    return Markup(reader.renderer.render(tokens, reader.options, {}))
