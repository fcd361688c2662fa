"""Draws records for the terminal: plans, machines, data, estimates, reports, proofs.

Goes in: records. Comes out: rich renderables that read well at 80 columns and without colour. Never does:
compute anything but a layout; say by colour alone what a word does not say too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from advisor.run.continual import losses_by_task
from advisor.run.folder import RunState
from advisor.self_test import SelfTest
from advisor.types import (
    Band,
    DatasetProfile,
    Explanation,
    Export,
    FileRow,
    Finding,
    Hardware,
    MatrixBench,
    MemoryEstimate,
    ModelSpec,
    Plan,
    RunReport,
    StageOutcome,
    TimeEstimate,
    Verification,
)
from advisor.units import format_bytes, format_count, format_seconds

MARKS = {
    "error": ("bad", "ERROR"),
    "warning": ("warn", "WARN"),
    "info": ("quiet", "note"),
    "must": ("warn", "MUST"),
    "should": ("quiet", "should"),
    "chosen": ("good", "chosen"),
    "possible": ("key", "possible"),
    "rejected": ("quiet", "rejected"),
    "passed": ("good", "ok"),
    "failed": ("bad", "FAILED"),
}


def pairs(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="key", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns(*headers: str, title: str | None = None, right: Sequence[str] = ()) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="head", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for header in headers:
        table.add_column(
            header, header_style="quiet", justify="right" if header in right else "left", overflow="fold"
        )
    return table


def bullets(lines: Iterable[str]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row("-", line)
    return table


def mark(word: str) -> Text:
    style, text = MARKS[word]
    return Text(text, style=style)


def band_of_bytes(band: Band) -> str:
    """Return `9.1 GiB (8.5 to 10.2)`: expected, low and high."""
    return f"{format_bytes(band.expected)} ({format_bytes(band.low)} to {format_bytes(band.high)})"


def band_of_seconds(band: Band) -> str:
    """Return `40 min (25 min to 1 h 10 min)`."""
    return f"{format_seconds(band.expected)} ({format_seconds(band.low)} to {format_seconds(band.high)})"


def sourced(words: str, source: str) -> Text:
    """Return a figure followed by where it is from."""
    return Text.assemble(words, (f" [{source}]", "quiet") if source else "")


def findings(items: Iterable[Finding]) -> RenderableType:
    """Draw findings, the most serious first; each with where and what to do."""
    order = {"error": 0, "warning": 1, "info": 2}
    table = columns("", "", title=None)
    table.show_header = False
    for item in sorted(items, key=lambda finding: order[finding.severity]):
        text = Text(item.message)
        if item.examples:
            text.append(f"\n{', '.join(item.examples)}", style="quiet")
        if item.remedy:
            text.append(f"\n-> {item.remedy}", style="key")
        table.add_row(mark(item.severity), text)
    return table if table.row_count else Text("Nothing to mend.", style="good")


def self_test(found: SelfTest) -> RenderableType:
    """Draw the stages that were tried with their seconds, and the verdict."""
    table = columns("", "", "seconds", "", title="Self-test", right=("seconds",))
    for stage in found.stages:
        text = Text(stage.evidence)
        if stage.remedy:
            text.append(f"\n-> {stage.remedy}", style="key")
        table.add_row(mark("passed" if stage.passed else "failed"), stage.name, f"{stage.seconds:.1f}", text)
    broken = [stage.name for stage in found.stages if not stage.passed]
    if broken:
        verdict = Text(f"It does not work: {broken[0]} failed.", style="bad")
    else:
        verdict = Text(f"Everything works; the test took {format_seconds(found.seconds)}.", style="good")
    return Group(table, verdict)


def hardware(machine: Hardware) -> RenderableType:
    """Draw a machine; says whether it was measured or declared."""
    rows: list[tuple[str, RenderableType]] = []
    for item in machine.accelerators:
        name = f"{item.count}x {item.name}" if item.count > 1 else item.name
        free = f", {format_bytes(item.free_bytes)} free" if item.free_bytes != item.memory_bytes else ""
        capability = f", compute {item.compute_capability}" if item.compute_capability else ""
        kind = "bf16" if item.supports_bf16 else "fp16 only, no bf16"
        rows.append(("Accelerator", f"{name}: {format_bytes(item.memory_bytes)}{free}{capability}, {kind}"))
    if not machine.accelerators:
        rows.append(("Accelerator", "none; training runs on the processor"))
    features = f" ({', '.join(machine.cpu_features)})" if machine.cpu_features else ""
    rows.append(("Processor", f"{machine.cpu_cores} cores{features}"))
    rows.append(("Memory", f"{format_bytes(machine.ram_bytes)}, {format_bytes(machine.ram_free_bytes)} free"))
    rows += [(f"Disk, {v.role}", f"{format_bytes(v.free_bytes)} free at {v.path}") for v in machine.volumes]
    if machine.rates is not None:
        rows.append(("Rates", f"{rates(machine.rates)}, measured here on {machine.rates.date}"))
        if machine.rates.disturbed:
            words = "Other programs kept the processor busy, so time estimates do not use them; measure again"
            rows.append(("", f"{words} when it is idle"))
    parts: list[RenderableType] = [
        Rule(f"Machine ({machine.origin})", align="left", style="quiet"),
        pairs(rows),
    ]
    if machine.findings:
        parts.append(findings(machine.findings))
    return Group(*parts)


def rates(found: MatrixBench) -> str:
    """Return `2.09 TFLOPS in bf16, 0.33 in fp32; 26.8 GB a second copied`."""
    (first, most), *rest = ((name, f"{rate / 1e12:.2f}") for name, rate in found.flops.items())
    products = [f"{most} TFLOPS in {first}", *(f"{rate} in {name}" for name, rate in rest)]
    return f"{', '.join(products)}; {found.copy_bytes_per_second / 1e9:.1f} GB a second copied"


def machines(plans: Mapping[str, Plan]) -> RenderableType:
    """Draw what would be planned for several machines, and what the next larger one would allow."""
    table = columns("machine", "verdict", "way", "model", "memory", "time", right=("memory", "time"))
    hints = []
    for name, made in plans.items():
        peak = max([stage.estimate.peak_bytes.high for stage in made.stages], default=0.0)
        seconds = sum(stage.estimate.seconds.expected for stage in made.stages)
        way = " > ".join([made.method, *(stage.objective for stage in made.stages)])
        model = made.model.id.rpartition("/")[2] if made.model else "-"
        cost = (format_bytes(peak), format_seconds(seconds)) if made.stages else ("-", "-")
        table.add_row(name, made.verdict.replace("_", " "), way, model, *cost)
        hints += [f"{name}: {a.message}" for a in made.alternatives if a.code == "more_memory"]
    return Group(table, Text(""), bullets(hints)) if hints else table


def packages(versions: dict[str, str]) -> RenderableType:
    """Draw the installed versions on a few lines."""
    text = ", ".join(f"{name} {version}" for name, version in versions.items()) or "none of the extras"
    return Group(Rule("Packages", align="left", style="quiet"), Text(text))


def model(spec: ModelSpec) -> RenderableType:
    """Draw what is known of a model, what is not, and what is wrong with it."""
    size = f"{format_count(spec.parameters)} weights"
    if spec.active_parameters:
        size += f", {format_count(spec.active_parameters)} used for each token"
    template = "yes" if spec.has_chat_template else "none"
    rows: list[tuple[str, RenderableType]] = [
        ("Architecture", spec.architecture or spec.model_type),
        ("Size", f"{size}, {spec.shape.layers} blocks of width {spec.shape.hidden:,}"),
        ("Context", f"{spec.context_tokens:,} tokens"),
        ("Chat template", template),
        ("Licence", spec.licence or "not known"),
        ("Known from", spec.source),
    ]
    body: list[RenderableType] = [
        Rule(f"Model: {spec.id}", align="left", style="quiet"), pairs(rows),
    ]  # fmt: skip
    if spec.unknown:
        body += [Text("Not known, so estimates are wider:", style="key"), bullets(spec.unknown)]
    if spec.findings:
        body.append(findings(spec.findings))
    return Group(*body)


def dataset(profile: DatasetProfile) -> RenderableType:
    """Draw what a dataset holds and what is wrong with it."""
    how = "counted with the model's tokenizer" if profile.tokens_measured else "estimated from characters"
    rows: list[tuple[str, RenderableType]] = [("Kind", f"{profile.kind}, {format_count(profile.rows)} rows")]
    if profile.mapping:
        rows.append(("Columns", ", ".join(f"{role}: {column}" for role, column in profile.mapping.items())))
    if profile.mean_tokens is not None:
        parts = [f"mean {profile.mean_tokens:.0f}"]
        parts += [f"{name} {value}" for name, value in _token_points(profile) if value is not None]
        rows.append(("Tokens a row", f"{', '.join(parts)} ({how})"))
    if profile.mean_supervised_tokens is not None:
        rows.append(("Trained tokens", f"mean {profile.mean_supervised_tokens:.0f} a row: the answers"))
    if profile.languages:
        rows.append(("Languages", ", ".join(profile.languages)))
    if profile.duplicate_fraction is not None:
        rows.append(("Duplicates", f"{profile.duplicate_fraction:.1%}"))
    title = f"Data: {profile.name} ({profile.origin})"
    body: list[RenderableType] = [Rule(title, align="left", style="quiet"), pairs(rows)]
    if profile.findings:
        body.append(findings(profile.findings))
    return Group(*body)


def _token_points(profile: DatasetProfile) -> list[tuple[str, int | None]]:
    return [("median", profile.p50_tokens), ("95%", profile.p95_tokens), ("longest", profile.max_tokens)]


def estimate(spec: ModelSpec, found: MemoryEstimate, step: TimeEstimate | None) -> RenderableType:
    """Draw a memory estimate by part, the largest first, and the seconds of one step."""
    table = columns("Part", "Bytes", "Formula", right=("Bytes",))
    for part in sorted(found.parts, key=lambda item: -item.bytes):
        if part.bytes:
            formula = Text(part.formula)
            formula.append(f" [{part.source}]", style="quiet")
            table.add_row(Text(part.name, style="key"), format_bytes(part.bytes), formula)
    rows: list[tuple[str, RenderableType]] = [
        ("Model", f"{spec.id}, {format_count(spec.parameters)} weights"),
        ("Trained weights", format_count(found.trainable_parameters)),
        ("Peak, estimated", f"{band_of_bytes(found.peak_bytes)} in the {found.phase} phase"),
        ("allocated", band_of_bytes(found.allocated_bytes)),
        ("reserved", band_of_bytes(found.reserved_bytes)),
    ]
    time: RenderableType = "unknown without an accelerator here; name one with --hardware"
    if step is not None:
        time = sourced(band_of_seconds(step.seconds_per_step), step.source)
    rows.append(("One step, estimated", time))
    body: list[RenderableType] = [pairs(rows), table]
    if found.notes:
        body.append(bullets(found.notes))
    return Group(*body)


def report(made: RunReport) -> RenderableType:
    """Draw the end of a run: predicted against measured, losses, where the result lies."""
    rows: list[tuple[str, RenderableType]] = [
        (f"Stage {one.stage}", _outcome(one)) for one in made.earlier_stages
    ]
    steps = f"{made.status}, {made.steps} of {made.steps_planned} steps in {format_seconds(made.seconds)}"
    rows.append(("Status", steps + _predicted_seconds(made)))
    if made.supervised_tokens is not None:
        rows.append(
            ("Trained tokens", f"{format_count(made.supervised_tokens)} a pass over the data, answers only")
        )
    if made.trainable_parameters is not None:
        rows.append(("Trained weights", format_count(made.trainable_parameters)))
    if made.first_loss is not None and made.last_loss is not None:
        rows.append(("Loss, measured", f"{made.first_loss:.3f} -> {made.last_loss:.3f}"))
    if made.heldout_loss_before is not None and made.heldout_loss_after is not None:
        rows.append(
            ("Held-out loss", f"{made.heldout_loss_before:.3f} -> {made.heldout_loss_after:.3f} (measured)")
        )
    rows += [
        (f"Held-out loss of {name}", f"{before:.3f} -> {after:.3f} (measured)")
        for name, before, after in losses_by_task(made.heldout_figures)
    ]
    if made.tokens_per_second is not None:
        rows.append(("Speed, measured", _speed(made)))
    if made.evaluation_seconds is not None:
        rows.append(("Before and after", f"{format_seconds(made.evaluation_seconds)} of the time"))
    if made.measured_peak_bytes is not None:
        rows.append(("Memory, measured", _peak(made)))
    rows += [("Result", f"{name}: {path}") for name, path in made.artefacts.items()]
    rows += [
        ("Kept of " + name, f"{share:.0%} (on held-out rows, measured)") for name, share in made.kept.items()
    ]
    rows += [("Decision", text) for text in made.decisions]
    rows += [("No success", text) for text in (*made.not_learned, *made.forgotten)]
    return Group(Rule("Run", align="left", style="quiet"), pairs(rows))


def _outcome(made: StageOutcome) -> str:
    parts = [f"{made.steps} steps in {format_seconds(made.seconds)}{_predicted_seconds(made)}"]
    if made.tokens_per_second is not None:
        parts.append(_speed(made))
    if made.measured_peak_bytes is not None:
        parts.append(_peak(made))
    if made.heldout_loss_before is not None and made.heldout_loss_after is not None:
        parts.append(f"held-out loss {made.heldout_loss_before:.3f} to {made.heldout_loss_after:.3f}")
    return "; ".join(parts)


def _predicted_seconds(made: RunReport | StageOutcome) -> str:
    said = f", predicted {band_of_seconds(made.predicted_seconds)}" if made.predicted_seconds else ""
    probed = f", by the first steps {band_of_seconds(made.whole_seconds)}" if made.whole_seconds else ""
    return said + probed


def _speed(made: RunReport | StageOutcome) -> str:
    band = made.predicted_tokens_per_second
    said = f", predicted {band.expected:.0f} ({band.low:.0f} to {band.high:.0f})" if band else ""
    return f"{made.tokens_per_second:.0f} tokens a second{said}"


def _peak(made: RunReport | StageOutcome) -> str:
    said = f", predicted {band_of_bytes(made.predicted_peak_bytes)}" if made.predicted_peak_bytes else ""
    probed = f", by the first steps {band_of_bytes(made.whole_peak_bytes)}" if made.whole_peak_bytes else ""
    return f"{format_bytes(made.measured_peak_bytes or 0)}{said}{probed}"


def runs(states: Sequence[RunState]) -> RenderableType:
    """Draw run folders, one line each; a single one with its files."""
    if not states:
        return Text("No run folder here. Next: ftadvisor plan --data FILE")
    table = columns("Folder", "Method", "State", "Steps", "Loss", "Result", right=("Steps", "Loss"))
    for state in states:
        steps = f"{state.steps}/{state.steps_planned}" if state.steps_planned is not None else ""
        loss = f"{state.last_loss:.3f}" if state.last_loss is not None else ""
        method = f"{state.method} {'+'.join(state.objectives)}"
        result = f"{state.result} {format_bytes(state.result_bytes)}" if state.result else ""
        table.add_row(Text(state.folder, style="key"), method, state.status, steps, loss, result)
    files = [file for state in states for file in state.gguf_files] if len(states) == 1 else []
    return Group(table, bullets(files)) if files else table


def verification(proof: Verification) -> RenderableType:
    """Draw a proof: one line a check, with what was measured and the bound."""
    verdict = Text("PROVED", style="good") if proof.passed else Text("FAILED", style="bad")
    title = Text.assemble(verdict, f": {Path(proof.gguf).name} against {proof.against}")
    table = columns("Check", "", "Evidence")
    for check in proof.checks:
        mark = Text("pass", style="good") if check.passed else Text("FAIL", style="bad")
        table.add_row(Text(check.name, style="key"), mark, check.evidence)
    return Group(title, table)


def side_by_side(rows: Iterable[tuple[str, str, str]]) -> RenderableType:
    """Draw answers to the same prompts before and after training."""
    table = Table(
        title="Held-out prompts", title_justify="left", title_style="head", show_lines=True, expand=True
    )
    for header, ratio in (("Prompt", 3), ("Before", 4), ("After", 4)):
        table.add_column(header, ratio=ratio, overflow="fold")
    for prompt, before, after in rows:
        table.add_row(Text(prompt), Text(before), Text(after))
    return table


def export(made: Export, proofs: Sequence[Verification], rows: Sequence[FileRow] = ()) -> RenderableType:
    """Draw the files of an export, their proofs, and the GGUF files beside each other."""
    proved = {row.path: row.proved for row in rows} | {proof.gguf: proof.passed for proof in proofs}
    table = columns("File", "Size", "Bits", "Proof", right=("Size", "Bits"))
    for file in (*made.files, *made.kept):
        state = Text("not checked" if file.kind == "gguf" else "", style="quiet")
        passed = proved.get(file.path)
        if passed is not None:
            state = Text("proved", style="good") if passed else Text("FAILED", style="bad")
        bits = f"{file.bits_per_weight:.2f}" if file.bits_per_weight else ""
        table.add_row(file.path, format_bytes(file.bytes), bits, state)
    body: list[RenderableType] = [Rule("Export", align="left", style="quiet"), table]
    if len(rows) > 1 or any(row.fits is not None for row in rows):
        body += [Text(""), _file_rows(rows)]
    if made.notes:
        body.append(bullets(made.notes))
    body += [verification(proof) for proof in proofs]
    return Group(*body)


def _file_rows(rows: Sequence[FileRow]) -> RenderableType:
    """Draw what each quantisation costs, and which file to take."""
    # Brings numpy along, which only an export has loaded anyway.
    from advisor.verify.card import figures

    names = ("KL", "Top-1", "Perplexity", "Tokens/s", "In memory")
    table = columns("Quantisation", *names, "Fits", right=names)
    for row in rows:
        marks = [
            mark for mark, given in (("imatrix", row.importance), ("recommended", row.recommended)) if given
        ]
        name = Text(", ".join([row.quant, *marks]))
        fits = {True: Text("yes", style="good"), False: Text("no", style="bad"), None: Text("")}[row.fits]
        table.add_row(name, *figures(row), format_bytes(row.running_bytes), fits)
    return table


def explanation(found: Explanation) -> RenderableType:
    """Draw an explanation: plain words, then exact ones, facts and sources."""
    body: list[RenderableType] = [Text(found.title, style="head"), Text(found.plain)]
    if found.exact:
        body += [Text(""), Text(found.exact)]
    if found.facts:
        body += [Text(""), pairs(found.facts)]
    if found.sources:
        body += [Text(""), bullets(f"{source.title}: {source.reference}" for source in found.sources)]
    return Group(*body)
