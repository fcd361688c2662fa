"""Which NVIDIA GPUs may this process use, and if none, why?

Goes in: the environment, the memory of the computer (for GPUs that share it), the knowledge base. Comes out:
single accelerators and findings. Never does: load the driver's library itself (a child does, under a time
limit, so that a hung or crashing driver costs a finding), fail.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from advisor.knowledge import Knowledge
from advisor.probe.accelerators import match_accelerator, nvidia_bf16
from advisor.types import Accelerator, Finding, Record

CHILD = Path(__file__).with_name("nvml_child.py")
_KILL_SECONDS = 1.0


class Problem(Record, frozen=True, kw_only=True):
    """Why the driver, or one GPU, gave no answer."""

    problem: str
    detail: str = ""
    index: int = -1


class Device(Record, frozen=True, kw_only=True):
    """A GPU or a MIG instance, as the child reports it."""

    index: int = -1
    uuid: str
    name: str
    total_bytes: int | None = None
    """None for a GPU that shares the computer's memory, and for a divided one."""
    free_bytes: int | None = None
    compute_capability: str
    instances: tuple[Device, ...] | None = None
    """MIG instances; None when the GPU is not divided."""


class Answer(Record, frozen=True, kw_only=True):
    """All that the child found out."""

    driver: str = ""
    devices: tuple[Device, ...] = ()
    lost: tuple[Problem, ...] = ()
    failure: Problem | None = None


_EXPLAINED = {
    "library_not_found": (
        "nvidia_driver_missing",
        "No NVIDIA driver library (libnvidia-ml.so.1) was found.",
        "If this machine has an NVIDIA GPU: install its driver; in a container, start it with GPU access.",
    ),
    "driver_not_loaded": (
        "nvidia_driver_not_loaded",
        "The NVIDIA driver is installed but not loaded.",
        "Load it (sudo modprobe nvidia) or restart the machine; then: nvidia-smi",
    ),
    "no_permission": (
        "nvidia_no_permission",
        "The NVIDIA driver refuses this user or container access.",
        "Check the rights on /dev/nvidia* (often: join the group video); start a container with GPU access.",
    ),
    "version_mismatch": (
        "nvidia_version_mismatch",
        "The NVIDIA driver library and the loaded kernel module have different versions.",
        "The driver was updated while it ran: restart the machine.",
    ),
    "gpu_lost": (
        "nvidia_gpu_lost",
        "The GPU has fallen off the bus.",
        "Restart the machine; if it comes back, check power, cooling and the slot (dmesg names an Xid).",
    ),
    "hung": (
        "nvidia_driver_hung",
        "The NVIDIA driver does not answer.",
        "Restart the machine, or find what blocks the driver: sudo dmesg | grep -i nvrm",
    ),
    "crashed": (
        "nvidia_driver_crashed",
        "The NVIDIA driver library crashed when it was asked.",
        "Install the driver again; nvidia-smi should run first.",
    ),
}
_OTHER = (
    "nvidia_query_failed",
    "The NVIDIA driver could not be asked.",
    "See whether nvidia-smi runs, and what it says.",
)


def nvidia_accelerators(
    *,
    sys_root: Path,
    environment: Mapping[str, str],
    timeout_seconds: float,
    ram: tuple[int, int],
    knowledge: Knowledge,
) -> tuple[list[Accelerator], list[Finding]]:
    """Return the GPUs and MIG instances that CUDA would show this process, one record each, and findings.

    Args:
        sys_root: the root of /sys, to tell "no card" from "card without a driver".
        environment: variables of the process; CUDA_VISIBLE_DEVICES is obeyed.
        timeout_seconds: how long the driver may take.
        ram: total and free memory of the computer in bytes, for GPUs that share it.
        knowledge: the knowledge base.
    """
    answer = ask_driver(environment=environment, timeout_seconds=timeout_seconds)
    if answer.failure is not None:
        return [], [explain(answer.failure, card_seen=_card_on_bus(sys_root))]
    findings = [explain(problem, card_seen=True) for problem in answer.lost]
    usable, more = usable_devices(answer.devices, environment)
    accelerators = [
        _accelerator(device, answer.driver, ram, knowledge, mig=device.index < 0) for device in usable
    ]
    return accelerators, findings + more


def ask_driver(*, environment: Mapping[str, str], timeout_seconds: float) -> Answer:
    """Run the child and return its answer; every way in which that fails is an `Answer` with a failure."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(environment),
        )  # fmt: skip
    except OSError as problem:
        return _failed("other", str(problem))
    try:
        output, errors = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return _failed("hung", f"It was given {timeout_seconds:g} s.")
    finally:
        _end(child)
    last = (output.splitlines() or [b""])[-1]  # a driver library may write to standard output, too
    if child.returncode < 0:
        return _failed("crashed", f"It was ended by signal {-child.returncode}.")
    try:
        return msgspec.json.decode(last, type=Answer)
    except msgspec.DecodeError:
        return _failed("other", (errors.decode(errors="replace").splitlines() or ["It said nothing."])[-1])


def usable_devices(
    devices: Sequence[Device], environment: Mapping[str, str]
) -> tuple[list[Device], list[Finding]]:
    """Return the devices that CUDA shows under CUDA_VISIBLE_DEVICES, divided GPUs as their instances."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    shown = list(devices) if wanted is None else _visible(wanted, devices)
    usable = [
        part for device in shown for part in (device.instances if device.instances is not None else [device])
    ]
    findings = []
    hidden = sum(1 for device in devices if not _reached(device, shown))
    if hidden:
        findings.append(
            Finding(
                code="nvidia_gpu_hidden",
                severity="info" if usable else "warning",
                message=f"CUDA_VISIBLE_DEVICES={wanted!r} hides {hidden} of {len(devices)} GPUs.",
                count=hidden,
                remedy="To use them: unset CUDA_VISIBLE_DEVICES",
            )
        )
    findings += _mig_findings(shown, usable) + _mixed_finding(devices, shown, environment)
    return usable, findings


