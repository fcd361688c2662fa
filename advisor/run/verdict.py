"""What did the training change, and is that good? From two measurements to a verdict with its evidence.

Goes in: Measured before and after, the held-out figures of the trainer, kb/rules/evaluation.toml. Comes out:
an Evaluation. Never does: I/O; call a change what chance explains; the same measurements always give the same
verdict (the bootstrap draws from a fixed seed)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from advisor.types import Asked, Change, Evaluation, Measured

EXAMPLES = 8
SEED = 0
Pairs = Sequence[tuple[Asked, Asked]]


def judge(
    before: Measured, after: Measured, figures: Mapping[str, Mapping[str, float]], rules: dict[str, Any]
) -> Evaluation:
    """Return what a training changed.

    Args:
        before: of the model as it came.
        after: of the model as saved.
        figures: RunReport.heldout_figures, for pairs and rewards.
        rules: kb/rules/evaluation.toml.
    """
    samples, probes = paired(before.samples, after.samples), paired(before.probes, after.probes)
    loss = _loss(before, after, rules["loss"])
    task = loss or _preference(figures) or _marks(figures) or _reward(figures)
    gain = _question_gain(after, rules["loss"])
    known = _share("general questions answered right", probes)
    changes = [
        change for change in (task, gain, known, *_per_dataset(before, after, rules["loss"])) if change
    ]
    changes += [*_shares(samples, probes), *_per_skill(probes)]
    verdict, evidence = _verdict(task, gain, known, probes, samples, before, after, rules)
    evidence += _manners(samples, probes, rules["answers"])
    return Evaluation(
        verdict=verdict, evidence=tuple(evidence), changes=tuple(changes), examples=_examples(samples, probes)
    )


def _verdict(
    task: Change | None, gain: Change | None, known: Change | None, probes: Pairs, samples: Pairs,
    before: Measured, after: Measured, rules: dict[str, Any],
) -> tuple[Any, list[str]]:  # fmt: skip
    if task is None and known is None:
        return "unknown", ["Nothing was measured by which to judge: hold rows out to compare on."]
    if _without_effect(before, after):
        words = "No answer and no loss has changed: the training had no effect."
        return "no_different", [words, *_told(task, known)]
    direction = _direction(task, rules["loss"]["noise"])
    forgot = _forgotten(probes, rules["general"])
    learned = gain is None or (gain.low is not None and gain.low > 0)
    told = _told(task, known)
    if direction == "worse":
        return "worse", told
    if forgot and learned:
        return "forgot", [forgot, *told]
    if forgot:
        nothing = "What it says no longer depends on the question, on rows that it was not trained on."
        return "worse", [forgot, nothing, *told]
    if task is None:
        return "unknown", ["Too few rows were held out to judge by.", *told]
    return ("better" if direction == "better" else "no_different"), told


def _told(task: Change | None, known: Change | None) -> list[str]:
    return [words(change) for change in (task, known) if change is not None]


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
    return change.name.endswith("right") or "share" in change.name


def _direction(task: Change | None, noise: float) -> str:
    """Return better, worse, or nothing when the interval holds no clear change."""
    if task is None or task.low is None or task.high is None:
        return ""
    low, high = (task.low, task.high) if task.better == "higher" else (-task.high, -task.low)
    margin = noise * abs(task.before) if task.better == "lower" else 0.0
    return "better" if low > margin else "worse" if high < -margin else ""


def _without_effect(before: Measured, after: Measured) -> bool:
    losses = [(a.loss, b.loss) for a, b in zip(before.rows, after.rows, strict=False)]
    answers = [*paired(before.samples, after.samples), *paired(before.probes, after.probes)]
    same = all(math.isclose(a, b, rel_tol=1e-6) for a, b in losses)
    return bool(losses or answers) and same and all(a.answer == b.answer for a, b in answers)


# --- figures ---------------------------------------------------------------------------------------


def paired(before: Sequence[Asked], after: Sequence[Asked]) -> list[tuple[Asked, Asked]]:
    """Return the questions that were asked at both times."""
    later = {one.prompt: one for one in after}
    return [(one, later[one.prompt]) for one in before if one.prompt in later]


def _loss(before: Measured, after: Measured, rules: dict[str, Any], dataset: str = "") -> Change | None:
    rows = [
        (a.tokens, a.loss, b.loss)
        for a, b in zip(before.rows, after.rows, strict=False)
        if dataset in ("", a.dataset)
    ]
    tokens = sum(row[0] for row in rows)
    if len(rows) < rules["least_rows"] or not tokens:
        return None
    low, high = bootstrap([(n, b - a) for n, a, b in rows], rules)
    name = f"held-out loss of {dataset}" if dataset else "held-out loss"
    return Change(
        name=name, before=sum(r[1] for r in rows) / tokens, after=sum(r[2] for r in rows) / tokens,
        low=low, high=high, rows=len(rows), better="lower",
    )  # fmt: skip


def _per_dataset(before: Measured, after: Measured, rules: dict[str, Any]) -> list[Change]:
    names = list(dict.fromkeys(row.dataset for row in before.rows))
    found = [_loss(before, after, rules, name) for name in names] if len(names) > 1 else []
    return [change for change in found if change is not None]


def _question_gain(after: Measured, rules: dict[str, Any]) -> Change | None:
    """Return by how much the right question makes an answer likelier than another row's question does."""
    rows = [(row.tokens, row.loss, row.swapped) for row in after.rows if row.swapped is not None]
    tokens = sum(row[0] for row in rows)
    if len(rows) < rules["least_rows"] or not tokens:
        return None
    low, high = bootstrap([(n, other - own) for n, own, other in rows], rules)
    return Change(
        name="loss with the row's own question against another's", rows=len(rows), low=low, high=high,
        before=sum(row[2] for row in rows) / tokens, after=sum(row[1] for row in rows) / tokens,
        better="lower",
    )  # fmt: skip


