"""The policy: mends what can be mended by stated rules, stops what cannot, always ends, always says why."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from advisor.knowledge import load
from advisor.run.ladder import Trainee, next_rung
from advisor.run.policy import CONTINUE, Action, answered, react
from advisor.run.signs import RunState
from advisor.run.thresholds import thresholds_of
from advisor.types import Value

RULES = thresholds_of(load().rules["policy"])
PLANNED: dict[str, Value] = {
    "learning_rate": 2e-4, "micro_batch": 15, "effective_batch": 45, "max_seq_len": 2048,
    "gradient_checkpointing": False, "loss": "full_logits", "optimizer": "adamw_torch",
}  # fmt: skip
MAY_CHANGE = {
    "learning_rate", "micro_batch", "gradient_checkpointing", "loss", "optimizer", "max_seq_len"
}  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
MOST_ATTEMPTS = 40
OUT_OF_MEMORY = {"event": "ended", "code": "out_of_memory", "message": "Training ran out of memory."}
MODEL = {"event": "model", "device": "cuda:0"}


def begin(
    *, tuner: str = "full", objective: str = "sft", consents: tuple[str, ...] = (), **changes: Value
) -> RunState:
    """A run that has just started."""
    trainee = Trainee(objective=objective, tuner=tuner, device="cuda:0", bitsandbytes=True)
    return RunState(trainee=trainee, settings={**PLANNED, **changes}, consents=consents)


def step(number: int, *, loss: float | None = 1.0, norm: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A step event."""
    return {"event": "step", "step": number, "total": 100, "loss": loss, "grad_norm": norm, **more}


def saved(number: int) -> dict[str, Any]:
    """A checkpoint event."""
    return {"event": "checkpoint", "step": number, "bytes": 1000}


def heldout(number: int, loss: float, when: str = "") -> dict[str, Any]:
    """A measurement on rows that are not trained on."""
    return {"event": "heldout", "when": when or f"at step {number}", "step": number, "loss": loss}


def feed(state: RunState, *events: dict[str, Any]) -> tuple[RunState, list[Action]]:
    """Return the state after events, and the actions on the way."""
    taken = []
    for event in events:
        state, action = react(state, event, RULES)
        if action is not CONTINUE:
            taken.append(action)
    return state, taken


def last(state: RunState, *events: dict[str, Any]) -> Action:
    """Return the action on the last of some events; nothing must happen before it."""
    state, before = feed(state, *events[:-1])
    assert not before
    return react(state, events[-1], RULES)[1]


def test_a_healthy_run_is_left_alone() -> None:
    """Ordinary steps, checkpoints and measurements need nothing."""
    events = [
        event for n in range(1, 90) for event in (step(n, loss=3.0 / n, step_seconds=1.0, tokens=100 * n),)
    ]
    events += [saved(40), heldout(40, 0.5), saved(80), heldout(80, 0.4), heldout(90, 0.39, "after")]
    assert feed(begin(), MODEL, *events)[1] == []


def test_the_ladder_is_taken_in_order_and_keeps_the_batch() -> None:
    """Each time memory runs out one rung is taken, all of them in the stated order, the step's rows kept."""
    state, names, place = begin(), [], [PLANNED]
    for _ in range(20):
        state, taken = feed(state, MODEL, step(3), saved(4), OUT_OF_MEMORY)
        if taken[-1].kind != "restart":
            break
        names.append(next(iter(taken[-1].changes)))
        place.append(state.settings)
        assert "the checkpoint of step 4" in taken[-1].reason
    assert names == ["micro_batch"] * 2 + ["gradient_checkpointing", "loss", "optimizer", "optimizer"]
    assert [one["micro_batch"] for one in place[:3]] == [15, 5, 1]
    assert {one["effective_batch"] for one in place} == {45}
    assert (state.settings["loss"], state.settings["optimizer"]) == ("chunked", "paged_adamw_8bit")
    assert (taken[-1].kind, taken[-1].consent) == ("ask", "shorter-sequences")


