"""The policy: stops what cannot go well, leaves everything else alone, always says why."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from advisor.run.policy import CONTINUE, RunState, advance, decide

finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.builds(
    lambda step, loss, norm: {"event": "step", "step": step, "total": 100, "loss": loss, "grad_norm": norm},
    st.integers(1, 100),
    st.none() | finite,
    st.none() | st.floats(min_value=0, allow_infinity=False),
)
others = st.builds(
    lambda name, tokens: {"event": name, "supervised_tokens": tokens},
    st.sampled_from(["data", "model", "checkpoint", "heldout", "note", "warning", "end", "start"]),
    st.integers(0, 10),
)


def step(number: int, *, loss: float | None = 1.0, norm: float | None = 1.0) -> dict[str, Any]:
    """A step event."""
    return {"event": "step", "step": number, "total": 10, "loss": loss, "grad_norm": norm}


def test_a_healthy_step_goes_on() -> None:
    """Nothing is done about ordinary steps."""
    assert decide(RunState(), step(1)) is CONTINUE


def test_a_loss_that_is_no_number_stops() -> None:
    """NaN and infinity are null in the events."""
    action = decide(RunState(step=4, steps_seen=4), step(5, loss=None))
    assert (action.kind, action.code) == ("stop", "loss_not_finite")
    assert "step 5" in action.reason
    assert action.remedy


def test_no_gradient_at_the_first_step_stops() -> None:
    """Nothing that is trained influences the loss."""
    assert decide(RunState(), step(1, norm=0.0)).code == "no_gradient"
    assert decide(RunState(step=3, steps_seen=3), step(4, norm=0.0)) is CONTINUE


def test_no_trained_token_stops() -> None:
    """Zero supervised tokens refuse to train."""
    assert decide(RunState(), {"event": "data", "supervised_tokens": 0}).code == "no_supervised_tokens"
    assert decide(RunState(), {"event": "data", "supervised_tokens": 1}) is CONTINUE


@given(st.lists(steps | others, max_size=30))
def test_any_sequence_is_judged_once_and_with_a_reason(events: list[dict[str, Any]]) -> None:
    """Every stop has a reason and a remedy; a stopped run is left alone; the step never goes unseen."""
    state, stopped = RunState(), False
    for event in events:
        action = decide(state, event)
        assert not (stopped and action.kind == "stop")
        state = advance(state, event)
        if action.kind == "stop":
            assert action.code
            assert action.reason
            assert action.remedy
            stopped = True
            state = RunState(step=state.step, steps_seen=state.steps_seen, stopped=True)
        if event["event"] == "step":
            assert state.step == event["step"]
            assert stopped or event["loss"] is not None


@given(state=st.builds(RunState, step=st.integers(0, 9), steps_seen=st.integers(0, 9)), event=steps | others)
def test_the_same_question_has_the_same_answer(state: RunState, event: dict[str, Any]) -> None:
    """Deciding changes nothing."""
    before = dict(event)
    assert decide(state, event) == decide(state, event)
    assert event == before
