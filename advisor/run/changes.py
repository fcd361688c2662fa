"""What did a training change? From two measurements to figures, each with the interval of its change.

Goes in: Measured before and after, the held-out figures of the trainer, kb/rules/evaluation.toml. Comes out:
Changes. Never does: I/O; judge; draw by chance: the bootstrap has a fixed seed, so that the same measurements
always give the same figures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from advisor.types import Asked, Change, Measured

SEED = 0
HIGHEST_TOLD = 20.0
"""Nats a token. Beyond it, a perplexity is a number of ten digits that tells nothing."""
Z = 1.96
"""Standard deviations that hold 95 per cent of a normal distribution."""
Pairs = Sequence[tuple[Asked, Asked]]
Figures = Mapping[str, Mapping[str, float]]


def paired(before: Sequence[Asked], after: Sequence[Asked]) -> list[tuple[Asked, Asked]]:
    """Return the questions that were asked at both times; one that is asked twice is paired in its order."""
    later: dict[str, list[Asked]] = {}
    for one in after:
        later.setdefault(one.prompt, []).append(one)
    return [(one, later[one.prompt].pop(0)) for one in before if later.get(one.prompt)]


# --- losses --------------------------------------------------------------------------------------


def losses(before: Measured, after: Measured, rules: dict[str, Any], *, of: str = "") -> list[Change]:
    """Return loss and perplexity of the held-out rows; `of` says whose they are."""
    found = (_loss(before, after, rules, of=of), _perplexity(before, after, rules, of=of))
    return [change for change in found if change is not None]


def per_task(before: Measured, after: Measured, rules: dict[str, Any]) -> list[Change]:
    """Return the loss of each dataset and its share of right answers, where there are several."""
    names = list(dict.fromkeys(row.dataset for row in before.rows))
    found = [change for name in names for change in of_task(before, after, name, rules)]
    return found if len(names) > 1 else []


def of_task(before: Measured, after: Measured, name: str, rules: dict[str, Any]) -> list[Change]:
    """Return what one dataset is told by: its loss where there are rows enough, then its answers."""
    then, now = only(before, {name}), only(after, {name})
    loss = _loss(then, now, rules, of=f" of {name}")
    return [*([loss] if loss else []), *answers(paired(then.samples, now.samples), of=f" of {name}")]


def only(found: Measured, datasets: Collection[str]) -> Measured:
    """Return what was measured of some datasets, and the general questions."""
    return msgspec.structs.replace(
        found,
        rows=tuple(row for row in found.rows if row.dataset in datasets),
        samples=tuple(one for one in found.samples if one.dataset in datasets),
    )


def _rows(before: Measured, after: Measured) -> list[tuple[float, ...]]:
    """Return tokens, loss before, loss after of each row."""
    both = zip(before.rows, after.rows, strict=False)
    return [(a.tokens, a.loss, b.loss) for a, b in both if a.tokens]


def _loss(before: Measured, after: Measured, rules: dict[str, Any], *, of: str) -> Change | None:
    rows = _rows(before, after)
    if len(rows) < rules["least_rows"]:
        return None
    tokens, then, now = sums(rows)
    low, high = bootstrap(rows, lambda drawn: (drawn[2] - drawn[1]) / drawn[0], rules)
    return Change(
        name=f"held-out loss{of}", before=then / tokens, after=now / tokens, low=low, high=high,
        rows=len(rows), better="lower",
    )  # fmt: skip


def _perplexity(before: Measured, after: Measured, rules: dict[str, Any], *, of: str) -> Change | None:
    rows = _rows(before, after)
    if len(rows) < rules["least_rows"]:
        return None
    tokens, then, now = sums(rows)
    if max(then, now) / tokens > HIGHEST_TOLD:
        return None
    low, high = bootstrap(
        rows, lambda drawn: math.exp(drawn[2] / drawn[0]) - math.exp(drawn[1] / drawn[0]), rules
    )
    return Change(
        name=f"held-out perplexity{of}", before=math.exp(then / tokens), after=math.exp(now / tokens),
        low=low, high=high, rows=len(rows), better="lower",
    )  # fmt: skip


def question_gain(after: Measured, rules: dict[str, Any]) -> Change | None:
    """Return by how much the right question makes an answer likelier than another row's question does."""
    rows = [(row.tokens, row.loss, row.swapped) for row in after.rows if row.swapped is not None]
    rows = [row for row in rows if row[0]]
    if len(rows) < rules["least_rows"]:
        return None
    tokens, own, other = sums(rows)
    low, high = bootstrap(rows, lambda drawn: (drawn[2] - drawn[1]) / drawn[0], rules)
    return Change(
        name="loss with the row's own question against another's", rows=len(rows), low=low, high=high,
        before=other / tokens, after=own / tokens, better="lower",
    )  # fmt: skip