def test_shorter_rows_need_consent() -> None:
    """Without it the run stops and names the word that allows it; with it, the rows become shorter."""
    low = begin(
        tuner="lora", micro_batch=1, gradient_checkpointing=True, loss="chunked", optimizer="adamw_8bit"
    )
    low = RunState(trainee=Trainee(objective="sft", tuner="lora"), settings=low.settings)
    state, (asked,) = feed(low, MODEL | {"device": "cpu"}, OUT_OF_MEMORY)
    assert asked.kind == "ask"
    refused, stop = answered(state, asked, allowed=False)
    assert (stop.kind, stop.changes, refused.stopped) == ("stop", {}, True)
    assert "--allow shorter-sequences" in stop.remedy
    on, given = answered(state, asked, allowed=True)
    assert (given.kind, on.settings["max_seq_len"]) == ("restart", 1536)
    state, taken = feed(on, MODEL | {"device": "cpu"}, OUT_OF_MEMORY)
    assert (taken[-1].kind, state.settings["max_seq_len"]) == ("restart", 1152)


def test_another_method_needs_another_plan() -> None:
    """When only 4 bits are left, the run stops and says how to plan them."""
    state = begin(
        tuner="lora", micro_batch=1, gradient_checkpointing=True, loss="chunked", max_seq_len=128
    )  # fmt: skip
    action = last(state, MODEL, OUT_OF_MEMORY)
    assert action.kind == "stop"
    assert "--method qlora" in action.remedy


@pytest.mark.parametrize(
    ("objective", "tuner", "absent"),
    [("kto", "full", "micro_batch"), ("dpo", "full", "loss"), ("sft", "lora", "optimizer"),
     ("sft", "prefix_tuning", "gradient_checkpointing")],
)  # fmt: skip
def test_a_rung_that_would_change_the_method_is_left_out(objective: str, tuner: str, absent: str) -> None:
    """kto needs its rows together; a pair's loss has no chunks; adapters have a small optimiser."""
    settings_, trainee = (
        dict(PLANNED),
        Trainee(objective=objective, tuner=tuner, device="cuda:0", bitsandbytes=True),
    )
    seen = set()
    while (rung := next_rung(settings_, trainee, RULES.ladder)) is not None and rung.changes:
        seen |= set(rung.changes)
        settings_ |= rung.changes
    assert absent not in seen
    assert seen


def test_a_model_that_does_not_fit_is_not_tried_again() -> None:
    """Fewer rows do not help what fails before the first one."""
    assert last(begin(), OUT_OF_MEMORY).kind == "stop"


@pytest.mark.parametrize(
    ("known", "kind"),
    [({"oom_kills": 1, "memory_share": 0.1}, "restart"), ({"oom_kills": 0, "memory_share": 0.95}, "restart"),
     ({"oom_kills": 0, "memory_share": 0.2}, "fail"), ({"oom_kills": None, "memory_share": None}, "fail")],
)  # fmt: skip
def test_a_kill_counts_as_memory_only_with_evidence(known: dict[str, Any], kind: str) -> None:
    """The kernel's count or a nearly full memory; else somebody did it, and that is respected."""
    killed = {"event": "ended", "code": "killed", "message": "The process was killed.", **known}
    assert last(begin(), MODEL, step(1), killed).kind == kind


def test_a_loss_that_is_no_number_goes_back_with_a_lower_rate_and_then_stops() -> None:
    """To the last checkpoint before it, a third of the rate, twice; then an explanation."""
    state, taken = feed(begin(), MODEL, saved(4), step(5), saved(8), step(9, loss=None))
    assert (taken[0].kind, taken[0].newest_step) == ("restart", 8)
    assert state.settings["learning_rate"] == pytest.approx(2e-4 / 3)
    state, taken = feed(state, MODEL, step(9), saved(10), step(10, norm=None, broken="gradient"))
    assert (taken[0].kind, taken[0].newest_step, taken[0].code) == ("restart", 8, "gradient_not_finite")
    assert state.checkpoints == (4, 8)
    stop = last(state, MODEL, step(9, loss=None))
    assert (stop.kind, stop.code) == ("stop", "loss_not_finite")
    assert "2 times did not help" in stop.reason
    assert stop.remedy


def test_without_a_checkpoint_it_begins_anew() -> None:
    """Going back may mean to the beginning; a rate of zero cannot be lowered."""
    action = last(begin(), MODEL, step(2, loss=None))
    assert (action.kind, action.newest_step) == ("restart", 0)
    assert last(begin(learning_rate=0.0), MODEL, step(2, loss=None)).kind == "stop"


