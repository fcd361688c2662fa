"""Follows one attempt from the start of its program to its end, and acts on what the policy says.

Goes in: a running program, its events, the state of the policy. Comes out: an Outcome: done, an error, or the
action that ended it. Never does: decide; start the next attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from advisor.errors import AdvisorError, InterruptedRunError, TrainingError
from advisor.run.events import Event, EventReader, EventWriter
from advisor.run.failures import classify
from advisor.run.launch import LOG, Interrupts, Workers
from advisor.run.machine import MachineWatch
from advisor.run.policy import Action, answered, react
from advisor.run.signs import RunState, observe
from advisor.run.thresholds import Thresholds
from advisor.types import Record

LOOK_EVERY_SECONDS = 0.1
LOG_TAIL_BYTES = 16384
ENDS_THE_PROGRAM = ("restart", "finish", "ask", "stop")
OnEvent = Callable[[Event], None]
Ask = Callable[[Action], bool]
"""Asks a person whether an action that needs consent is allowed."""


class Outcome(Record, frozen=True, kw_only=True):
    """How an attempt ended."""

    state: RunState
    action: Action | None = None
    """`restart` or `finish`, when another attempt follows."""


class Follower:
    """Follows the attempts of one stage."""

    def __init__(
        self, folder: Path, events: EventWriter, reader: EventReader, rules: Thresholds, *,
        on_event: OnEvent, ask: Ask,
    ) -> None:  # fmt: skip
        self._folder, self._events, self._reader, self._rules = folder, events, reader, rules
        self._on_event, self._ask = on_event, ask
        self.error: AdvisorError | None = None
        """Why the last attempt ended, when no other follows it."""

    def follow(self, workers: Workers, state: RunState) -> Outcome:
        """Pass events on and act on them until the program ends."""
        said: Event | None = None
        asked = 0
        watch = MachineWatch(self._folder, workers.pid, sensors=self._rules.machine.hot_sensors)
        with Interrupts() as interrupts:
            while True:
                status = workers.poll()
                seen = self._reader.new_events()
                for event in seen:
                    if event["event"] == "error" and said is not None:
                        continue  # what the first failure did to the other processes
                    self._on_event(event)
                    said = event if event["event"] == "error" else said
                machine = watch.look()
                for event in (*seen, *([machine] if machine else [])):
                    state, action = react(state, event, self._rules)
                    # Who wants to stop is not answered with another attempt.
                    outcome = None if asked else self._act(workers, state, action)
                    if outcome is not None:
                        return outcome
                if status is not None:
                    break
                if interrupts.count > asked:
                    asked = interrupts.count
                    self._interrupt(workers, times=asked)
                time.sleep(LOOK_EVERY_SECONDS)
        return self._ended(workers, state, status, said, watch, interrupted=asked > 0)

    def _ended(
        self, workers: Workers, state: RunState, status: int, said: Event | None,
        watch: MachineWatch, *, interrupted: bool,
    ) -> Outcome:  # fmt: skip
        self.error = None
        if status == 0:
            return Outcome(state=state)
        if interrupted and said is None:
            self.error = InterruptedRunError(
                "The run was interrupted; its checkpoints are kept.",
                f"Go on: ftadvisor run {self._folder} --resume",
            )
            return Outcome(state=state)
        self.error = classify(status, said, log_tail(self._folder / LOG))
        if interrupted:
            return Outcome(state=state)
        ended = {
            "event": "ended", "code": self.error.code, "message": self.error.message, **watch.at_the_end()
        }  # fmt: skip
        state, action = react(state, ended, self._rules)
        return self._act(workers, state, action) or Outcome(state=state)

    def _act(self, workers: Workers, state: RunState, action: Action) -> Outcome | None:
        """Write an action down and carry out its part; an Outcome when it ends the attempt."""
        if action.kind in ("continue", "fail"):
            return None
        if action.kind in ENDS_THE_PROGRAM:
            workers.kill()
            for event in self._reader.new_events():
                self._on_event(event)
        if action.kind == "ask":
            state, action = answered(state, action, allowed=self._ask(action))
        self._events.write(
            "decision", action=action.kind, code=action.code, message=action.reason, remedy=action.remedy,
            **({"changes": action.changes} if action.changes else {}),
        )  # fmt: skip
        if action.kind == "warn":
            return None
        if action.kind == "stop":
            self.error = TrainingError(action.reason, action.remedy, code=action.code)
            return Outcome(state=state)
        self.error = None
        return Outcome(state=state, action=action)

    def _interrupt(self, workers: Workers, *, times: int) -> None:
        """First ask the program to save and stop; the second time end it."""
        if times == 1:
            self._events.write(
                "note", message="Stopping: the step is finished and saved. Ctrl-C again ends it at once."
            )
            workers.ask_to_stop()
        else:
            workers.kill()


def begin(state: RunState, events: list[Event], rules: Thresholds) -> RunState:
    """Return the state with which a stage goes on that has events from before."""
    for event in events:
        state = observe(state, event, rules)
    return msgspec.structs.replace(state.fresh(), settings=state.settings)


def log_tail(path: Path) -> str:
    """Return the end of the program's log; empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode("utf-8", "replace")
