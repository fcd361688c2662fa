"""Does a run survive what happens to runs? Puts one fault after another into real trainings.

Goes in: nothing; the model is tiny and random. Comes out: benchmarks/results/faults-<date>.md and the same on
the screen: for each fault how it was made, what the run did, whether that was right; exit 1 when one was not.
Never does: call a fault survived whose run did not end in the bits of the undisturbed one where nothing but
the fault was different.

    python benchmarks/faults.py [--only nan,disk_full] [--out FILE] [--json]

Supervisor, trainer, checkpoints and libraries are the shipped ones; the programs are forked from a process
that has the libraries loaded. Disks are small tmpfs mounts, the kernel's kill is one of a limited cgroup;
where that is not allowed, the fault is left out with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FTADVISOR_CALIBRATION"] = ""
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import msgspec  # noqa: E402 - after the number of threads
import psutil  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import advisor.run.machine  # noqa: E402
import advisor.run.stages  # noqa: E402
from advisor.errors import AdvisorError  # noqa: E402
from advisor.probe.host import cpu_identity  # noqa: E402
from advisor.probe.software import installed_packages  # noqa: E402
from advisor.run.events import read_events  # noqa: E402
from advisor.run.supervisor import run_plan  # noqa: E402
from advisor.storage import read_record  # noqa: E402
from advisor.types import Recipe, Record  # noqa: E402
from faults import OUT_OF_MEMORY, faulty  # noqa: E402
from forks import ended, fork_programs, load_libraries, supervise, unlocked  # noqa: E402
from tiny import make_tiny_model  # noqa: E402
from training import make_run, rows, write_rows  # noqa: E402

WEIGHTS = {"full": "model/model.safetensors", "lora": "adapter/adapter_model.safetensors"}
STEPS, EVERY = 8, 2
CGROUPS = Path("/sys/fs/cgroup/memory")
Event = dict[str, Any]


class Row(Record, frozen=True, kw_only=True):
    """What became of one fault."""

    name: str
    fault: str
    """How it was made."""
    outcome: str
    """What the run did, or why the fault could not be made."""
    passed: bool | None
    """None: it could not be made here."""
    cpu_seconds: float
    """Of all its processes."""


class NotHereError(Exception):
    """A fault that cannot be made on this computer."""


class Place:
    """Where one fault happens: a run folder with a program of its own, beside undisturbed ones."""

    def __init__(self, scratch: Path, model: Path, name: str, whole: Callable[[str], Path]) -> None:
        self.scratch, self.model, self.whole = scratch / name, model, whole
        self.folder, self.programs = self.scratch / "run", self.scratch / "programs"
        self.scratch.mkdir()
        self.data = write_rows(self.scratch / "rows.jsonl", rows())

    def prepare(self, *, tuner: str = "full", settings: dict[str, Any] | None = None, **fault: str) -> Path:
        """Write the run folder and its program with a fault."""
        faulty(self.programs, "sft", **fault)
        more = {"max_steps": STEPS, "save_every_steps": EVERY, **(settings or {})}
        return make_run(self.folder, tuner=tuner, model=self.model, data=self.data, **more)

    def use(self) -> None:
        """Make the supervisor of this process, and those forked from it, start this program."""
        for module in (advisor.run.launch, advisor.run.stages):
            module.recipes_dir = lambda: self.programs / "recipes"  # type: ignore[attr-defined]

    def run(self, *, resume: bool = False, on_event: Callable[[Event], None] = lambda _: None,
            allowed: tuple[str, ...] = ()) -> list[Event]:  # fmt: skip
        """Run the folder under its supervisor and return what was told."""
        seen: list[Event] = []

        def told(event: Event) -> None:
            seen.append(event)
            on_event(event)

        self.use()
        run_plan(self.folder, resume=resume, on_event=told, offline=True, allowed=allowed)
        return seen

    def fails(self, code: str, *, on_event: Callable[[Event], None] = lambda _: None) -> AdvisorError:
        """Run the folder, which must end with an error of this code."""
        try:
            self.run(on_event=on_event)
        except AdvisorError as error:
            found = error
        else:
            raise AssertionError(f"it ended well instead of with {code}")
        assert found.code == code, f"{found.code}: {found.message}"
        assert found.remedy
        return found

    def decisions(self) -> list[Event]:
        """Return what the policy decided."""
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] == "decision"]

    def saved(self) -> list[int]:
        """Return the steps of the whole checkpoints that are there."""
        return sorted(
            int(path.parent.name.split("-")[1]) for path in self.folder.glob("checkpoints/*/complete.json")
        )

    def require_equal(self, tuner: str = "full") -> None:
        """Require the bits of the undisturbed run, and the same rows at each step."""
        one, other = (load_file(place / WEIGHTS[tuner]) for place in (self.folder, self.whole(tuner)))
        assert one.keys() == other.keys()
        different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
        assert not different, f"{len(different)} of {len(one)} weights differ"
        self.require_rows(tuner)

    def require_rows(self, tuner: str = "full") -> None:
        """Require that each step was made of as many tokens as in the undisturbed run."""
        tokens = [
            {e["step"]: e["tokens"] for e in read_events(place / "events.jsonl") if e["event"] == "step"}
            for place in (self.folder, self.whole(tuner))
        ]
        assert tokens[0] == tokens[1], tokens


def at_step(number: int, do: Callable[[], object]) -> Callable[[Event], None]:
    """Return what does something once, when a step is told."""
    done: list[object] = []

    def told(event: Event) -> None:
        if event["event"] == "step" and event["step"] >= number and not done:
            done.append(do())

    return told


# --- the faults ------------------------------------------------------------------------------------


def memory_rungs(place: Place) -> str:
    """Out of memory at one step after another, until every rung was taken that a processor has, shorter rows
    with consent among them."""
    expected = [{"micro_batch": 2}, {"micro_batch": 1}, {"gradient_checkpointing": True}, {"loss": "chunked"},
                {"optimizer": "adamw_8bit"}, {"max_seq_len": 384}]  # fmt: skip
    place.prepare(
        settings={"max_seq_len": 512, "save_every_steps": 1},
        at_step=f"if step == 1 + ATTEMPT and ATTEMPT <= {len(expected)}:\n    {OUT_OF_MEMORY}",
    )
    place.run(allowed=("shorter-sequences",))
    assert [decision["changes"] for decision in place.decisions()] == expected
    recipes = [read_record(file, Recipe) for file in place.folder.glob("attempt-*.yaml")]
    assert {recipe.settings["effective_batch"] for recipe in recipes} == {8}
    place.require_rows()
    return f"{len(expected)} rungs in order, 8 rows a step in each, the same tokens at each step"


def memory_real(place: Place) -> str:
    """The process may not have more memory than it has (RLIMIT_AS) from step 4 on."""
    place.prepare(
        at_step="if step == 4 and SET['micro_batch'] > 2:\n"
        "    import resource\n"
        "    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 26), now + (1 << 26)))\n"
        "    reporter.held = bytearray(1 << 30)"
    )
    place.run()
    (decision,) = place.decisions()
    assert (decision["code"], decision["changes"]) == ("out_of_memory", {"micro_batch": 2})
    place.require_rows()
    return "two rows at a time from the checkpoint of step 2, the same tokens at each step"


def nan(place: Place) -> str:
    """The loss of step 5 is not a number."""
    place.prepare(at_log="if step == 5 and ATTEMPT == 1:\n    logs['loss'] = float('nan')")
    place.run()
    (decision,) = place.decisions()
    assert decision["code"] == "loss_not_finite"
    recipe = read_record(place.folder / "attempt-2.recipe.yaml", Recipe)
    assert recipe.lineage is not None
    assert recipe.lineage.newest_step == 4
    assert abs(float(str(recipe.settings["learning_rate"])) - 5e-3 / 3) < 1e-9
    place.require_rows()
    return "back to the checkpoint of step 4 with a third of the rate"


def disk_full(place: Place) -> str:
    """The disk of the checkpoints (tmpfs) is full while the third is written; for the resume it is larger."""
    place.prepare(settings={"keep_checkpoints": 4})
    (place.folder / "checkpoints").mkdir()
    size = sum(
        file.stat().st_size for file in (place.whole("full") / f"checkpoints/checkpoint-{STEPS}").rglob("*")
    )
    with mounted(place.folder / "checkpoints", f"size={int(size * 2.5)}") as mount:
        error = place.fails("disk")
        assert place.saved() == [2, 4], place.saved()
        mount("remount,size=1g")
        place.run(resume=True)
        place.require_equal()
    return f"“{error.message}”; the checkpoints of steps 2 and 4 stayed whole; resumed to the same bits"


def read_only(place: Place) -> str:
    """The disk of the checkpoints turns read-only at step 3, as after an error of the medium."""
    place.prepare()
    (place.folder / "checkpoints").mkdir()
    with mounted(place.folder / "checkpoints", "size=1g") as mount:
        error = place.fails("disk", on_event=at_step(3, lambda: mount("remount,ro")))
        mount("remount,rw")
        place.run(resume=True)
        place.require_equal()
    return f"“{error.message}”; resumed to the same bits"


def read_only_folder(place: Place) -> str:
    """The whole run folder is read-only (bind mount) from the beginning."""
    place.prepare()
    with mounted(place.folder, "bind", source=place.folder) as mount:
        mount("remount,bind,ro")
        error = place.fails("disk")
        mount("remount,bind,rw")
        place.run()
        place.require_equal()
    return f"“{error.message}” before anything began; written again, it trains to the same bits"


def kernel_kill(place: Place) -> str:
    """A cgroup of 400 MiB, in which the trainer asks for more at step 5: the kernel kills it."""
    place.prepare(
        at_step="if step == 5 and SET['micro_batch'] > 2:\n"
        "    reporter.held = [bytes([1]) * (1 << 24) for _ in range(64)]"
    )
    with cgroup(400 << 20) as group:
        place.use()
        pid = supervise(place.folder, before=lambda: join(group))
        assert ended(pid, within=None) == 0, (place.folder / "train.log").read_text()[-2000:]
        assert "oom_kill 1" in (group / "memory.oom_control").read_text()
    (decision,) = place.decisions()
    assert (decision["code"], decision["changes"]) == ("out_of_memory", {"micro_batch": 2})
    place.require_rows()
    return "taken for want of memory, since the kernel had counted it: two rows at a time from step 4"


def kill(place: Place) -> str:
    """SIGKILL from outside at step 5; the last line of the events and a newer checkpoint are then cut, the
    folder is moved."""
    place.prepare()
    pid: list[int] = []

    def told(event: Event) -> None:
        if event["event"] == "start":
            pid.append(event["pid"])
        elif event["event"] == "step" and event["step"] == 5:
            os.kill(pid[0], signal.SIGKILL)

    place.fails("killed", on_event=told)
    assert not place.decisions(), "a kill that the kernel did not count is somebody's wish"
    place.fails("folder_in_use")
    events = place.folder / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-20])
    newest = place.saved()[-1]
    half = place.folder / f"checkpoints/checkpoint-{newest + EVERY}"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(place.folder / f"checkpoints/checkpoint-{newest}", half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    place.folder = place.folder.rename(place.scratch / "moved")
    seen = place.run(resume=True)
    assert any(half.name in str(event.get("message")) for event in seen if event["event"] == "warning")
    place.require_equal()
    return f"error “killed”; the cut line and {half.name} passed over; resumed to the same bits"


def clock(place: Place) -> str:
    """The clock of the day jumps an hour ahead for the supervisor and to 1970 for the trainer."""
    place.prepare(at_step="if step == 4:\n    import time\n    time.time = lambda: 0.0")
    real, ahead = advisor.run.machine.time, [0.0]

    class Clock:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def time() -> float:
            return time.time() + ahead[0]

    def jump() -> None:
        ahead[0] = 3600.0
        time.sleep(2 * advisor.run.machine.LOOK_EVERY_SECONDS)

    advisor.run.machine.time = Clock  # type: ignore[assignment]
    try:
        place.run(on_event=at_step(3, jump))
    finally:
        advisor.run.machine.time = real
    assert [decision["code"] for decision in place.decisions()] == ["slept"]
    place.require_equal()
    return "said once, nothing else changed: the same bits"


def interrupt(place: Place) -> str:
    """Ctrl-C once at step 3 of a LoRA with dropout."""
    place.prepare(tuner="lora")
    place.fails("interrupted", on_event=at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    stopped = place.saved()[-1]
    assert 3 <= stopped < STEPS
    seen = place.run(resume=True)
    assert next(event["step"] for event in seen if event["event"] == "step") == stopped + 1
    place.require_equal("lora")
    assert not place.run(resume=True), "what is done is not trained again"
    return f"saved after step {stopped} and stopped, status 130; resumed to the same bits"


def interrupt_twice(place: Place) -> str:
    """Ctrl-C twice while step 5 does not end."""
    place.prepare(
        at_step="if step == 5 and not Path('again').exists():\n    import time\n    time.sleep(600)"
    )
    began = time.monotonic()

    def press(event: Event) -> None:
        if event["event"] == "note" and "Ctrl-C again" in event["message"]:
            os.kill(os.getpid(), signal.SIGINT)
        at_four(event)

    at_four = at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    place.fails("interrupted", on_event=press)
    assert time.monotonic() - began < 120
    (place.folder / "again").touch()
    place.run(resume=True)
    place.require_equal()
    return "ended at once, status 130; resumed from the checkpoint of step 4 to the same bits"


def supervisor_killed(place: Place) -> str:
    """SIGKILL to the supervisor while step 3 is made."""
    place.prepare(at_step="if step == 3:\n    import time\n    time.sleep(0.5)")
    place.use()
    pid = supervise(place.folder)
    while not any(
        e["event"] == "step" and e["step"] == 2 for e in read_events(place.folder / "events.jsonl")
    ):
        time.sleep(0.01)
    (trainer,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    ended(pid, within=None)
    began = time.monotonic()
    unlocked(place.folder)
    assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE
    seconds, stopped = time.monotonic() - began, place.saved()[-1]
    assert stopped < STEPS
    place.run(resume=True)
    place.require_equal()
    return f"the trainer saved step {stopped} and ended {seconds:.1f} s later; resumed to the same bits"


FAULTS = (
    memory_rungs, memory_real, nan, disk_full, read_only, read_only_folder, kernel_kill, kill, clock,
    interrupt, interrupt_twice, supervisor_killed,
)  # fmt: skip


# --- what they are made with -----------------------------------------------------------------------


@contextmanager
def mounted(place: Path, options: str, *, source: Path | None = None) -> Iterator[Callable[[str], None]]:
    """Mount a small disk (or a folder over itself) and yield what mounts it again with other options.

    Raises:
        NotHereError: this process may not mount.
    """

    def mount(given: str) -> None:
        what = [str(source or "tmpfs"), str(place)]
        kind = [] if source else ["-t", "tmpfs"]
        done = subprocess.run(
            ["mount", *kind, "-o", given, *what], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotHereError(f"mounting is not allowed: {done.stderr.strip()}")

    mount(options)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def cgroup(limit_bytes: int) -> Iterator[Path]:
    """Make a cgroup (version 1) with a limit of memory.

    Raises:
        NotHereError: there are none, or this process may not make one.
    """
    own = next(
        (
            line.split(":")[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if ":memory:" in line
        ),
        None,
    )
    group = CGROUPS / str(own).strip("/") / f"faults-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as problem:
        raise NotHereError(f"no cgroup of version 1 can be made: {problem.strerror}") from problem
    try:
        yield group
    finally:
        group.rmdir()


def join(group: Path) -> None:
    """Put this process into a cgroup."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def measure(fault: Callable[[Place], str], place: Place) -> Row:
    """Put one fault into a run and say what came of it."""
    began = cpu_seconds()
    try:
        outcome, passed = fault(place), True
    except NotHereError as reason:
        outcome, passed = str(reason), None
    except (AssertionError, AdvisorError) as wrong:
        outcome, passed = f"{type(wrong).__name__}: {wrong}", False
    outcome = outcome.replace(f"{place.scratch}/", "")
    words = " ".join((fault.__doc__ or "").split())
    spent = round(cpu_seconds() - began, 1)
    return Row(name=fault.__name__, fault=words, outcome=outcome, passed=passed, cpu_seconds=spent)


