"""What should be done about an event of a running training? A pure function: state and event to action.

Goes in: what is known of the run, one event. Comes out: an action with its reason. Never does: I/O, look at a
clock, act; the supervisor acts.

To add a reaction: a kind in `ActionKind` that the supervisor carries out, what it must remember in
`RunState`, and a rule in `RULES`. A rule sees one event and the state before it, and answers None when it has
no objection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from advisor.types import Record

ActionKind = Literal["continue", "stop"]
"""`continue`: nothing to do. `stop`: end the training now, keep the last good checkpoint."""


class RunState(Record, frozen=True, kw_only=True):
    """What the policy remembers of one stage."""

    step: int = 0
    """Last step seen."""
    steps_seen: int = 0
    """Steps seen since this process started; differs from `step` after a resume."""
    stopped: bool = False


class Action(Record, frozen=True, kw_only=True):
    """What to do, and why."""

    kind: ActionKind = "continue"
    code: str = ""
    reason: str = ""
    remedy: str = ""


CONTINUE = Action()


def advance(state: RunState, event: dict[str, Any]) -> RunState:
    """Return the state after an event."""
    if event.get("event") != "step":
        return state
    return msgspec.structs.replace(state, step=int(event["step"]), steps_seen=state.steps_seen + 1)


def decide(state: RunState, event: dict[str, Any]) -> Action:
    """Return what to do about an event, given the state before it.

    Args:
        state: what was seen before; a stopped run is never acted upon again.
        event: one event of events.jsonl.
    """
    if state.stopped:
        return CONTINUE
    for rule in RULES:
        action = rule(state, event)
        if action is not None:
            return action
    return CONTINUE


def _nothing_to_learn(state: RunState, event: dict[str, Any]) -> Action | None:
    if event.get("event") != "data" or event.get("supervised_tokens") != 0:
        return None
    return Action(
        kind="stop",
        code="no_supervised_tokens",
        reason="No token of the data is trained on: every row is empty after the question.",
        remedy="Look at the rows: ftadvisor inspect FILE",
    )


def _loss_not_finite(state: RunState, event: dict[str, Any]) -> Action | None:
    if event.get("event") != "step" or event.get("loss") is not None:
        return None
    return Action(
        kind="stop",
        code="loss_not_finite",
        reason=f"The loss at step {event.get('step')} is not a finite number; more steps cannot mend that.",
        remedy="Plan again with a lower rate (--set learning_rate=...) or, on a card without bf16, with "
        "--set precision=fp32.",
    )


def _no_gradient(state: RunState, event: dict[str, Any]) -> Action | None:
    if event.get("event") != "step" or state.steps_seen > 0 or event.get("grad_norm") != 0:
        return None
    return Action(
        kind="stop",
        code="no_gradient",
        reason="The gradient of the first step is exactly zero: nothing that is trained influences the loss.",
        remedy="Check `target` and the trained rows: ftadvisor inspect FILE",
    )


RULES: tuple[Callable[[RunState, dict[str, Any]], Action | None], ...] = (
    _nothing_to_learn,
    _loss_not_finite,
    _no_gradient,
)
