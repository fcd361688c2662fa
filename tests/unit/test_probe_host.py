"""Cores, instruction sets, memory and disk, read from made-up /proc and /sys folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.probe import host
from advisor.probe.hardware import Machine, amd_accelerators, apple_accelerator, probe_hardware
from tests.unit.probe_knowledge import small_knowledge

KIB, GIB = 1024, 1024**3
MACHINE_BYTES = 64 * GIB


class Roots:
    """A /proc and a /sys below one folder, of a machine with 64 GiB of which 50 are available."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.cgroups = self.sys / "fs" / "cgroup"
        self.write(
            self.proc / "meminfo",
            f"MemTotal: {MACHINE_BYTES // KIB} kB\nMemFree: 1000 kB\nMemAvailable: {50 * GIB // KIB} kB\n",
        )

    def write(self, path: Path, text: str) -> None:
        """Write a file and its folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def belong_to(self, *lines: str) -> None:
        """Say which cgroups the process belongs to."""
        self.write(self.proc / "self" / "cgroup", "".join(f"{line}\n" for line in lines))

    def memory(self) -> tuple[int, int]:
        """Return what the probe reads."""
        return host.memory(self.proc, self.sys)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """Return made-up roots without cgroups."""
    return Roots(tmp_path)


def test_memory_without_cgroups(roots: Roots) -> None:
    """Without a limit the machine's own figures hold."""
    assert roots.memory() == (64 * GIB, 50 * GIB)


def test_memory_on_a_kernel_without_memavailable(roots: Roots) -> None:
    """Where the kernel does not say what is available, unused memory and file cache are."""
    roots.write(roots.proc / "meminfo", "MemTotal: 1000 kB\nMemFree: 200 kB\nCached: 300 kB\n")
    assert roots.memory() == (1000 * KIB, 500 * KIB)


def test_memory_without_proc(tmp_path: Path) -> None:
    """Where there is no /proc/meminfo, the system is asked in another way."""
    total, free = host.memory(tmp_path, tmp_path)
    assert total >= free > 0


def test_version_2_limit_and_what_is_free_under_it(roots: Roots) -> None:
    """A limit of 16 GiB with 6 in use, of which 2 are file cache, leaves 12 GiB."""
    roots.belong_to("0::/")
    roots.write(roots.cgroups / "memory.max", f"{16 * GIB}\n")
    roots.write(roots.cgroups / "memory.current", f"{6 * GIB}\n")
    roots.write(roots.cgroups / "memory.stat", f"anon {4 * GIB}\ninactive_file {2 * GIB}\n")
    assert roots.memory() == (16 * GIB, 12 * GIB)


def test_memory_high_limits_too(roots: Roots) -> None:
    """A process above memory.high is slowed to a crawl, so it counts as the limit."""
    roots.belong_to("0::/")
    roots.write(roots.cgroups / "memory.max", "max\n")
    roots.write(roots.cgroups / "memory.high", f"{8 * GIB}\n")
    assert roots.memory()[0] == 8 * GIB


def test_version_1_limit(roots: Roots) -> None:
    """A version 1 group is read by its own file names, below its controller's folder."""
    roots.belong_to("5:cpu,cpuacct:/job", "4:memory:/job", "0::/job")
    job = roots.cgroups / "memory" / "job"
    roots.write(job / "memory.limit_in_bytes", f"{10 * GIB}\n")
    roots.write(job / "memory.usage_in_bytes", f"{3 * GIB}\n")
    roots.write(job / "memory.stat", f"total_inactive_file {1 * GIB}\nhierarchical_memory_limit {9 * GIB}\n")
    assert roots.memory() == (9 * GIB, 7 * GIB)


