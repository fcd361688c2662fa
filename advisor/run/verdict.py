"""Is what a training changed good? From figures to a verdict with its evidence.

Goes in: Measured before and after, the held-out figures of the trainer, kb/rules/evaluation.toml. Comes out:
an Evaluation. Never does: I/O; call a change what chance explains; the same measurements always give the same
verdict."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from advisor.run.changes import (
    Figures,
    Pairs,
    answers,
    losses,
    manners,
    only,
    paired,
    per_skill,
    per_task,
    question_gain,
    repetition,
    share_right,
    trainer_figures,
)
from advisor.types import Change, Evaluation, Measured

EXAMPLES = 8
TASKS_TOLD = 12


def judge(
    before: Measured,
    after: Measured,
    figures: Figures,
    rules: dict[str, Any],
    *,
    start: Measured | None = None,
    earlier: Collection[str] = (),
) -> Evaluation:
    """Return what a training changed.

    Args:
        before: of the model as it came to this stage.
        after: of the model as saved.
        figures: RunReport.heldout_figures, for pairs, classes and rewards.
        rules: kb/rules/evaluation.toml.
        start: of the model before the first stage, for a later one: what an earlier stage forgot is not
            forgiven because this one forgets nothing more.
        earlier: datasets of tasks that were learned before. The verdict is on what is new beside them; what
            is left of them is told by the report.
    """
    names = dict.fromkeys(row.dataset for row in before.rows)
    new = [name for name in names if name not in earlier]
    of = (f" of {new[0]}" if len(new) == 1 else " of the new tasks") if earlier else ""
    then, now = (only(one, new) if earlier else one for one in (before, after))
    samples, probes = paired(then.samples, now.samples), paired((start or before).probes, after.probes)
    found = [*losses(then, now, rules["loss"], of=of), *trainer_figures(figures)]
    task = found[0] if found else None
    gain = question_gain(now, rules["loss"])
    since = " since before the first stage" if start else ""
    known = share_right(f"general questions answered right{since}", probes)
    said = answers(samples, of=of)
    changes = [change for change in (*found, gain, known, *said) if change is not None]
    tasks = per_task(before, after, rules["loss"])
    changes += tasks
    changes += [*manners([*samples, *probes]), *per_skill(probes, rules["general"])]
    by_task = [change for change in tasks if change.better == "higher"][:TASKS_TOLD]
    told = [words(change) for change in (task, *said[:1], *by_task, known) if change is not None]
    verdict, reasons = _verdict(task, gain, known, probes, rules)
    if _without_effect(before, after):
        verdict = verdict if verdict == "forgot" else "no_different"
        reasons = ["No answer and no loss has changed: the training had no effect.", *reasons]
    missed = [text for name in new if earlier and (text := _not_learned(name, before, after, rules))]
    if missed and verdict in ("better", "no_different"):
        verdict = "not_learned"
    manner = _bad_manners([*samples, *probes], rules["answers"])
    return Evaluation(
        verdict=verdict, evidence=tuple(dict.fromkeys((*missed, *reasons, *told, *manner))),
        not_learned=tuple(missed),
        changes=tuple({change.name: change for change in changes}.values()),
        examples=_examples(samples, probes),
    )  # fmt: skip


def _not_learned(name: str, before: Measured, after: Measured, rules: dict[str, Any]) -> str:
    """Return what shows that a task was not learned; empty when it was, or when too few rows can tell.

    A loss falls far when only the manner of the answers is learned. So answers that can be checked must be
    right, and others be likelier for their own question, or be those of the data."""
    then, now = only(before, {name}), only(after, {name})
    loss = next(iter(losses(then, now, rules["loss"], of=f" of {name}")), None)
    if loss is None:
        return ""
    if _direction(loss, rules["loss"]["noise"]) != "better":
        return f"{name} was not learned. {words(loss)}"
    pairs = paired(then.samples, now.samples)
    said, gain = answers(pairs, of=f" of {name}"), question_gain(now, rules["loss"])
    enough = any(change.after >= rules["answers"]["learned_from"] for change in said)
    checked = [pair for pair in pairs if None not in (pair[0].right, pair[1].right)]
    if enough or _beyond_chance([(b, a) for a, b in checked], rules["general"]["deviations"]):
        return ""
    if len(checked) >= rules["loss"]["least_rows"]:
        return f"{name} was not learned: its loss fell, but its answers are not right. {words(said[0])}"
    if _depends_on_the_question(gain, rules["loss"]["noise"]):
        return ""
    shown = " ".join(map(words, [*([gain] if gain else []), *said]))
    return f"{name} was not learned: its loss fell, but its answers do not depend on the question. {shown}"


def _beyond_chance(pairs: Pairs, deviations: float) -> bool:
    """Tell whether more right answers were lost than chance explains: by it, each answer that changed was as
    likely lost as gained."""
    lost = sum(bool(a.right) and not b.right for a, b in pairs)
    gained = sum(not a.right and bool(b.right) for a, b in pairs)
    return lost - gained > deviations * math.sqrt(lost + gained)


def _verdict(
    task: Change | None, gain: Change | None, known: Change | None, probes: Pairs, rules: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Return the verdict, and why it is not simply what the task's figure says."""
    if task is None and known is None:
        return "unknown", ["Nothing was measured by which to judge: hold rows out to compare on."]
    direction = _direction(task, rules["loss"]["noise"])
    forgot = _forgotten(probes, rules["general"])
    if direction == "worse":
        return "worse", []
    if forgot and _depends_on_the_question(gain, rules["loss"]["question_share"]):
        return "forgot", [forgot]
    if forgot:
        nothing = "What it says hardly depends on the question, on rows that it was not trained on."
        return "worse", [forgot, nothing]
    if task is None:
        return "unknown", ["Too few rows were held out to judge by."]
    return direction or "no_different", []


