"""What the policy remembers of a running training: a fold over its events.

Goes in: the state before, one event, the thresholds. Comes out: the state after. Never does: decide; I/O;
keep more than a window of figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import msgspec

from advisor.run.ladder import Trainee
from advisor.run.thresholds import Thresholds
from advisor.types import Record, Value

Event = dict[str, Any]
BEST_STEPS = 10
"""So many of the fastest steps make the pace that slow ones are compared with."""


class RunState(Record, frozen=True, kw_only=True):
    """What is known of one stage, over all its attempts."""

    trainee: Trainee
    settings: dict[str, Value]
    """Of this attempt."""
    consents: tuple[str, ...] = ()
    """What a person allowed: words of `run --allow`."""
    rates_lowered: int = 0
    finishing: bool = False
    """A checkpoint was chosen as the result; the program only saves it."""
    stopped: bool = False
    told: tuple[str, ...] = ()
    """Codes of warnings that were given."""
    checkpoints: tuple[int, ...] = ()
    """Steps that were saved and not gone back behind."""

    loaded: bool = False
    """The model of this attempt is in memory."""
    step: int = 0
    steps_seen: int = 0
    """Steps of this attempt; differs from `step` after a resume."""
    losses: tuple[float, ...] = ()
    first_mean: float | None = None
    best_mean: float | None = None
    best_mean_step: int = 0
    zero_losses: int = 0
    high_norms: int = 0
    flat: bool = False
    heldout_best: float | None = None
    heldout_best_step: int = 0
    heldout_worse: int = 0
    """How often in a row the held-out loss was above its best."""
    reinforced: bool = False
    """Steps have a reward: the loss means nothing."""
    kl_high: int = 0
    kl_fine_step: int = 0
    cut_off: int = 0
    collapsed: int = 0
    alike: int = 0
    displaced: bool = False
    disordered: bool = False
    accuracies: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()
    """Of the chosen answers."""
    tokens: int = 0
    fastest: tuple[float, ...] = ()
    """Seconds a token (a step, where tokens are not counted) of the fastest steps, sorted."""
    shortest: tuple[float, ...] = ()
    """Seconds of the shortest steps, sorted."""
    slow: int = 0
    checkpoint_bytes: int = 0
    disk_low: bool = False
    slept: bool = False
    hot_looks: int = 0
    """How often in a row the processor was at its limit of heat and its clock lowered."""
    hot_steps: int = 0
    """Steps in a row for which the card's driver had lowered its clock because of heat."""

    def fresh(self) -> RunState:
        """Return the state of the next attempt: what belongs to the whole run stays."""
        return RunState(
            trainee=self.trainee, settings=self.settings, consents=self.consents,
            rates_lowered=self.rates_lowered, finishing=self.finishing, told=self.told,
            checkpoints=self.checkpoints, checkpoint_bytes=self.checkpoint_bytes,
            heldout_best=self.heldout_best, heldout_best_step=self.heldout_best_step,
        )  # fmt: skip

    def back_to(self, newest: int | None) -> RunState:
        """Return the state when checkpoints after a step are not used any more; None: all are."""
        if newest is None:
            return self
        kept = tuple(step for step in self.checkpoints if step <= newest)
        known = self.heldout_best_step in kept
        return msgspec.structs.replace(
            self,
            checkpoints=kept,
            heldout_best=self.heldout_best if known else None,
            heldout_best_step=self.heldout_best_step if known else 0,
        )


