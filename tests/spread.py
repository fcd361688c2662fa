"""Runs a run folder in several processes that are copies of this one, so that no library is loaded again.

Goes in: a run folder. Comes out: the exit status of each process. Never does: leave a process behind.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import run_here

WAIT_SECONDS = 120.0


def run_spread(folder: Path, *, first: Callable[[int], None] = lambda _: None) -> list[int | None]:
    """Train a folder's recipe in two processes that find each other as the supervisor's do.

    Args:
        folder: with recipe.yaml for two processes.
        first: called in each process with its number before it trains.

    Returns:
        Exit statuses; a process that did not end by itself is killed and has a negative one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(folder, number, port, first)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(WAIT_SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def _child(folder: Path, number: int, port: int, first: Callable[[int], None]) -> None:
    """Become one of the processes; whatever the parent knew of devices is forgotten."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = os.open(folder / "train.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    first(number)
    os._exit(run_here(folder))


def shard_on_cpu(number: int) -> None:
    """Let accelerate shard with FSDP2 between CPU processes, which it would silently run as DDP.

    All that is changed is the type that accelerate settles on, and that gathered weights are waited for,
    which on an accelerator the copy to the host does. Sharding, training, checkpoints and gathering are the
    libraries' own.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, DistributedType

    begin, gather = AcceleratorState.__init__, Accelerator.get_state_dict

    def settle(self: Any, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **rest)
        plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    def gather_and_wait(self: Any, *args: Any, **rest: Any) -> dict[str, Any]:
        return {name: value.clone() for name, value in gather(self, *args, **rest).items()}

    AcceleratorState.__init__ = settle
    Accelerator.get_state_dict = gather_and_wait
