"""Asks the NVIDIA driver what GPUs there are; a program of its own, so that a hung driver hangs only this.

Goes in: nothing but the environment. Comes out: one line of JSON on standard output, read by nvidia.py.
Never does: import more than it needs, judge, leave a core file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from typing import Any


def _library_exists() -> bool:
    """Try the library by itself: importing pynvml costs more than all the rest, in vain without it."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _describe(nvml: Any, handle: Any, capability: str | None) -> dict[str, Any]:
    """Return what one device or MIG instance says of itself; memory is None where it has none of its own."""
    memory = None
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "name": nvml.nvmlDeviceGetName(handle),
        "total_bytes": memory.total if memory is not None else None,
        "free_bytes": memory.free if memory is not None else None,
        "compute_capability": capability,
    }


def _mig_instances(nvml: Any, handle: Any, capability: str) -> list[dict[str, Any]] | None:
    """Return the MIG instances of a device, or None when it is not divided."""
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None
    if current != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    instances = []
    for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError_NotFound):
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
            instances.append(_describe(nvml, instance, capability))
    return instances


def _device(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    capability = f"{major}.{minor}"
    instances = _mig_instances(nvml, handle, capability)
    if instances is None:
        return {"index": index, **_describe(nvml, handle, capability)}
    # The memory of a divided card is not asked for: it needs rights that a user of one instance lacks.
    return {
        "index": index,
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "name": nvml.nvmlDeviceGetName(handle),
        "compute_capability": capability,
        "instances": instances,
    }


def _problem(nvml: Any, error: Any) -> dict[str, str]:
    """Name an NVML error in a word that nvidia.py explains."""
    words = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "library_not_found",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "driver_not_loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "no_permission",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "version_mismatch",
        nvml.NVML_ERROR_GPU_IS_LOST: "gpu_lost",
    }
    return {"problem": words.get(error.value, "other"), "detail": str(error)}


def answer() -> dict[str, Any]:
    """Return the driver's version, the devices that answered and the problems of those that did not."""
    if sys.platform == "linux" and not _library_exists():
        return {"failure": {"problem": "library_not_found", "detail": ""}}
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        result: dict[str, Any] = {"driver": nvml.nvmlSystemGetDriverVersion(), "devices": [], "lost": []}
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return {"failure": _problem(nvml, error)}
    for index in range(count):
        try:
            result["devices"].append(_device(nvml, index))
        except nvml.NVMLError as error:
            result["lost"].append({"index": index, **_problem(nvml, error)})
    return result


if __name__ == "__main__":
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(answer()), flush=True)