def cpu_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def table(found: list[Row]) -> str:
    """Return the table with what it was measured on."""
    versions = installed_packages()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    cpu, _ = cpu_identity(Path("/proc"))
    words = {True: "yes", False: "NO", None: "not made here"}
    lines = [
        "# Faults put into real runs", "",
        f"{datetime.date.today()}, {named}; {cpu}; tiny random Llama, {STEPS} steps, "
        f"a checkpoint every {EVERY}.",
        "`python benchmarks/faults.py`", "",
        "| fault | what was done | what came of it | right | CPU s |", "|---|---|---|---|---|",
        *(
            f"| {row.name} | {row.fault} | {row.outcome} | {words[row.passed]} | {row.cpu_seconds} |"
            for row in found
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the faults that were asked for and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(fault.__name__ for fault in FAULTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a fault, and no table")
    given = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.__name__ in given.only.split(",")]
    load_libraries()
    fork_programs()
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model", hidden=128)

        @functools.cache
        def whole(tuner: str) -> Path:
            """Train without a fault, when that is first asked for."""
            undisturbed = Place(Path(scratch), model, f"whole-{tuner}", whole)
            undisturbed.prepare(tuner=tuner)
            undisturbed.run()
            return undisturbed.folder

        for fault in chosen:
            found.append(measure(fault, Place(Path(scratch), model, fault.__name__, whole)))
            row = found[-1]
            print(json.dumps(msgspec.structs.asdict(row)), flush=True)
    if not given.json:
        target = given.out or HERE / "results" / f"faults-{datetime.date.today()}.md"
        target.write_text(table(found), encoding="utf-8")
        print(table(found))
    sys.exit(any(row.passed is False for row in found))


if __name__ == "__main__":
    main()