def bootstrap(rows: Sequence[tuple[int, float]], rules: dict[str, Any]) -> tuple[float, float]:
    """Return the interval of the mean over tokens of (tokens, summed difference), rows drawn with
    replacement."""
    chance = random.Random(SEED)
    means = []
    for _ in range(rules["resamples"]):
        drawn = chance.choices(rows, k=len(rows))
        means.append(math.fsum(d for _, d in drawn) / sum(n for n, _ in drawn))
    means.sort()
    cut = int((1 - rules["confidence"]) / 2 * len(means))
    return means[cut], means[-1 - cut]


def _preference(figures: Mapping[str, Mapping[str, float]]) -> Change | None:
    """Return how often the better answer of held-out pairs gained on the other; half of them by chance."""
    after = figures.get("after", {})
    share, pairs = after.get("accuracy"), int(after.get("pairs", 0))
    if share is None or not pairs:
        return None
    # Wilson's interval of a share: it holds for few pairs and at the edges too.
    z, n = 1.96, pairs
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Change(
        name="share of held-out pairs in which the better answer gained", before=0.5, after=share,
        low=middle - half - 0.5, high=middle + half - 0.5, rows=n,
    )  # fmt: skip


def _marks(figures: Mapping[str, Mapping[str, float]]) -> Change | None:
    """Return by how much held-out answers marked good gained on those marked bad."""
    after = figures.get("after", {})
    if "margin_error" not in after:
        return None
    margin, noise = after["margin"], 1.96 * after["margin_error"]
    return Change(
        name="reward of good over bad held-out answers", before=0.0, after=margin,
        low=margin - noise, high=margin + noise,
    )  # fmt: skip


def _reward(figures: Mapping[str, Mapping[str, float]]) -> Change | None:
    before, after = figures.get("before", {}), figures.get("after", {})
    if "reward" not in before or "reward" not in after:
        return None
    change = after["reward"] - before["reward"]
    noise = 1.96 * math.hypot(before.get("reward_error", 0.0), after.get("reward_error", 0.0))
    return Change(
        name="reward of sampled answers", before=before["reward"], after=after["reward"],
        low=change - noise, high=change + noise, rows=int(after.get("answers", 0)),
    )  # fmt: skip


