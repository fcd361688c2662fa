"""What machine is this: accelerators with free memory, cores, instruction sets, memory, disk?

Goes in: the output and cache paths, and where to look. Comes out: `Hardware`; whatever could not be found
out is a finding. Never does: import torch, wait without end, fail because of a driver.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from advisor.knowledge import Knowledge, load
from advisor.probe import host
from advisor.probe.accelerators import grouped, match_accelerator
from advisor.probe.nvidia import nvidia_accelerators
from advisor.types import Accelerator, Finding, Hardware, Record
from advisor.units import format_bytes, from_gib


class Machine(Record, frozen=True, kw_only=True):
    """Where the probe looks; the defaults are this machine."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    environment: dict[str, str] | None = None
    """Variables that decide which GPUs are seen; None: those of this process."""
    driver_timeout_seconds: float = 20.0
    """A server with eight GPUs and no persistence daemon needs over ten seconds to wake them."""


def probe_hardware(
    *, output: Path, cache: Path, machine: Machine | None = None, knowledge: Knowledge | None = None
) -> Hardware:
    """Return what this process can use of this machine.

    Args:
        output: where runs are written; need not exist yet.
        cache: where downloaded models are kept; need not exist yet.
        machine: where to look; this machine by default.
        knowledge: the knowledge base that names accelerators; the installed one by default.

    Raises:
        KnowledgeError: the knowledge base cannot be read.
    """
    machine = machine or Machine()
    knowledge = knowledge or load()
    ram_bytes, ram_free_bytes = host.memory(machine.proc, machine.sys)
    cpu_name, cpu_features = host.cpu_identity(machine.proc)
    found: list[Accelerator] = []
    findings: list[Finding] = []
    if platform.system() == "Darwin":
        found += _apple(ram_bytes, ram_free_bytes, knowledge)
    else:
        found, findings = nvidia_accelerators(
            sys_root=machine.sys,
            environment=dict(os.environ) if machine.environment is None else machine.environment,
            timeout_seconds=machine.driver_timeout_seconds,
            ram=(ram_bytes, ram_free_bytes),
            knowledge=knowledge,
        )
        amd, more = amd_accelerators(machine.sys, knowledge)
        found, findings = found + amd, findings + more
    return Hardware(
        accelerators=grouped(found),
        ram_bytes=ram_bytes,
        ram_free_bytes=ram_free_bytes,
        cpu_cores=host.cpu_cores(machine.proc, machine.sys),
        cpu_name=cpu_name,
        cpu_features=cpu_features,
        volumes=(host.volume("output", output), host.volume("cache", cache)),
        os=host.operating_system(),
        findings=tuple(findings),
    )


def amd_accelerators(sys_root: Path, knowledge: Knowledge) -> tuple[list[Accelerator], list[Finding]]:
    """Return AMD cards by what the amdgpu kernel driver shows under /sys/class/drm.

    A graphics unit inside the processor, told by its little memory, is only a finding.
    """
    rules = knowledge.rules["platform"]
    accelerators: list[Accelerator] = []
    findings: list[Finding] = []
    for folder in sorted(sys_root.glob("class/drm/card*/device")):
        total = _number(folder / "mem_info_vram_total")
        if _text(folder / "vendor") != "0x1002" or total is None:
            continue
        name = _text(folder / "product_name") or f"AMD GPU {_text(folder / 'device')}".strip()
        if total < from_gib(knowledge.rules["probe"]["integrated_gpu"]["below_gib"]):
            findings.append(
                Finding(
                    code="integrated_gpu_ignored",
                    severity="info",
                    message=f"{name} has only {format_bytes(total)} of its own memory and is not used.",
                )
            )
            continue
        key = match_accelerator(name, total, knowledge)
        accelerators.append(
            Accelerator(
                name=name,
                vendor="amd",
                memory_bytes=total,
                free_bytes=max(0, total - (_number(folder / "mem_info_vram_used") or 0)),
                supports_bf16=knowledge.accelerators[key].bf16 if key else bool(rules["amd"]["bf16"]),
                kb_id=key,
                driver=_text(sys_root / "module" / "amdgpu" / "version") or None,
            )
        )
    return accelerators, findings


def apple_accelerator(
    chip: str, ram_bytes: int, ram_free_bytes: int, knowledge: Knowledge
) -> Accelerator | None:
    """Return the GPU of an Apple chip; None for an Intel Mac.

    It shares the computer's memory, of which macOS lets it use a part; a chip that kb/hardware does not know
    is a newer one, and those have bfloat16.
    """
    if not chip.startswith("Apple"):
        return None
    key = match_accelerator(chip, None, knowledge)
    share = float(knowledge.rules["platform"]["apple"]["memory_share"])
    return Accelerator(
        name=chip,
        vendor="apple",
        memory_bytes=ram_bytes,
        free_bytes=min(ram_free_bytes, round(share * ram_bytes)),
        supports_bf16=knowledge.accelerators[key].bf16 if key else True,
        kb_id=key,
    )


def _apple(ram_bytes: int, ram_free_bytes: int, knowledge: Knowledge) -> list[Accelerator]:
    try:
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = apple_accelerator(asked.stdout.strip(), ram_bytes, ram_free_bytes, knowledge)
    return [found] if found is not None else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None