def test_a_loss_that_runs_away_goes_back_to_where_it_was_best() -> None:
    """The checkpoint that was written on the way up is not used."""
    falling = [step(n, loss=2.0 - n / 20) for n in range(1, 21)]
    rising = [step(n, loss=1.0 + (n - 20) * 0.5) for n in range(21, 60)]
    events = [*falling, saved(20), *rising[:10], saved(30), *rising[10:]]
    action = next(a for a in feed(begin(), MODEL, *events)[1] if a.kind != "warn")
    assert (action.kind, action.code, action.newest_step) == ("restart", "loss_diverging", 20)


def test_what_cannot_learn_stops() -> None:
    """No trained token, no gradient, a loss of exactly zero."""
    assert last(begin(), {"event": "data", "supervised_tokens": 0}).code == "no_supervised_tokens"
    assert feed(begin(), {"event": "data", "supervised_tokens": 1})[1] == []
    assert last(begin(), step(1, norm=0.0)).code == "no_gradient"
    assert last(begin(), step(3), step(4, norm=0.0)) is CONTINUE
    zero = [step(n, loss=0.0) for n in (1, 2, 3)]
    assert last(begin(), *zero).code == "loss_zero"
    assert feed(begin(objective="rloo"), *[event | {"reward": 1.0} for event in zero])[1] == []


def test_a_rising_heldout_loss_ends_with_the_best_checkpoint() -> None:
    """Twice above the best in a row is enough; once is not; a hair above is not."""
    events = [MODEL, saved(10), heldout(10, 1.0), saved(20), heldout(20, 1.2), saved(30), heldout(30, 1.3)]
    state, (action,) = feed(begin(), *events)
    assert (action.kind, action.newest_step) == ("finish", 10)
    assert state.finishing
    assert feed(begin(), *events[:5])[1] == []
    assert feed(begin(), *events[:3], heldout(20, 1.005), heldout(30, 1.009))[1] == []
    assert feed(state, MODEL, heldout(10, 9.0, "after"), OUT_OF_MEMORY)[1][-1].kind == "fail"


def test_at_the_end_a_better_checkpoint_is_taken_instead() -> None:
    """Where the last steps made it worse, the best checkpoint is the result; one that is gone is not."""
    before = [MODEL, heldout(0, 0.1, "before"), saved(10), heldout(10, 1.0), saved(20), heldout(20, 0.8)]
    assert last(begin(), *before, heldout(30, 1.1, "after")).newest_step == 20
    assert last(begin(), MODEL, heldout(10, 1.0), heldout(30, 1.5, "after")) is CONTINUE


def test_a_model_that_leaves_its_start_is_taken_back() -> None:
    """KL beyond the limit for some steps: the checkpoint before it is the result, else the run stops."""
    fine = [step(n, reward=0.1, kl=0.1) for n in range(1, 5)]
    far = [step(n, reward=0.9, kl=3.0) for n in range(5, 10)]
    action = last(begin(objective="grpo"), MODEL, *fine[:2], saved(2), *fine[2:], *far)
    assert (action.kind, action.code, action.newest_step) == ("finish", "kl_runaway", 2)
    assert last(begin(objective="grpo"), MODEL, *fine, *far).kind == "stop"


SLOW = [step(n, step_seconds=1.0) for n in range(1, 20)] + [step(n, step_seconds=9.0) for n in range(20, 40)]
WARNED = {
    "loss_flat": [step(n, loss=2.0) for n in range(1, 40)],
    "gradient_exploding": [step(n, loss=2 / n, norm=500.0) for n in range(1, 9)],
    "likelihood_displaced": [
        step(n, loss=2 / n, accuracy=0.9, chosen_reward=-n / 5, margin=1.0) for n in range(1, 30)
    ],
    "preference_accuracy_low": [step(n, loss=2 / n, accuracy=0.3, chosen_reward=0.1) for n in range(1, 40)],
    "reward_hacking_length": [step(n, reward=n / 9, cut_off_share=0.9) for n in range(1, 12)],
    "mode_collapse": [step(n, reward=0.5, entropy=0.001) for n in range(1, 9)],
    "no_reward_signal": [step(n, reward=0.0, reward_std=0.0) for n in range(1, 30)],
    "throughput_collapse": [event | {"loss": 9 / event["step"]} for event in SLOW],
    "slowed_by_heat": [
        {"event": "machine", "disk_free_bytes": 1 << 40, "celsius": 96.0, "celsius_limit": 95.0,
         "clock_share": 0.5}
    ] * 15,
    "disk_low": [saved(1), {"event": "machine", "disk_free_bytes": 1200}],
    "slept": [{"event": "machine", "disk_free_bytes": 1 << 40, "slept_seconds": 3600.0}],
}  # fmt: skip