def _share(name: str, pairs: Pairs) -> Change | None:
    checked = [(a.right, b.right) for a, b in pairs if a.right is not None and b.right is not None]
    if not checked:
        return None
    before, after = (sum(bool(one[n]) for one in checked) / len(checked) for n in (0, 1))
    return Change(name=name, before=before, after=after, rows=len(checked))


def _per_skill(probes: Pairs) -> list[Change]:
    skills = list(dict.fromkeys(a.skill for a, _ in probes if a.skill))
    found = [
        _share(f"{skill} right", [pair for pair in probes if pair[0].skill == skill]) for skill in skills
    ]
    return [change for change in found if change is not None and change.before != change.after]


def _shares(samples: Pairs, probes: Pairs) -> list[Change]:
    """Return what can be said of answers without judging them."""
    same = _share("answers to held-out questions right", samples)
    both = [*samples, *probes]
    if not both:
        return [same] if same else []

    def over(name: str, figure: Any, better: Any = "lower") -> Change:
        before, after = (sum(figure(pair[n]) for pair in both) / len(both) for n in (0, 1))
        return Change(name=name, before=before, after=after, rows=len(both), better=better)

    return [
        *([same] if same else []),
        over("tokens an answer", lambda one: one.tokens),
        over("share of answers that did not end", lambda one: not one.ended),
        over("share of words repeated", lambda one: repetition(one.answer)),
    ]


def repetition(text: str) -> float:
    """Return the share of groups of four words that came before in the same text."""
    said = text.split()
    groups = [tuple(said[n : n + 4]) for n in range(len(said) - 3)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def _forgotten(probes: Pairs, rules: dict[str, Any]) -> str:
    """Return what was forgotten beyond chance; empty when nothing was."""
    lost = sum(bool(a.right) and not b.right for a, b in probes)
    gained = sum(not a.right and bool(b.right) for a, b in probes)
    right = sum(bool(a.right) for a, _ in probes)
    balance = lost - gained
    # Under chance alone, each answer that changed was as likely lost as gained.
    beyond_chance = balance > rules["deviations"] * math.sqrt(lost + gained)
    if not right or balance / right < rules["lost_share"] or not beyond_chance:
        return ""
    return (
        f"Of {right} general questions that were answered right before, {lost} are not any more "
        f"({gained} others now are): more than chance explains."
    )


def _manners(samples: Pairs, probes: Pairs, rules: dict[str, Any]) -> list[str]:
    """Return what is conspicuous about the answers after training."""
    after = [pair[1] for pair in (*samples, *probes)]
    before = [pair[0] for pair in (*samples, *probes)]
    if not after:
        return []
    found = []
    again = sum(repetition(one.answer) > rules["repeats"] for one in after) / len(after)
    if again > rules["unended_share"]:
        found.append(f"{again:.0%} of the answers repeat themselves.")
    endless, were = (sum(not one.ended for one in some) / len(some) for some in (after, before))
    if endless > max(rules["unended_share"], were):
        found.append(f"{endless:.0%} of the answers did not end by themselves ({were:.0%} before).")
    long, was = (sum(one.tokens for one in some) / len(some) for some in (after, before))
    if was and not 1 / rules["length_factor"] <= long / was <= rules["length_factor"]:
        found.append(f"Answers have {long:.0f} tokens on average, {was:.0f} before.")
    return found


def _examples(samples: Pairs, probes: Pairs) -> tuple[tuple[str, str, str], ...]:
    """Return answers side by side: those of held-out questions, and of general ones that were lost."""
    lost = [pair for pair in probes if pair[0].right and not pair[1].right]
    shown = [*samples[: EXAMPLES - min(len(lost), EXAMPLES // 2)], *lost][:EXAMPLES]
    return tuple((a.prompt, a.answer, b.answer) for a, b in shown)