def test_version_1_without_a_limit(roots: Roots) -> None:
    """The huge number that version 1 writes for no limit is none."""
    roots.belong_to("4:memory:/")
    roots.write(roots.cgroups / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    roots.write(roots.cgroups / "memory" / "memory.usage_in_bytes", "12345678\n")
    assert roots.memory() == (64 * GIB, 50 * GIB)


def test_a_host_path_that_does_not_exist_in_the_container(roots: Roots) -> None:
    """In a container the mount's root is the container's own group, whatever path /proc names."""
    roots.belong_to("0::/docker/0123456789abcdef")
    roots.write(roots.cgroups / "memory.max", f"{2 * GIB}\n")
    roots.write(roots.cgroups / "cpu.max", "150000 100000\n")
    assert roots.memory()[0] == 2 * GIB
    assert host.cpu_quota(roots.proc, roots.sys) == 1.5


def test_more_in_use_than_the_limit_leaves_nothing(roots: Roots) -> None:
    """A group over its limit has no free memory, not a negative amount."""
    roots.belong_to("0::/")
    roots.write(roots.cgroups / "memory.max", f"{1 * GIB}\n")
    roots.write(roots.cgroups / "memory.current", f"{2 * GIB}\n")
    assert roots.memory() == (1 * GIB, 0)


LIMITS = st.lists(st.one_of(st.none(), st.integers(1, 128)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(LIMITS, st.booleans())
def test_the_smallest_limit_up_the_path_holds(limits: list[int | None], second: bool) -> None:
    """Of nested groups the smallest memory limit and CPU quota count; `max` and -1 are none."""
    with tempfile.TemporaryDirectory() as folder:
        roots = Roots(Path(folder))
        path = "".join(f"/g{i}" for i in range(1, len(limits)))
        roots.belong_to(f"0::{path or '/'}" if second else f"3:memory,cpu:{path or '/'}")
        group = roots.cgroups if second else roots.cgroups / "memory,cpu"
        for depth, limit in enumerate(limits):
            group = group / f"g{depth}" if depth else group
            if second:
                roots.write(group / "memory.max", f"{limit * GIB if limit else 'max'}\n")
                roots.write(group / "cpu.max", f"{limit * 50000 if limit else 'max'} 100000\n")
            else:
                roots.write(group / "memory.limit_in_bytes", f"{limit * GIB if limit else 2**63 - 4096}\n")
                roots.write(group / "cpu.cfs_quota_us", f"{limit * 50000 if limit else -1}\n")
                roots.write(group / "cpu.cfs_period_us", "100000\n")
        given_limits = [limit for limit in limits if limit]
        assert roots.memory()[0] == min([64, *given_limits]) * GIB
        assert host.cpu_quota(roots.proc, roots.sys) == (min(given_limits) / 2 if given_limits else None)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_odd_files_never_fail(text: str) -> None:
    """Whatever stands in these files, there is an answer."""
    with tempfile.TemporaryDirectory() as folder:
        roots = Roots(Path(folder))
        for path in (
            roots.proc / "self" / "cgroup", roots.proc / "cpuinfo", roots.cgroups / "memory.max",
            roots.cgroups / "cpu.max", roots.cgroups / "memory.stat",
        ):  # fmt: skip
            roots.write(path, text)
        total, free = roots.memory()
        assert total >= free >= 0
        assert host.cpu_cores(roots.proc, roots.sys) >= 1
        host.cpu_identity(roots.proc)


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("max", None)])
def test_a_quota_lowers_the_cores(roots: Roots, quota: str, cores: int | None) -> None:
    """Half a core still counts as one; without a quota the affinity holds."""
    roots.belong_to("0::/")
    roots.write(roots.cgroups / "cpu.max", f"{quota} 100000\n")
    assert host.cpu_cores(roots.proc, roots.sys) == (cores or len(os.sched_getaffinity(0)))


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_lowers_the_cores(tmp_path: Path) -> None:
    """A process bound to one core has one core."""
    program = (
        "import os, pathlib; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from advisor.probe import host; p = pathlib.Path('/nowhere'); print(host.cpu_cores(p, p))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"


def test_processor_name_and_instruction_sets(roots: Roots) -> None:
    """The first processor's name and those of its flags that matter are reported, whole words only."""
    roots.write(
        roots.proc / "cpuinfo",
        "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n"
        "flags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: amx_int8\n",
    )
    assert host.cpu_identity(roots.proc) == (
        "Intel(R) Xeon(R) Platinum 8481C",
        ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    )


def test_processor_without_cpuinfo(tmp_path: Path) -> None:
    """Without /proc/cpuinfo no instruction set is claimed."""
    assert host.cpu_identity(tmp_path)[1] == ()


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """The free space of a path to be made is that of its nearest existing parent, and the path is kept."""
    later = tmp_path / "runs" / "first"
    found = host.volume("output", later)
    assert found.path == str(later)
    assert found.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)


def test_disk_of_odd_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a loop of links and a path below a file have an answer, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for path in (Path("runs"), tmp_path / "loop" / "x", tmp_path / "file" / "below"):
        assert host.volume("cache", path).free_bytes > 0


def test_disk_behind_a_link_to_a_folder_to_be_made(tmp_path: Path) -> None:
    """A link that points to nothing yet is followed: the space is where it points."""
    if shutil.disk_usage("/dev/shm").total == shutil.disk_usage(tmp_path).total:
        pytest.skip("needs two file systems")
    (tmp_path / "link").symlink_to("/dev/shm/ftadvisor-not-there")
    assert host.volume("cache", tmp_path / "link").free_bytes == shutil.disk_usage("/dev/shm").free


def amd_card(roots: Roots, number: int, total_gib: float, used_gib: float, name: str = "") -> None:
    """Add an AMD card to /sys/class/drm."""
    device = roots.sys / "class" / "drm" / f"card{number}" / "device"
    roots.write(device / "vendor", "0x1002\n")
    roots.write(device / "device", "0x744c\n")
    roots.write(device / "mem_info_vram_total", f"{int(total_gib * GIB)}\n")
    roots.write(device / "mem_info_vram_used", f"{int(used_gib * GIB)}\n")
    roots.write(device / "product_name", f"{name}\n")


def test_amd_cards_and_the_unit_inside_the_processor(roots: Roots) -> None:
    """AMD cards come with memory from /sys; a unit with little memory of its own is only a finding."""
    amd_card(roots, 0, 0.5, 0.1)
    amd_card(roots, 1, 24, 4, "AMD Radeon RX 7900 XTX")
    connector = roots.sys / "class" / "drm" / "card1-DP-1"
    connector.mkdir()
    (connector / "device").symlink_to("../card1")  # as the kernel does it
    (card,), (finding,) = amd_accelerators(roots.sys, small_knowledge())
    assert (card.vendor, card.memory_bytes, card.free_bytes) == ("amd", 24 * GIB, 20 * GIB)
    assert (card.kb_id, card.supports_bf16) == ("rx-7900-xtx", True)
    assert finding.code == "integrated_gpu_ignored"


def test_an_amd_card_without_a_name(roots: Roots) -> None:
    """A card that /sys has no name for is called by its device number and not taken for a known one."""
    amd_card(roots, 0, 16, 0)
    (card,), findings = amd_accelerators(roots.sys, small_knowledge())
    assert (card.name, card.kb_id, card.supports_bf16, findings) == ("AMD GPU 0x744c", None, True, [])


def test_apple_chip_shares_the_memory() -> None:
    """An Apple chip has the computer's memory, of which it may use three quarters; an Intel Mac has none."""
    chip = apple_accelerator("Apple M2 Pro", 32 * GIB, 20 * GIB, small_knowledge())
    assert chip is not None
    assert (chip.vendor, chip.memory_bytes, chip.free_bytes) == ("apple", 32 * GIB, 20 * GIB)
    idle = apple_accelerator("Apple M2 Pro", 32 * GIB, 31 * GIB, small_knowledge())
    assert idle is not None
    assert idle.free_bytes == 24 * GIB
    assert (chip.kb_id, chip.supports_bf16) == ("apple-m2-pro", True)
    assert apple_accelerator("Intel(R) Core(TM) i9", 32 * GIB, 20 * GIB, small_knowledge()) is None


def test_the_whole_probe_on_made_up_roots(roots: Roots) -> None:
    """One call reads the folders it was given and reports both volumes; equal AMD cards are one record."""
    amd_card(roots, 0, 24, 4, "AMD Radeon RX 7900 XTX")
    amd_card(roots, 1, 24, 9, "AMD Radeon RX 7900 XTX")
    roots.belong_to("0::/")
    roots.write(roots.cgroups / "memory.max", f"{16 * GIB}\n")
    machine = Machine(proc=roots.proc, sys=roots.sys)
    found = probe_hardware(output=roots.proc, cache=roots.sys, machine=machine, knowledge=small_knowledge())
    assert found.ram_bytes == 16 * GIB
    amd = [item for item in found.accelerators if item.vendor == "amd"]
    assert [(item.count, item.free_bytes) for item in amd] == [(2, 15 * GIB)]
    assert [volume.role for volume in found.volumes] == ["output", "cache"]
    assert found.origin == "probed"


def test_the_probe_loads_no_heavy_package() -> None:
    """Probing imports neither torch nor numpy nor pynvml into this process."""
    program = (
        "import json, sys; from pathlib import Path; from advisor.probe.hardware import probe_hardware;"
        "from advisor.probe.software import look_around;"
        "from tests.unit.probe_knowledge import small_knowledge;"
        "probe_hardware(output=Path('.'), cache=Path('.'), knowledge=small_knowledge()); look_around();"
        "print(json.dumps([n for n in ('torch', 'numpy', 'transformers', 'pynvml') if n in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert json.loads(ran.stdout) == []


def test_kills_for_want_of_memory_are_counted_where_they_happen(roots: Roots) -> None:
    """The machine's count without a cgroup; with some, those on the way down to the process's own."""
    assert host.oom_kills(roots.proc, roots.sys) is None
    roots.write(roots.proc / "vmstat", "pgfault 7\noom_kill 9\n")
    assert host.oom_kills(roots.proc, roots.sys) == 9
    roots.belong_to("4:memory:/jobs/mine")
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
    for place, kills in (("", 0), ("jobs/mine", 2), ("jobs/other", 5)):
        roots.write(roots.cgroups / "memory" / place / "memory.oom_control", control.format(kills))
    assert host.oom_kills(roots.proc, roots.sys) == 2
    roots.belong_to("0::/mine")
    roots.write(roots.cgroups / "mine" / "memory.events", "low 0\noom 4\noom_kill 3\n")
    assert host.oom_kills(roots.proc, roots.sys) == 3
