"""Draws a plan for the terminal: the advice first, then settings, risks and what was rejected.

Goes in: a plan. Comes out: rich renderables that read well at 80 columns and without colour. Never does:
change or weigh anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from advisor.types import Candidate, Plan, PlanWarning, Stage
from advisor.ui.render import band_of_bytes, band_of_seconds, bullets, columns, findings, mark, pairs, sourced
from advisor.units import format_bytes, format_count

MAIN_SETTINGS = frozenset({
    "learning_rate", "epochs", "micro_batch", "effective_batch", "max_seq_len", "precision", "weight_bits",
    "gradient_checkpointing", "target", "lora_r", "replay_fraction", "mixing_cap", "beta", "num_generations",
})  # fmt: skip
"""Settings that a plan shows without being asked for all."""
MORE = "ask for every setting (--expert)"


def plan(made: Plan, *, expert: bool = False) -> RenderableType:
    """Draw a plan: the advice, the settings with reasons, risks, what was rejected and why.

    Args:
        made: the plan.
        expert: every setting and candidate; without it the ones that most people ask about.
    """
    parts: list[RenderableType] = [_headline(made)]
    if made.assumptions:
        parts += [Rule("Understood", align="left", style="quiet"), bullets(made.assumptions)]
    for profile in made.datasets:
        wrong = [finding for finding in profile.findings if finding.severity != "info"]
        if wrong:
            parts += [Rule(f"Data: {profile.name}", align="left", style="quiet"), findings(wrong)]
    for number, stage in enumerate(made.stages, start=1):
        place = f"Stage {number} of {len(made.stages)}: " if len(made.stages) > 1 else "Training: "
        if made.apart and number > 1:
            title = f"{place}{stage.datasets[0]}, with the settings of stage 1"
            parts.append(Rule(title, align="left", style="quiet"))
            continue
        title = f"{place}{stage.objective} on {stage.datasets[0]}" if made.apart else place + stage.objective
        parts.append(_stage(stage, title, expert=expert))
    if made.export:
        parts += [Rule("Afterwards", align="left", style="quiet"), _export_line(made)]
    parts += _risks(made.warnings, expert=expert)
    parts += [Rule("Considered", align="left", style="quiet"), candidates(made.candidates, expert=expert)]
    if made.alternatives:
        lines = tuple(item.message for item in made.alternatives)
        parts += [Rule("You could also", align="left", style="quiet"), bullets(lines)]
    return Group(*parts)


def _headline(made: Plan) -> RenderableType:
    titles = {
        "train": "Advice: train",
        "dont_train_yet": "Advice: do not train yet",
        "fix_data_first": "Advice: mend the data first",
        "change_plan": "Advice: change the plan",
        "change_model": "Advice: change the model",
        "export_only": "Advice: only export",
    }
    return Panel(Text(made.summary), title=titles[made.verdict], title_align="left", border_style="head")


def _stage(stage: Stage, title: str, *, expert: bool) -> RenderableType:
    table = columns("Setting", "Value", "Why")
    shown = [name for name in stage.settings if expert or name in MAIN_SETTINGS]
    for name in shown:
        why = stage.why.get(name)
        reason = Text(why.reason if why else "")
        if why:
            reason.append(f" [{why.source}]", style="quiet")
        table.add_row(Text(name, style="key"), _value(stage.settings[name]), reason)
    if hidden := len(stage.settings) - len(shown):
        table.add_row(Text("...", style="quiet"), "", Text(f"{hidden} more, each with its reason: {MORE}"))
    cost = stage.estimate
    costs: list[tuple[str, RenderableType]] = [
        ("Memory, estimated", f"{band_of_bytes(cost.peak_bytes)}, peak in the {cost.phase or 'step'} phase"),
        ("Time, estimated", sourced(band_of_seconds(cost.seconds), cost.seconds_source)),
        ("Disk, estimated", format_bytes(cost.disk_bytes)),
    ]
    if cost.trainable_parameters:
        costs.append(("Trained weights", format_count(cost.trainable_parameters)))
    costs += [("Not known", note) for note in cost.notes]
    return Group(Rule(title, align="left", style="quiet"), pairs(costs), table)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item:g}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return str(value)


def _export_line(made: Plan) -> RenderableType:
    target = made.export
    if target is None:
        return Text("")
    if not target.feasible:
        return Text(f"Cannot become a {target.format} file: {target.reason}", style="warn")
    size = format_bytes(target.file_bytes) if target.file_bytes else "small"
    return Text(
        f"{target.format} {target.quant}, about {size}, by route {target.route}. {target.reason}".strip()
    )


def _risks(items: Sequence[PlanWarning], *, expert: bool) -> list[RenderableType]:
    """Draw what the person has to look at, then what the plan takes care of by itself."""
    open_risks = [item for item in items if expert or not item.handled]
    handled = [item for item in items if item not in open_risks]
    parts: list[RenderableType] = []
    if open_risks:
        parts += [Rule("Risks", align="left", style="quiet"), _warnings(open_risks)]
    if handled:
        parts.append(Rule("Taken care of by this plan", align="left", style="quiet"))
        parts.append(bullets(item.message for item in handled))
    return parts


def _warnings(items: Iterable[PlanWarning]) -> RenderableType:
    table = columns("", "")
    table.show_header = False
    for item in sorted(items, key=lambda warning: warning.severity):
        text = Text(item.message)
        text.append(f" [{item.source}]", style="quiet")
        text.append(f"\n-> {item.remedy}", style="key")
        table.add_row(mark(item.severity), text)
    return table


def candidates(items: Sequence[Candidate], *, expert: bool = False, best: int = 3) -> RenderableType:
    """Draw what was considered: the best few with reasons, then the ways rejected for the same reason."""
    kept = [item for item in items if item.verdict != "rejected"]
    rejected = [item for item in items if item.verdict == "rejected"]
    shown = kept if expert else kept[:best]
    table = columns("", "Way", "Memory", "Reasons")
    for item in [*shown, *(rejected if expert else [])]:
        memory = format_bytes(item.peak_bytes.high) if item.peak_bytes else ""
        reasons = item.reasons if expert else item.reasons[:2]
        table.add_row(mark(item.verdict), _way(item), memory, "; ".join(reasons))
    if not expert:
        for reason, ways in _by_reason(rejected, kept).items():
            table.add_row(mark("rejected"), ", ".join(ways), "", reason)
    return table


def _way(item: Candidate) -> str:
    words = [item.method, "+".join(item.objectives), item.model.rsplit("/", 1)[-1]]
    return " ".join(dict.fromkeys(filter(None, words)))


def _by_reason(rejected: Sequence[Candidate], kept: Sequence[Candidate]) -> dict[str, list[str]]:
    """Return first reason -> methods: each method once, about the chosen model where it was tried with it."""
    model = kept[0].model if kept else ""
    seen = {item.method for item in kept if item.model == model}
    found: dict[str, list[str]] = {}
    for item in sorted(rejected, key=lambda candidate: candidate.model not in ("", model)):
        if item.method not in seen and item.reasons:
            seen.add(item.method)
            found.setdefault(item.reasons[0], []).append(item.method)
    return found