def _depends_on_the_question(gain: Change | None, share: float) -> bool:
    """Tell whether answers are the likelier for their own question, beyond chance and by more than a share of
    their loss; taken for granted where it was not measured."""
    return gain is None or (gain.low is not None and gain.low > share * gain.before)


def words(change: Change) -> str:
    """Return one figure as a sentence."""
    shown = "{:.0%}" if is_share(change) else "{:.3g}"
    text = f"{change.name}: {shown.format(change.before)} before, {shown.format(change.after)} after"
    if change.low is not None and change.high is not None:
        rows = f" over {change.rows} rows" if change.rows else ""
        text += f" (change {change.low:+.3g} to {change.high:+.3g} with 95 % certainty{rows})"
    return text[0].upper() + text[1:] + "."


def is_share(change: Change) -> bool:
    """Tell whether a figure is a share of 1, which people read in per cent."""
    return " right" in change.name or "share" in change.name


def _direction(task: Change | None, noise: float) -> str:
    """Return better, worse, or nothing when the interval holds no clear change."""
    if task is None or task.low is None or task.high is None:
        return ""
    low, high = (task.low, task.high) if task.better == "higher" else (-task.high, -task.low)
    margin = noise * abs(task.before) if task.better == "lower" else 0.0
    return "better" if low > margin else "worse" if high < -margin else ""


def _without_effect(before: Measured, after: Measured) -> bool:
    rows = [(a.loss, b.loss) for a, b in zip(before.rows, after.rows, strict=False)]
    answers = [*paired(before.samples, after.samples), *paired(before.probes, after.probes)]
    same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in rows)
    return bool(rows or answers) and same and all(a.answer == b.answer for a, b in answers)


def _forgotten(probes: Pairs, rules: dict[str, Any]) -> str:
    """Return what was forgotten beyond chance; empty when nothing was."""
    lost = sum(bool(a.right) and not b.right for a, b in probes)
    gained = sum(not a.right and bool(b.right) for a, b in probes)
    right = sum(bool(a.right) for a, _ in probes)
    few = not right or (lost - gained) / right < rules["lost_share"]
    if few or not _beyond_chance(probes, rules["deviations"]):
        return ""
    return (
        f"Of {right} general questions that were answered right before, {lost} are not any more "
        f"({gained} others now are): more than chance explains."
    )


def _bad_manners(pairs: Pairs, rules: dict[str, Any]) -> list[str]:
    """Return what is conspicuous about the answers after training."""
    if not pairs:
        return []
    length, endless, _ = manners(pairs)
    found = []
    again = sum(repetition(after.answer) > rules["repeats"] for _, after in pairs) / len(pairs)
    if again > rules["unended_share"]:
        found.append(f"{again:.0%} of the answers repeat themselves.")
    if endless.after > max(rules["unended_share"], endless.before):
        found.append(
            f"{endless.after:.0%} of the answers did not end by themselves ({endless.before:.0%} before)."
        )
    if (
        length.before
        and not 1 / rules["length_factor"] <= length.after / length.before <= rules["length_factor"]
    ):
        found.append(f"Answers have {length.after:.0f} tokens on average, {length.before:.0f} before.")
    return found


def _examples(samples: Pairs, probes: Pairs) -> tuple[tuple[str, str, str], ...]:
    """Return answers side by side: those of held-out questions, and of general ones that were lost."""
    lost = [pair for pair in probes if pair[0].right and not pair[1].right]
    shown = [*samples[: EXAMPLES - min(len(lost), EXAMPLES // 2)], *lost][:EXAMPLES]
    return tuple((a.prompt, a.answer, b.answer) for a, b in shown)
