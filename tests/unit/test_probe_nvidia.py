"""The NVIDIA probe against a stand-in driver library that is built here and loaded as the real one is."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.probe.hardware import Machine, probe_hardware
from advisor.probe.nvidia import Device, usable_devices
from advisor.types import Finding, Hardware
from tests.unit.probe_knowledge import small_knowledge

MIB, GIB = 1024**2, 1024**3
RTX_3060 = "NVIDIA GeForce RTX 3060|GPU-30600000-aaaa|12288|3072|8.6|0"
RTX_4090 = "NVIDIA GeForce RTX 4090|GPU-40900000-bbbb|24564|100|8.9|0"
A100_DIVIDED = "NVIDIA A100-SXM4-40GB|GPU-a1000000-cccc|40960|0|8.0|1"
TESLA_T4 = "Tesla T4|GPU-00040000-dddd|15360|0|7.5|0"
INSTANCES = ";".join(
    [
        "0|NVIDIA A100-SXM4-40GB MIG 1g.5gb|MIG-11111111|4864|10",
        "0|NVIDIA A100-SXM4-40GB MIG 1g.5gb|MIG-22222222|4864|500",
        "0|NVIDIA A100-SXM4-40GB MIG 3g.20gb|MIG-33333333|19968|20",
    ]
)

Probe = Callable[..., Hardware]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the stand-in and return its folder."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler to build the stand-in with")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return folder


@pytest.fixture
def probe(stand_in: Path, tmp_path: Path) -> Probe:
    """Probe with the stand-in; keywords are its variables, without their FAKE_NVML_."""

    def run(*, timeout: float = 20.0, visible: str | None = None, **said: str) -> Hardware:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        environment["LD_LIBRARY_PATH"] = str(stand_in)
        environment |= {f"FAKE_NVML_{key.upper()}": value for key, value in said.items()}
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        machine = Machine(sys=tmp_path / "sys", environment=environment, driver_timeout_seconds=timeout)
        return probe_hardware(output=tmp_path, cache=tmp_path, machine=machine, knowledge=small_knowledge())

    return run


def codes(findings: tuple[Finding, ...] | list[Finding]) -> list[str]:
    """Return the findings' codes."""
    return [finding.code for finding in findings]


def test_one_card_in_use(probe: Probe) -> None:
    """A card with 3 of 12 GiB in use is reported with its total and its free memory."""
    found = probe(devices=RTX_3060)
    assert found.findings == ()
    (card,) = found.accelerators
    assert (card.name, card.vendor, card.count) == ("NVIDIA GeForce RTX 3060", "nvidia", 1)
    assert (card.memory_bytes, card.free_bytes) == (12 * GIB, 9 * GIB)
    assert (card.compute_capability, card.supports_bf16, card.driver) == ("8.6", True, "570.1")
    assert (card.kb_id, card.mig) == ("rtx-3060", False)


def test_equal_cards_are_one_record_with_the_free_memory_of_the_fullest(probe: Probe) -> None:
    """Eight equal cards are one record; what is free is what is free on the fullest."""
    cards = [f"NVIDIA H100 80GB HBM3|GPU-{i}|81559|{70 * i}|9.0|0" for i in range(8)]
    (group,) = probe(devices=";".join(cards)).accelerators
    assert (group.count, group.kb_id) == (8, "h100-sxm")
    assert group.memory_bytes == 81559 * MIB
    assert group.free_bytes == (81559 - 490) * MIB


def test_a_divided_card_is_its_instances(probe: Probe) -> None:
    """With MIG on, the instances are the accelerators, each with its own memory and its card's capability."""
    found = probe(devices=A100_DIVIDED, instances=INSTANCES)
    large, small = found.accelerators
    assert (large.count, large.memory_bytes, large.mig) == (1, 19968 * MIB, True)
    assert (small.count, small.memory_bytes, small.free_bytes) == (2, 4864 * MIB, 4364 * MIB)
    assert {item.kb_id for item in (large, small)} == {"a100-40gb"}
    assert {item.compute_capability for item in (large, small)} == {"8.0"}
    assert codes(found.findings) == ["nvidia_mig_one_at_a_time"]


def test_one_instance_can_be_chosen(probe: Probe) -> None:
    """CUDA_VISIBLE_DEVICES with an instance's UUID leaves that instance."""
    found = probe(devices=A100_DIVIDED, instances=INSTANCES, visible="MIG-2222")
    (only,) = found.accelerators
    assert (only.count, only.free_bytes) == (1, 4364 * MIB)
    assert found.findings == ()


