"""What did a run that goes on after earlier tasks keep of them, and did it learn the new one?

Goes in: the datasets of a recipe, the held-out figures before and after, the limits of kb/rules/policy.toml.
Comes out: a Memory of each earlier task, sentences about new ones that were not learned, an Evaluation that
tells both. Never does: I/O; judge a run without earlier tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from advisor.run.thresholds import ForgettingRules
from advisor.types import Evaluation, RecipeDataset, Record

Figures = Mapping[str, Mapping[str, float]]
LOSS = "loss of "
"""Before the name of a dataset: what a training program calls its held-out loss."""


class Memory(Record, frozen=True, kw_only=True):
    """What is left of one earlier task."""

    words: str
    kept: float | None
    """Share that is left; None where it is not known how much had been learned."""
    enough: bool


def losses_by_task(figures: Figures) -> list[tuple[str, float, float]]:
    """Return name, held-out loss before and after of each dataset, where there are several."""
    before, after = (figures.get(when, {}) for when in ("before", "after"))
    return [
        (name.removeprefix(LOSS), loss, after[name])
        for name, loss in before.items()
        if name.startswith(LOSS) and name in after
    ]


def memories_of(
    datasets: Collection[RecipeDataset], figures: Figures, limits: ForgettingRules
) -> dict[str, Memory]:
    """Return what is left of every earlier task that was measured before and after."""
    before, after = (figures.get(when, {}) for when in ("before", "after"))
    found = {}
    for one in datasets:
        loss, exact = LOSS + one.name, f"exact share of {one.name}"
        if one.role != "earlier_task" or loss not in before or loss not in after:
            continue
        if before.get(exact, 0.0) >= limits.exact_from and exact in after:
            found[one.name] = _by_words(one.name, before[exact], after[exact], limits)
        else:
            found[one.name] = _by_loss(one, before[loss], after[loss], limits)
    return found


def _by_words(name: str, before: float, after: float, limits: ForgettingRules) -> Memory:
    kept = after / before
    words = (
        f"Of {name}, {after:.0%} of the held-out answers are still written word for word, {before:.0%} were "
        f"before: {kept:.0%} is left, and a success keeps {limits.kept_at_least:.0%}."
    )
    return Memory(words=words, kept=kept, enough=kept >= limits.kept_at_least)


def _by_loss(one: RecipeDataset, before: float, after: float, limits: ForgettingRules) -> Memory:
    words = f"The held-out loss of {one.name} went from {before:.3f} to {after:.3f}"
    if one.untrained_loss is None or one.untrained_loss <= before:
        most = limits.loss_rise_at_most
        words = f"{words}, and a success lets it rise by {most:.0%} at most."
        return Memory(words=words, kept=None, enough=after <= before * (1 + most))
    kept = (one.untrained_loss - after) / (one.untrained_loss - before)
    least = limits.loss_kept_at_least
    words = f"{words}: {max(kept, 0):.0%} of what it had fallen is left, and a success keeps {least:.1%}."
    return Memory(words=words, kept=kept, enough=kept >= least)


def not_learned(
    datasets: Collection[RecipeDataset], figures: Figures, limits: ForgettingRules
) -> tuple[str, ...]:
    """Return which new tasks did not get better on held-out rows, where there are earlier tasks beside them.

    For runs of which only the mean losses are known; an Evaluation knows more."""
    new = {one.name for one in datasets if one.role != "earlier_task"}
    if len(new) == len(datasets):
        return ()
    least = limits.loss_fall_at_least
    return tuple(
        f"{name} was not learned: its held-out loss went from {before:.3f} to {after:.3f}, and a success "
        f"lowers it by {least:.1%} at least."
        for name, before, after in losses_by_task(figures)
        if name in new and after > before * (1 - least)
    )


def with_memories(evaluation: Evaluation, memories: Collection[Memory]) -> Evaluation:
    """Return an evaluation that also says what is left of earlier tasks; too little of them is forgetting."""
    lost = [one.words for one in memories if not one.enough]
    kept = [one.words for one in memories if one.enough]
    return msgspec.structs.replace(
        evaluation,
        verdict="forgot" if lost else evaluation.verdict,
        evidence=(*lost, *evaluation.evidence, *kept),
    )