@pytest.mark.parametrize("code", WARNED)
def test_what_a_person_should_know_is_said_once(code: str) -> None:
    """A warning changes nothing, and is not repeated."""
    taken = feed(begin(), MODEL, *WARNED[code], *WARNED[code][-2:])[1]
    assert [action.code for action in taken] == [code]
    assert taken[0].kind == "warn"
    assert taken[0].reason


def test_a_pause_is_not_slowness() -> None:
    """Steps that were slow because the machine slept do not count."""
    slept = {"event": "machine", "disk_free_bytes": 1 << 40, "slept_seconds": 90.0}
    events = [event | {"loss": 9 / event["step"]} for event in SLOW[:28]]
    state, taken = feed(begin(), *events, slept)
    assert [action.code for action in taken] == ["slept"]
    assert state.slow == 0


def test_heat_counts_only_while_it_slows_the_machine() -> None:
    """Ten hot steps in a row of a card; a cool one between begins anew, and so does a clock at its full speed
    however hot the processor is."""
    hot = [step(n, loss=9 / n, step_seconds=1.0, slowed_by_heat=True) for n in range(1, 13)]
    assert [action.code for action in feed(begin(), MODEL, *hot)[1]] == ["slowed_by_heat"]
    assert feed(begin(), MODEL, *hot[:8], step(9, loss=0.9, step_seconds=1.0), *hot[9:])[1] == []
    look = {"event": "machine", "disk_free_bytes": 1 << 40, "celsius": 99.0, "celsius_limit": 95.0}
    assert feed(begin(), MODEL, *[look | {"clock_share": 0.95}] * 40)[1] == []
    assert feed(begin(), MODEL, *[look | {"clock_share": 0.5, "celsius": 80.0}] * 40)[1] == []


# --- any sequence at all ---------------------------------------------------------------------------


def _needs(settings_: dict[str, Value]) -> tuple[float, ...]:
    """What decides about memory, each part so that less is less."""
    return (
        float(str(settings_["micro_batch"])),
        float(not settings_["gradient_checkpointing"]),
        float(settings_["loss"] == "full_logits"),
        -float(OPTIMIZERS.index(str(settings_["optimizer"]))),
        float(str(settings_["max_seq_len"])),
    )


class Checked:
    """Feeds a run and checks after each event what must always hold."""

    def __init__(self, state: RunState, *, allow: bool) -> None:
        self.state, self.allow, self.attempts = state, allow, 1

    def feed(self, event: dict[str, Any]) -> str:
        """Return the kind of action that was taken."""
        before, copy = self.state, dict(event)
        state, action = react(before, event, RULES)
        assert (state, action) == react(before, copy, RULES), "the same question has the same answer"
        assert event == copy
        if before.stopped:
            assert action is CONTINUE
        if action.kind != "continue":
            assert action.code
            assert action.reason or action.kind == "fail"
        if action.kind in ("stop", "restart", "finish", "ask"):
            assert action.remedy
        if action.kind == "ask":
            state, action = answered(state, action, allowed=self.allow)
            assert action.kind == ("restart" if self.allow else "stop")
        self.state = state
        self._check(before, action)
        return action.kind

    def _check(self, before: RunState, action: Action) -> None:
        old, new = before.settings, self.state.settings
        assert set(action.changes) <= MAY_CHANGE
        assert new["effective_batch"] == old["effective_batch"] == PLANNED["effective_batch"]
        assert int(str(new["effective_batch"])) % int(str(new["micro_batch"])) == 0
        assert all(now <= then for now, then in zip(_needs(new), _needs(old), strict=True)), (
            "memory never rises"
        )
        if new["max_seq_len"] != old["max_seq_len"]:
            assert "shorter-sequences" in self.state.consents, "the rows change only with consent"
        if action.kind in ("restart", "finish"):
            self.attempts += 1
            assert self.attempts <= MOST_ATTEMPTS, "it does not loop"
            if action.kind == "restart":
                assert new != old, "each attempt differs from the one before"
            assert action.newest_step is None or all(s <= action.newest_step for s in self.state.checkpoints)
        if action.kind == "finish":
            assert action.newest_step in before.checkpoints
        if action.kind in ("stop", "fail"):
            assert self.state.stopped