def mean(values: tuple[float, ...]) -> float:
    """Return the mean; 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def observe(state: RunState, event: Event, rules: Thresholds) -> RunState:
    """Return the state after an event; unknown events change nothing."""
    seen = OBSERVERS.get(str(event.get("event")))
    return seen(state, event, rules) if seen else state


def _start(state: RunState, event: Event, rules: Thresholds) -> RunState:
    return state.back_to(event.get("newest_step"))


def _model(state: RunState, event: Event, rules: Thresholds) -> RunState:
    trainee = msgspec.structs.replace(state.trainee, device=str(event.get("device", state.trainee.device)))
    return msgspec.structs.replace(state, loaded=True, trainee=trainee)


def _checkpoint(state: RunState, event: Event, rules: Thresholds) -> RunState:
    saved = tuple(sorted({*state.checkpoints, int(event["step"])}))
    size = int(event.get("bytes") or state.checkpoint_bytes)
    return msgspec.structs.replace(state, checkpoints=saved, checkpoint_bytes=size)


def _heldout(state: RunState, event: Event, rules: Thresholds) -> RunState:
    loss = event.get("loss")
    if loss is None or event.get("when") == "before" or state.finishing:
        return state
    best = state.heldout_best
    if best is None or loss < best:
        step = int(event.get("step", state.step))
        return msgspec.structs.replace(state, heldout_best=loss, heldout_best_step=step, heldout_worse=0)
    worse = loss > best * (1 + rules.heldout.worse_by)
    return msgspec.structs.replace(state, heldout_worse=state.heldout_worse + 1 if worse else 0)


def _step(state: RunState, event: Event, rules: Thresholds) -> RunState:
    state = msgspec.structs.replace(
        state,
        loaded=True,
        step=int(event["step"]),
        steps_seen=state.steps_seen + 1,
        reinforced=event.get("reward") is not None,
    )
    for look in (_loss, _reinforcement, _preference, _pace):
        state = look(state, event, rules)
    return state


def _loss(state: RunState, event: Event, rules: Thresholds) -> RunState:
    loss, norm, window = event.get("loss"), event.get("grad_norm"), rules.loss.window
    if loss is None:
        return state
    losses = (*state.losses, loss)[-window:]
    now = mean(losses)
    full = len(losses) == window
    first = now if full and state.first_mean is None else state.first_mean
    improved = full and (state.best_mean is None or now < state.best_mean)
    return msgspec.structs.replace(
        state,
        losses=losses,
        first_mean=first,
        best_mean=now if improved else state.best_mean,
        best_mean_step=state.step if improved else state.best_mean_step,
        zero_losses=state.zero_losses + 1 if loss == 0 and not state.reinforced else 0,
        high_norms=state.high_norms + 1 if norm is not None and norm > rules.gradient.exploding_norm else 0,
        flat=_is_flat(state, now, first, int(event.get("total", 0)), rules),
    )


def _is_flat(state: RunState, now: float, first: float | None, total: int, rules: Thresholds) -> bool:
    far = max(rules.loss.flat_after_steps, rules.loss.flat_after_share * total)
    if state.reinforced or first is None or first <= 0 or state.steps_seen < far:
        return False
    return abs(now - first) / first < rules.loss.flat_change


def _reinforcement(state: RunState, event: Event, rules: Thresholds) -> RunState:
    if not state.reinforced:
        return state
    limits = rules.reinforcement
    kl, cut = event.get("kl"), event.get("cut_off_share")
    entropy, spread = event.get("entropy"), event.get("reward_std")
    high = kl is not None and kl > limits.kl_runaway
    return msgspec.structs.replace(
        state,
        kl_high=state.kl_high + 1 if high else 0,
        kl_fine_step=state.kl_fine_step if high else state.step,
        cut_off=state.cut_off + 1 if cut is not None and cut > limits.cut_off_share else 0,
        collapsed=state.collapsed + 1 if entropy is not None and entropy < limits.entropy_collapse else 0,
        alike=state.alike + 1 if spread == 0 else 0,
    )


def _preference(state: RunState, event: Event, rules: Thresholds) -> RunState:
    accuracy, chosen, margin = event.get("accuracy"), event.get("chosen_reward"), event.get("margin")
    if accuracy is None:
        return state
    window, limits = rules.loss.window, rules.preference
    accuracies = (*state.accuracies, accuracy)[-window:]
    rewards = (*state.rewards, chosen)[-window:] if chosen is not None else state.rewards
    enough = state.steps_seen >= limits.after_steps
    falls = len(rewards) == window and mean(rewards) < limits.displaced_reward
    return msgspec.structs.replace(
        state,
        accuracies=accuracies,
        rewards=rewards,
        displaced=falls and margin is not None and margin > 0,
        disordered=enough and len(accuracies) == window and mean(accuracies) < limits.low_accuracy,
    )


def _pace(state: RunState, event: Event, rules: Thresholds) -> RunState:
    seconds, tokens = event.get("step_seconds"), int(event.get("tokens") or 0)
    new = tokens - state.tokens
    state = msgspec.structs.replace(state, tokens=tokens)
    if seconds is None or state.steps_seen <= 1 or new < 0:
        return state
    pace = seconds / max(new, 1)
    # A short row is slow by the token, a long one by the step; only what is slow by both is slow.
    slow = all(
        len(best) == BEST_STEPS and now > statistics.median(best) * rules.machine.slow_factor
        for best, now in ((state.fastest, pace), (state.shortest, seconds))
    )
    return msgspec.structs.replace(
        state,
        hot_steps=state.hot_steps + 1 if event.get("slowed_by_heat") else 0,
        fastest=tuple(sorted((*state.fastest, pace))[:BEST_STEPS]),
        shortest=tuple(sorted((*state.shortest, seconds))[:BEST_STEPS]),
        slow=state.slow + 1 if slow else 0,
    )


def _machine(state: RunState, event: Event, rules: Thresholds) -> RunState:
    free = event.get("disk_free_bytes")
    heat, limit, clock = (event.get(name) for name in ("celsius", "celsius_limit", "clock_share"))
    hot = heat is not None and limit is not None and heat >= limit
    slowed = hot and clock is not None and clock < rules.machine.hot_clock_share
    need = state.checkpoint_bytes * rules.machine.disk_checkpoints
    return msgspec.structs.replace(
        state,
        disk_low=free is not None and need > 0 and free < need,
        slept=state.slept or (event.get("slept_seconds") or 0) >= rules.machine.slept_seconds,
        slow=0 if event.get("slept_seconds") else state.slow,
        hot_looks=state.hot_looks + 1 if slowed else 0,
    )


OBSERVERS: dict[str, Callable[[RunState, Event, Thresholds], RunState]] = {
    "start": _start,
    "model": _model,
    "checkpoint": _checkpoint,
    "heldout": _heldout,
    "step": _step,
    "machine": _machine,
}
