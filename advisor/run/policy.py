"""What should be done about an event of a running training? A pure function: state and event to action.

Goes in: what is known of the run, one event, the thresholds of kb/rules/policy.toml. Comes out: the new state
and an action with its reason. Never does: I/O, look at a clock, act; the supervisor acts.

To add a reaction: what it must remember in `RunState` (kept by advisor/run/signs.py) and a rule in `RULES`. A
rule sees one event and the state after it, and answers None when it has no objection. Whatever restarts a
training uses up something that is finite, a rung or a lowering of the rate, so that every run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from advisor.run.ladder import NEEDS_PLAN, next_rung
from advisor.run.signs import RunState, mean, observe
from advisor.run.thresholds import Thresholds
from advisor.types import Record, Value

ActionKind = Literal["continue", "warn", "restart", "finish", "ask", "stop", "fail"]
"""`continue`: nothing to do. `warn`: tell it, go on. `restart`: from a checkpoint, with `changes`.
`finish`: the checkpoint of `newest_step` is the result. `ask`: as restart when a person allows it, else stop.
`stop`: end the training now, the last good checkpoint is kept. `fail`: what the program said stands."""
Event = dict[str, Any]


class Action(Record, frozen=True, kw_only=True):
    """What to do, and why."""

    kind: ActionKind = "continue"
    code: str = ""
    reason: str = ""
    remedy: str = ""
    changes: dict[str, Value] = {}
    """Settings of the next attempt that differ."""
    newest_step: int | None = None
    """Later checkpoints are not used any more; None: all may be."""
    consent: str = ""
    """The word by which a person allows it: `run --allow WORD`."""


CONTINUE = Action()
Rule = Callable[[RunState, Event, Thresholds], Action | None]
PLAN_LOWER = (
    "Plan again with a lower rate (--set learning_rate=...) or, on a card without bf16, with "
    "--set precision=fp32."
)
LOOK = "Look at the rows: ftadvisor inspect FILE"


def react(state: RunState, event: Event, rules: Thresholds) -> tuple[RunState, Action]:
    """Return the state after an event and what to do about it.

    Args:
        state: what was seen before; a stopped run is never acted upon again.
        event: one event of events.jsonl, or `machine` or `ended` as the supervisor tells them.
        rules: kb/rules/policy.toml.
    """
    state = observe(state, event, rules)
    if state.stopped:
        return state, CONTINUE
    for rule in RULES:
        action = rule(state, event, rules)
        if action is not None and action.code not in state.told:
            return _after(state, action), action
    return state, CONTINUE


def answered(state: RunState, asked: Action, *, allowed: bool) -> tuple[RunState, Action]:
    """Return what becomes of an action that needed consent, and the state after it."""
    if allowed:
        given = msgspec.structs.replace(asked, kind="restart")
        state = msgspec.structs.replace(state, consents=(*state.consents, asked.consent))
    else:
        given = msgspec.structs.replace(asked, kind="stop", changes={})
    return _after(state, given), given


def _after(state: RunState, action: Action) -> RunState:
    change = msgspec.structs.replace
    if action.kind == "warn":
        return change(state, told=(*state.told, action.code))
    if action.kind in ("stop", "fail"):
        return change(state, stopped=True)
    if action.kind == "finish":
        return change(state.fresh().back_to(action.newest_step), finishing=True)
    if action.kind == "restart":
        lowered = state.rates_lowered + ("learning_rate" in action.changes)
        settings = {**state.settings, **action.changes}
        return change(state.fresh().back_to(action.newest_step), settings=settings, rates_lowered=lowered)
    return state


# --- rules: what cannot be mended ------------------------------------------------------------------


def _nothing_to_learn(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "data" or event.get("supervised_tokens") != 0:
        return None
    return Action(
        kind="stop", code="no_supervised_tokens", remedy=LOOK,
        reason="No token of the data is trained on: every row is empty after the question.",
    )  # fmt: skip


def _no_gradient(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "step" or state.steps_seen > 1 or event.get("grad_norm") != 0:
        return None
    return Action(
        kind="stop", code="no_gradient",
        reason="The gradient of the first step is exactly zero: nothing that is trained influences the loss.",
        remedy="Check `target` and the trained rows: ftadvisor inspect FILE",
    )  # fmt: skip


def _loss_zero(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "step" or state.zero_losses < rules.loss.zero_steps:
        return None
    return Action(
        kind="stop", code="loss_zero",
        reason=f"The loss was exactly 0 for {state.zero_losses} steps: the labels are masked, or the rows "
        "are known by heart.",
        remedy=f"{LOOK}; with packing, --set packing=false",
    )  # fmt: skip


# --- rules: what a lower rate may mend -------------------------------------------------------------


def _loss_broken(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "step" or (event.get("loss") is not None and not event.get("broken")):
        return None
    what = "gradient" if event.get("broken") == "gradient" else "loss"
    reason = f"The {what} at step {event['step']} is not a finite number; more steps cannot mend that."
    return _lower(state, rules, code=f"{what}_not_finite", reason=reason, back_to=int(event["step"]) - 1)


def _diverging(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "step" or state.best_mean is None or state.first_mean is None:
        return None
    now = mean(state.losses)
    limit = max(state.best_mean * rules.loss.diverging_factor, state.first_mean)
    if len(state.losses) < rules.loss.window or now <= limit or state.reinforced:
        return None
    reason = (
        f"The loss runs away: {now:.3g} on average over the last {rules.loss.window} steps to step "
        f"{event['step']}, after {state.best_mean:.3g} at step {state.best_mean_step}."
    )
    return _lower(state, rules, code="loss_diverging", reason=reason, back_to=state.best_mean_step)


def _lower(state: RunState, rules: Thresholds, *, code: str, reason: str, back_to: int) -> Action:
    rate = state.settings.get("learning_rate")
    if state.rates_lowered >= rules.rate.most_times or not isinstance(rate, float) or rate <= 0:
        tried = f" Lowering the rate {state.rates_lowered} times did not help." if state.rates_lowered else ""
        return Action(kind="stop", code=code, reason=f"{reason}{tried}", remedy=PLAN_LOWER)
    lower = rate / rules.rate.divide_by
    saved = max((step for step in state.checkpoints if step <= back_to), default=0)
    return Action(
        kind="restart", code=code, changes={"learning_rate": lower}, newest_step=saved, remedy=PLAN_LOWER,
        reason=f"{reason} Going back to {_place(saved)}, with a learning rate of {lower:.3g} instead of "
        f"{rate:.3g}.",
    )  # fmt: skip


def _place(step: int) -> str:
    return f"the checkpoint of step {step}" if step else "the beginning"


# --- rules: what makes training on useless ---------------------------------------------------------


def _heldout_rises(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "heldout" or state.heldout_best is None or not state.heldout_worse:
        return None
    at_the_end = event.get("when") == "after"
    if not at_the_end and state.heldout_worse < rules.heldout.patience:
        return None
    best = state.heldout_best_step
    if best not in state.checkpoints:
        return None
    return Action(
        kind="finish", code="heldout_rises", newest_step=best,
        reason=f"On rows that are not trained on, the loss has risen from {state.heldout_best:.4g} at step "
        f"{best} to {event['loss']:.4g} at step {event['step']}: more steps only learn the training rows by "
        f"heart. The checkpoint of step {best} is the result.",
        remedy="Fewer epochs, more rows or a lower rate: ftadvisor explain overfitting",
    )  # fmt: skip


def _kl_runs_away(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    if event["event"] != "step" or state.kl_high < rules.reinforcement.kl_steps:
        return None
    good = max((step for step in state.checkpoints if step <= state.kl_fine_step), default=0)
    reason = (
        f"The model has left its start too far: KL above {rules.reinforcement.kl_runaway:g} for "
        f"{state.kl_high} steps to step {event['step']}. What it gains in reward is then no longer trusted."
    )
    remedy = "Plan again with --set kl_beta=0.05 or a lower --set learning_rate=..."
    if not good:
        return Action(kind="stop", code="kl_runaway", reason=reason, remedy=remedy)
    return Action(
        kind="finish", code="kl_runaway", newest_step=good, remedy=remedy,
        reason=f"{reason} The checkpoint of step {good}, before that, is the result.",
    )  # fmt: skip


# --- rules: what a person should know --------------------------------------------------------------


def _worth_saying(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    """Return the first warning that has not been given yet."""
    if event["event"] not in ("step", "machine"):
        return None
    for there, code, reason, remedy in _warnings(state, event, rules):
        if there and code not in state.told:
            return Action(kind="warn", code=code, reason=reason, remedy=remedy)
    return None


def _warnings(state: RunState, event: Event, rules: Thresholds) -> tuple[tuple[bool, str, str, str], ...]:
    """Whether it is there, its code, what it is, what to do."""
    step, reward, machine = state.step, rules.reinforcement, rules.machine
    return (
        (
            state.flat, "loss_flat",
            f"The loss has not moved since the first steps (step {step}): the rate is too low, or the rows "
            "do not hold what is to be learned.", "Plan again with a rate two to five times higher.",
        ),
        (
            state.high_norms >= rules.gradient.exploding_steps, "gradient_exploding",
            f"The gradient norm was above {rules.gradient.exploding_norm:g} for {state.high_norms} steps to "
            f"step {step}; it is clipped, but training is unstable.", PLAN_LOWER,
        ),
        (
            state.displaced, "likelihood_displaced",
            f"The chosen answers become less likely while the margin grows (step {step}): near-equal "
            "pairs push both down.",
            "Plan again with --set sft_loss_weight=0.2, or filter pairs that are too alike.",
        ),
        (
            state.disordered, "preference_accuracy_low",
            f"Less than half of the pairs are in the right order at step {step}: chosen and rejected may be "
            "swapped, or the rate is wrong.", "Read ten pairs: ftadvisor inspect FILE",
        ),
        (
            state.cut_off >= reward.cut_off_steps, "reward_hacking_length",
            f"Most answers grow to the limit and are cut off (step {step}): length may please the reward.",
            "A penalty for length, --set kl_beta=..., or a higher --set max_completion_length=...",
        ),
        (
            state.collapsed >= reward.entropy_steps, "mode_collapse",
            f"All answers become the same: entropy below {reward.entropy_collapse:g} at step {step}.",
            "A higher --set temperature=..., or --set kl_beta=...",
        ),
        (
            state.alike >= reward.no_reward_steps, "no_reward_signal",
            f"For {state.alike} steps all answers had the same mark, so that nothing was learned.",
            "Easier prompts, another reward, or train with examples first.",
        ),
        (
            state.slow >= machine.slow_steps, "throughput_collapse",
            f"Steps have become {machine.slow_factor:g} times slower than the best (step {step}): "
            "another program, heat, or memory that is moved to disk.", "Look at: ftadvisor doctor",
        ),
        (
            state.hot_looks >= machine.hot_looks or state.hot_steps >= machine.hot_steps, "slowed_by_heat",
            f"{'The card' if state.hot_steps >= machine.hot_steps else 'The processor'} is as hot as it may "
            f"be and has lowered its clock (step {step}): the training goes on, more slowly.",
            "Give it air, or lower its power limit; the result is the same.",
        ),
        (
            state.disk_low, "disk_low",
            "The disk will be full after about one more checkpoint.",
            "Free some space now; when it is full, the run stops and keeps the last whole checkpoint.",
        ),
        (
            state.slept, "slept",
            "The machine slept or its clock was set; the training went on after it.", "",
        ),
    )  # fmt: skip


# --- rules: how the program ended ------------------------------------------------------------------


def _ended(state: RunState, event: Event, rules: Thresholds) -> Action | None:
    """Decide about a program that failed; `code` is that of advisor/run/failures.py."""
    if event["event"] != "ended":
        return None
    code, message = str(event.get("code", "")), str(event.get("message", ""))
    if state.finishing or code not in ("out_of_memory", "killed"):
        return Action(kind="fail", code=code, reason=message)
    if code == "killed" and not _by_the_system(event, rules):
        return Action(kind="fail", code=code, reason=message)
    if not state.loaded:
        return Action(
            kind="stop", code="out_of_memory",
            reason=f"{message} That was before the first step: the model itself does not fit.",
            remedy="Plan again with a smaller --model or --method qlora.",
        )  # fmt: skip
    return _one_rung_down(state, message, rules)


def _by_the_system(event: Event, rules: Thresholds) -> bool:
    """Tell whether a kill came from the system for want of memory.

    `oom_kills` is how many such kills were counted meanwhile; where that is not known or not counted, the
    share of the memory that the program held decides."""
    kills, share = event.get("oom_kills"), event.get("memory_share")
    return bool(kills) or (share is not None and float(share) >= rules.ladder.killed_memory_share)


def _one_rung_down(state: RunState, message: str, rules: Thresholds) -> Action:
    rung = next_rung(state.settings, state.trainee, rules.ladder)
    smaller = "Plan again with a smaller --model, a shorter --set max_seq_len=..., or --method qlora."
    if rung is None:
        reason = f"{message} Nothing is left that would need less memory and train the same."
        return Action(kind="stop", code="out_of_memory", reason=reason, remedy=smaller)
    if rung.name in NEEDS_PLAN:
        reason = f"{message} What is left: {rung.words}."
        remedy = "Plan again, with what was chosen before and --method qlora."
        return Action(kind="stop", code="out_of_memory", reason=reason, remedy=remedy)
    saved = max(state.checkpoints, default=0)
    going_on = f"{message} Going on from {_place(saved)}: {rung.words}."
    if rung.consent and rung.consent not in state.consents:
        return Action(
            kind="ask", code="out_of_memory", changes=rung.changes, consent=rung.consent,
            reason=f"{message} What is left: {rung.words}.",
            remedy=f"Allow it: ftadvisor run FOLDER --resume --allow {rung.consent}. Or: {smaller}",
        )  # fmt: skip
    return Action(kind="restart", code="out_of_memory", reason=going_on, changes=rung.changes, remedy=smaller)


RULES: tuple[Rule, ...] = (
    _nothing_to_learn,
    _loss_broken,
    _no_gradient,
    _loss_zero,
    _diverging,
    _heldout_rises,
    _kl_runs_away,
    _worth_saying,
    _ended,
)