def random_event(chance: random.Random, number: int) -> dict[str, Any]:
    """An event as a run may meet it, mad ones among them."""
    kind = chance.choice(
        ["step"] * 6 + ["checkpoint", "heldout", "machine", "model", "data", "ended", "note"]
    )
    if kind == "step":
        extra: dict[str, Any] = {}
        if chance.random() < 0.3:
            extra = {"reward": chance.random(), "kl": chance.random() * 5, "entropy": chance.random() / 50,
                     "cut_off_share": chance.random(), "reward_std": chance.choice([0.0, 1.0])}  # fmt: skip
        elif chance.random() < 0.3:
            extra = {"accuracy": chance.random(), "chosen_reward": -chance.random() * 3, "margin": 1.0}
        if chance.random() < 0.03:
            extra["broken"] = "gradient"
        loss = None if chance.random() < 0.05 else chance.choice([0.0, 1.0, math.exp(chance.gauss(0, 3))])
        norm = chance.choice([None, 0.0, 1.0, 1e6])
        return step(number, loss=loss, norm=norm, step_seconds=chance.random(), tokens=number * 10, **extra)
    if kind == "heldout":
        return heldout(number, chance.random() * 3, chance.choice(["", "", "before", "after"]))
    return {
        "checkpoint": saved(number), "model": MODEL, "data": {"event": "data", "supervised_tokens": 5},
        "machine": {"event": "machine", "disk_free_bytes": chance.choice([10, 10**9]), "celsius": 99.0,
                    "slept_seconds": chance.choice([0.0, 0.0, 90.0]), "celsius_limit": 95.0,
                    "clock_share": chance.choice([0.5, 1.0])},
        "ended": {"event": "ended", "message": "It ended.",
                  "code": chance.choice(["out_of_memory", "out_of_memory", "killed", "disk"]),
                  "oom_kills": chance.choice([0, 1])},
        "note": {"event": "note", "message": "x"},
    }[kind]  # fmt: skip


@settings(max_examples=5000)
@given(
    seed=st.integers(0, 2**32),
    allow=st.booleans(),
    objective=st.sampled_from(["sft", "kto", "grpo", "dpo"]),
    tuner=st.sampled_from(["full", "lora", "qlora"]),
    length=st.integers(1, 60),
)
def test_any_sequence_ends_without_a_loop(
    seed: int, allow: bool, objective: str, tuner: str, length: int
) -> None:
    """5,000 random runs: every attempt differs, needs no more memory, keeps the batch, has a reason."""
    chance = random.Random(seed)
    run = Checked(begin(objective=objective, tuner=tuner), allow=allow)
    for number in range(1, length):
        run.feed(random_event(chance, number))


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_always_fails_ends(seed: int) -> None:
    """However often memory runs out or the loss breaks, there is a last attempt."""
    chance = random.Random(seed)
    run = Checked(begin(), allow=chance.random() < 0.5)
    for number in range(1, 10 * MOST_ATTEMPTS):
        run.feed(MODEL)
        run.feed(chance.choice([OUT_OF_MEMORY, step(number, loss=None)]))
        if run.state.stopped:
            return
    raise AssertionError("it never ended")


class AnyRun(RuleBasedStateMachine):
    """The same, in steps that Hypothesis can shorten when they fail."""

    @initialize(allow=st.booleans(), tuner=st.sampled_from(["full", "lora"]))
    def begin(self, allow: bool, tuner: str) -> None:
        self.run, self.number = Checked(begin(tuner=tuner), allow=allow), 0

    @rule(loss=st.none() | st.floats(0, 1e6), norm=st.none() | st.floats(0, 1e9))
    def train(self, loss: float | None, norm: float | None) -> None:
        self.number += 1
        self.run.feed(step(self.number, loss=loss, norm=norm))

    @rule()
    def save(self) -> None:
        self.run.feed(saved(self.number))

    @rule(loss=st.floats(0.1, 10), when=st.sampled_from(["", "before", "after"]))
    def measure(self, loss: float, when: str) -> None:
        self.run.feed(heldout(self.number, loss, when))

    @rule(code=st.sampled_from(["out_of_memory", "killed", "disk"]), kills=st.none() | st.integers(0, 1))
    def end(self, code: str, kills: int | None) -> None:
        self.run.feed({"event": "ended", "code": code, "message": "It ended.", "oom_kills": kills})

    @rule()
    def load(self) -> None:
        self.run.feed(MODEL)

    @invariant()
    def few_attempts(self) -> None:
        assert self.run.attempts <= MOST_ATTEMPTS


AnyRun.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestAnyRun = AnyRun.TestCase