def explain(problem: Problem, *, card_seen: bool) -> Finding:
    """Turn a problem into a finding; without a card in sight a missing driver is no more than information."""
    code, message, remedy = _EXPLAINED.get(problem.problem, _OTHER)
    absent = problem.problem in ("library_not_found", "driver_not_loaded") and not card_seen
    where = f"GPU {problem.index} is not used. " if problem.index >= 0 else ""
    said = f" {problem.detail}" if problem.detail and problem.problem in ("hung", "crashed", "other") else ""
    return Finding(
        code=code,
        severity="info" if absent else "warning",
        message=f"{where}{message}{said}",
        remedy=remedy,
    )


def _failed(problem: str, detail: str) -> Answer:
    return Answer(failure=Problem(problem=problem, detail=detail))


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child if it still runs; one that the kernel holds cannot be killed and is left behind."""
    if child.poll() is None:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_KILL_SECONDS)
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _card_on_bus(sys_root: Path) -> bool:
    for vendor in sys_root.glob("bus/pci/devices/*/vendor"):
        try:
            if vendor.read_text().strip() == "0x10de" and (
                vendor.with_name("class").read_text().startswith("0x03")
            ):
                return True
        except OSError:
            continue
    return False


def _visible(wanted: str, devices: Sequence[Device]) -> list[Device]:
    """Apply CUDA's rules: the list ends at the first entry that names no device; a doubled one empties it."""
    shown: list[Device] = []
    for entry in (part.strip() for part in wanted.split(",")):
        found = _named(entry, devices)
        if found is None:
            break
        if found in shown:
            return []
        shown.append(found)
    return shown


def _named(entry: str, devices: Sequence[Device]) -> Device | None:
    if entry.isascii() and entry.isdigit():
        return next((device for device in devices if device.index == int(entry)), None)
    if not entry.upper().startswith(("GPU-", "MIG-")):
        return None
    instances = [part for device in devices for part in device.instances or ()]
    hits = [item for item in (*devices, *instances) if item.uuid.lower().startswith(entry.lower())]
    return hits[0] if len(hits) == 1 else None


def _reached(device: Device, shown: Sequence[Device]) -> bool:
    return device in shown or any(part in shown for part in device.instances or ())


def _mig_findings(shown: Sequence[Device], usable: Sequence[Device]) -> list[Finding]:
    findings = []
    empty = [device for device in shown if device.instances == ()]
    if empty:
        findings.append(
            Finding(
                code="nvidia_mig_without_instance",
                severity="warning",
                message="MIG is on but no instance was made: " + ", ".join(f"GPU {d.index}" for d in empty),
                count=len(empty),
                remedy="Make instances (nvidia-smi mig -cgi ... -C) or turn it off (nvidia-smi -mig 0).",
            )
        )
    instances = [device for device in usable if device.index < 0]
    if len(instances) > 1:
        findings.append(
            Finding(
                code="nvidia_mig_one_at_a_time",
                severity="info",
                message=f"A process can use only one of the {len(instances)} MIG instances: the first.",
                count=len(instances),
                remedy=f"To choose: CUDA_VISIBLE_DEVICES={instances[0].uuid}",
            )
        )
    return findings


def _mixed_finding(
    devices: Sequence[Device], shown: Sequence[Device], environment: Mapping[str, str]
) -> list[Finding]:
    """Tell of different GPUs: which of them CUDA calls 0 depends on CUDA_DEVICE_ORDER."""
    mixed = len({device.name for device in shown}) > 1
    numbered = any(part.strip().isdigit() for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(","))
    unsure = numbered and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if not mixed and not (unsure and len({device.name for device in devices}) > 1):
        return []
    largest = max(shown or devices, key=lambda device: device.total_bytes or 0)
    return [
        Finding(
            code="nvidia_mixed_gpus",
            severity="info",
            message="The GPUs differ (" + ", ".join(dict.fromkeys(device.name for device in devices)) + "); "
            "CUDA may number them otherwise than the driver.",
            remedy=f"To use only the {largest.name}: CUDA_VISIBLE_DEVICES={largest.uuid}",
        )
    ]


def _accelerator(
    device: Device, driver: str, ram: tuple[int, int], knowledge: Knowledge, *, mig: bool
) -> Accelerator:
    own = device.total_bytes if device.total_bytes is not None else ram[0]
    free = device.free_bytes if device.free_bytes is not None else ram[1]
    # The name of a MIG instance is its card's; its memory says nothing about which card that is.
    key = match_accelerator(device.name, None if mig else own, knowledge)
    return Accelerator(
        name=device.name,
        vendor="nvidia",
        memory_bytes=own,
        free_bytes=free,
        compute_capability=device.compute_capability,
        supports_bf16=nvidia_bf16(device.compute_capability, knowledge),
        kb_id=key,
        driver=driver,
        mig=mig,
    )