def test_an_instance_is_not_taken_for_a_smaller_card(probe: Probe) -> None:
    """Half of an 80 GB card stays a part of that card, though it has the memory of the 40 GB one."""
    card = A100_DIVIDED.replace("40GB", "80GB").replace("40960", "81920")
    found = probe(devices=card, instances="0|NVIDIA A100-SXM4-80GB MIG 3g.40gb|MIG-4|40448|0")
    assert [(item.kb_id, item.memory_bytes) for item in found.accelerators] == [("a100-80gb", 40448 * MIB)]


def test_mig_without_an_instance_is_no_accelerator(probe: Probe) -> None:
    """MIG switched on but not divided gives nothing to train on, and a finding says what to do."""
    found = probe(devices=A100_DIVIDED)
    assert found.accelerators == ()
    assert codes(found.findings) == ["nvidia_mig_without_instance"]


def test_two_different_cards(probe: Probe) -> None:
    """Different cards are two records, the larger first, and a finding names how to choose it."""
    found = probe(devices=f"{RTX_3060};{RTX_4090}")
    assert [item.kb_id for item in found.accelerators] == ["rtx-4090", "rtx-3060"]
    assert codes(found.findings) == ["nvidia_mixed_gpus"]
    assert "CUDA_VISIBLE_DEVICES=GPU-40900000-bbbb" in found.findings[0].remedy


def test_a_card_before_ampere_has_no_bf16(probe: Probe) -> None:
    """Compute capability 7.5 has no native bfloat16, whatever an entry of kb/hardware says."""
    (card,) = probe(devices=TESLA_T4).accelerators
    assert (card.kb_id, card.supports_bf16) == ("t4", False)


def test_a_gpu_that_shares_the_computers_memory(probe: Probe) -> None:
    """Where NVML knows no memory of the GPU's own, the computer's memory is what there is."""
    found = probe(devices="NVIDIA GB10|GPU-10|0|0|12.1|0")
    (gpu,) = found.accelerators
    assert (gpu.memory_bytes, gpu.free_bytes) == (found.ram_bytes, found.ram_free_bytes)
    assert gpu.supports_bf16


@pytest.mark.parametrize(
    ("code", "expected", "severity"),
    [
        ("9", "nvidia_driver_not_loaded", "info"),
        ("4", "nvidia_no_permission", "warning"),
        ("18", "nvidia_version_mismatch", "warning"),
        ("15", "nvidia_gpu_lost", "warning"),
        ("999", "nvidia_query_failed", "warning"),
    ],
)
def test_a_driver_that_refuses_is_a_finding(probe: Probe, code: str, expected: str, severity: str) -> None:
    """Each way in which nvmlInit fails leaves a machine without GPUs and one finding with a remedy."""
    found = probe(devices=RTX_3060, init=code)
    assert found.accelerators == ()
    (finding,) = found.findings
    assert (finding.code, finding.severity) == (expected, severity)
    assert finding.remedy


def test_one_lost_card_does_not_hide_the_others(probe: Probe) -> None:
    """A card that fell off the bus is named; the one beside it is used under its own number."""
    found = probe(devices=f"{RTX_4090};{RTX_3060}", lost="0")
    assert [item.kb_id for item in found.accelerators] == ["rtx-3060"]
    assert codes(found.findings) == ["nvidia_gpu_lost"]
    assert "GPU 0" in found.findings[0].message
    assert probe(devices=f"{RTX_4090};{RTX_3060}", lost="0", visible="1").accelerators == found.accelerators


def test_a_hung_driver_costs_a_finding_and_the_time_limit(probe: Probe) -> None:
    """A driver that never returns and ignores gentle signals is given up after the limit."""
    started = time.monotonic()
    found = probe(devices=RTX_3060, init="hang", timeout=1.0)
    assert time.monotonic() - started < 4
    assert codes(found.findings) == ["nvidia_driver_hung"]
    assert found.cpu_cores >= 1


def test_a_crash_inside_the_driver_library_is_a_finding(probe: Probe) -> None:
    """A segmentation fault in the library ends the child, not the probe."""
    found = probe(devices=RTX_3060, init="crash")
    assert codes(found.findings) == ["nvidia_driver_crashed"]
    assert "signal 11" in found.findings[0].message


def test_a_library_that_ends_the_process_is_a_finding(probe: Probe) -> None:
    """A library that exits quietly instead of answering is a finding."""
    assert codes(probe(devices=RTX_3060, init="exit").findings) == ["nvidia_query_failed"]


def test_what_the_library_prints_is_not_taken_for_the_answer(probe: Probe) -> None:
    """Lines that a library writes to standard output do not disturb the answer."""
    assert [item.kb_id for item in probe(devices=RTX_3060, init="chatter").accelerators] == ["rtx-3060"]