def sums(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the sum of each column."""
    return tuple(map(math.fsum, zip(*rows, strict=True)))


def bootstrap(
    rows: Sequence[tuple[float, ...]], figure: Callable[[tuple[float, ...]], float], rules: dict[str, Any]
) -> tuple[float, float]:
    """Return the interval of a figure of the column sums, rows drawn with replacement."""
    chance = random.Random(SEED)
    found = sorted(figure(sums(chance.choices(rows, k=len(rows)))) for _ in range(rules["resamples"]))
    cut = int((1 - rules["confidence"]) / 2 * len(found))
    return found[cut], found[-1 - cut]


# --- what the trainer measured -------------------------------------------------------------------


def trainer_figures(figures: Figures) -> list[Change]:
    """Return what pairs, marks, classes or rewards came to; the first is what the training was for."""
    found = [
        _preference(figures), _ranked(figures), _classes(figures), _marks(figures), _reward(figures),
        _plain("share of held-out pairs whose better answer is the likelier one", "preferred", figures),
        _plain("reward margin of held-out pairs", "margin", figures),
        _plain("mean share right over the held-out classes", "accuracy_by_class", figures),
    ]  # fmt: skip
    return [change for change in found if change is not None]


def _preference(figures: Figures) -> Change | None:
    """Return how often the better answer of held-out pairs gained on the other; half of them by chance."""
    after = figures.get("after", {})
    if "preferred" not in after:
        return None
    name = "share of held-out pairs in which the better answer gained"
    return _against(name, after.get("accuracy"), 0.5, int(after.get("pairs", 0)))


def _ranked(figures: Figures) -> Change | None:
    """Return how many held-out pairs a reward model ranks right; half of them by chance."""
    after = figures.get("after", {})
    if "preferred" in after:
        return None
    return _against("held-out pairs ranked right", after.get("accuracy"), 0.5, int(after.get("pairs", 0)))


def _classes(figures: Figures) -> Change | None:
    """Return how many held-out texts are classed right, against the better of the head before and of always
    naming the most frequent class."""
    before, after = figures.get("before", {}), figures.get("after", {})
    floor = max(before.get("accuracy", 0.0), after.get("most_frequent_class", 0.0))
    return _against("held-out texts classed right", after.get("accuracy"), floor, int(after.get("texts", 0)))


def _against(name: str, share: float | None, floor: float, count: int) -> Change | None:
    """Return a share against a known one, with Wilson's interval: it holds for few, and at the edges."""
    if share is None or not count:
        return None
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return Change(
        name=name, before=floor, after=share, low=middle - half - floor, high=middle + half - floor,
        rows=count,
    )  # fmt: skip


def _marks(figures: Figures) -> Change | None:
    """Return by how much held-out answers marked good gained on those marked bad."""
    after = figures.get("after", {})
    if "margin_error" not in after:
        return None
    margin, noise = after["margin"], Z * after["margin_error"]
    return Change(
        name="reward of good over bad held-out answers", before=0.0, after=margin,
        low=margin - noise, high=margin + noise,
    )  # fmt: skip


def _reward(figures: Figures) -> Change | None:
    before, after = figures.get("before", {}), figures.get("after", {})
    if "reward" not in before or "reward" not in after:
        return None
    change = after["reward"] - before["reward"]
    noise = Z * math.hypot(before.get("reward_error", 0.0), after.get("reward_error", 0.0))
    return Change(
        name="reward of sampled answers", before=before["reward"], after=after["reward"],
        low=change - noise, high=change + noise, rows=int(after.get("answers", 0)),
    )  # fmt: skip


def _plain(name: str, field: str, figures: Figures) -> Change | None:
    before, after = figures.get("before", {}), figures.get("after", {})
    if field not in before or field not in after or "margin_error" in after:
        return None
    rows = int(after.get("pairs", after.get("texts", 0)))
    return Change(name=name, before=before[field], after=after[field], rows=rows)


# --- answers -------------------------------------------------------------------------------------


def answers(pairs: Pairs, *, of: str = "") -> list[Change]:
    """Return the shares of answers to held-out questions that are right, and that are those of the data."""
    found = (
        share_right(f"held-out questions{of} answered right", pairs),
        share_exact(f"share of held-out answers{of} word for word as in the data", pairs),
    )
    return [change for change in found if change is not None]


def share_right(name: str, pairs: Pairs) -> Change | None:
    """Return the share of the answers that can be checked and are right."""
    return _share(name, [(a.right, b.right) for a, b in pairs])


def share_exact(name: str, pairs: Pairs) -> Change | None:
    """Return the share of the answers that say word for word what the data say."""
    return _share(name, [(a.exact, b.exact) for a, b in pairs])


def _share(name: str, found: Sequence[tuple[bool | None, bool | None]]) -> Change | None:
    checked = [one for one in found if None not in one]
    if not checked:
        return None
    before, after = (sum(bool(one[n]) for one in checked) / len(checked) for n in (0, 1))
    return Change(name=name, before=before, after=after, rows=len(checked))


def per_skill(probes: Pairs, rules: dict[str, Any]) -> list[Change]:
    """Return the skills whose share of right answers changed, where enough of each was asked."""
    groups: dict[str, list[tuple[Asked, Asked]]] = {}
    for pair in probes:
        groups.setdefault(pair[0].skill, []).append(pair)
    found = [
        share_right(f"general questions, {skill.replace('_', ' ')}, right", pairs)
        for skill, pairs in groups.items()
        if skill and len(pairs) >= rules["skill_questions"]
    ]
    return [change for change in found if change is not None and change.before != change.after]


def manners(pairs: Pairs) -> list[Change]:
    """Return what can be said of answers without judging them."""
    if not pairs:
        return []

    def over(name: str, figure: Callable[[Asked], float]) -> Change:
        before, after = (sum(figure(pair[n]) for pair in pairs) / len(pairs) for n in (0, 1))
        return Change(name=name, before=before, after=after, rows=len(pairs), better="lower")

    return [
        over("tokens an answer", lambda one: one.tokens),
        over("share of answers that did not end", lambda one: not one.ended),
        over("share of words repeated", lambda one: repetition(one.answer)),
    ]


def repetition(text: str) -> float:
    """Return the share of groups of four words that came before in the same text."""
    said = text.split()
    groups = [tuple(said[n : n + 4]) for n in range(len(said) - 3)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0