def test_no_library_is_information_unless_a_card_is_there(tmp_path: Path) -> None:
    """Without a driver library: information on a machine without a card, a warning on one with a card."""
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (libraries / "libnvidia-ml.so.1").write_bytes(b"")  # found first, cannot be loaded
    machine = Machine(sys=tmp_path / "sys", environment={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    knowledge = small_knowledge()
    bare = probe_hardware(output=tmp_path, cache=tmp_path, machine=machine, knowledge=knowledge)
    assert [(f.code, f.severity) for f in bare.findings] == [("nvidia_driver_missing", "info")]

    slot = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    slot.mkdir(parents=True)
    (slot / "vendor").write_text("0x10de\n")
    (slot / "class").write_text("0x030000\n")
    with_card = probe_hardware(output=tmp_path, cache=tmp_path, machine=machine, knowledge=knowledge)
    assert [(f.code, f.severity) for f in with_card.findings] == [("nvidia_driver_missing", "warning")]


def test_no_core_file_is_left(probe: Probe) -> None:
    """A crash in the library cannot leave a core file in the person's folder: they are off in the child."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    if before[1] == 0:
        pytest.skip("core files are off on this machine and cannot be switched on")
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        assert len(probe(devices=RTX_3060, init="cores").accelerators) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "7", "GPU-unknown"])
def test_hidden_gpus_are_not_used(probe: Probe, visible: str) -> None:
    """CUDA_VISIBLE_DEVICES that names no device hides all, and a finding says so."""
    found = probe(devices=RTX_3060, visible=visible)
    assert found.accelerators == ()
    assert [(f.code, f.severity) for f in found.findings] == [("nvidia_gpu_hidden", "warning")]


CARDS = tuple(
    Device(
        index=i, uuid=f"GPU-{name}", name="H100", total_bytes=GIB, free_bytes=GIB, compute_capability="9.0"
    )
    for i, name in enumerate(("aa11", "aa22", "bb33", "cc44"))
)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("3,0", [3, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,9,1", [0]),
        ("0,-1,1", [0]),
        ("1,1", []),
        ("GPU-bb", [2]),
        ("gpu-BB33,GPU-cc44", [2, 3]),
        ("GPU-aa", []),
        ("0,GPU-cc", [0, 3]),
    ],
)
def test_visible_devices_follow_cudas_rules(visible: str | None, indices: list[int]) -> None:
    """Numbers and beginnings of UUIDs choose; an unknown entry ends the list, a doubled one empties it."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    usable, findings = usable_devices(CARDS, environment)
    assert [device.index for device in usable] == indices
    assert codes(findings) == ([] if len(indices) == 4 else ["nvidia_gpu_hidden"])


@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(st.sampled_from(["0", "1", "9", "-1", "GPU-a", "GPU-b", ""])).map(",".join),
    )
)
def test_any_visible_devices_text_gives_distinct_known_devices(visible: str) -> None:
    """Whatever the variable holds, known devices come out once each and the hidden ones are counted."""
    usable, findings = usable_devices(CARDS, {"CUDA_VISIBLE_DEVICES": visible})
    assert len({device.uuid for device in usable}) == len(usable)
    assert all(device in CARDS for device in usable)
    assert sum(f.count for f in findings if f.code == "nvidia_gpu_hidden") == len(CARDS) - len(usable)


def test_numbers_among_different_gpus_are_unsure() -> None:
    """A number in CUDA_VISIBLE_DEVICES among different GPUs is told about, unless the order is fixed."""
    other = Device(
        index=4, uuid="GPU-dd", name="RTX 3060", total_bytes=GIB, free_bytes=GIB, compute_capability="8.6"
    )
    asked = {"CUDA_VISIBLE_DEVICES": "0"}
    assert "nvidia_mixed_gpus" in codes(usable_devices((*CARDS, other), asked)[1])
    fixed = {**asked, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert "nvidia_mixed_gpus" not in codes(usable_devices((*CARDS, other), fixed)[1])


@pytest.mark.parametrize(
    ("uuid", "clock", "said"),
    [("30600000-aaaa", "0x20", {"slowed_by_heat": True}), ("30600000-aaaa", "0x44", {"slowed_by_heat": True}),
     ("30600000-aaaa", "0x4", {"slowed_by_heat": False}), ("00000000-zzzz", "0x20", {})],
)  # fmt: skip
def test_a_card_that_is_slowed_by_its_heat_says_so(
    stand_in: Path, uuid: str, clock: str, said: dict[str, bool]
) -> None:
    """Heat and no other reason counts; a card that the driver does not know by that name says nothing."""
    asked = f"from advisor.train.heat import slowed_by_heat as f; print(f({uuid!r}))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(stand_in), "FAKE_NVML_CLOCK": clock}
    environment["FAKE_NVML_DEVICES"] = RTX_3060
    answer = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(said)
