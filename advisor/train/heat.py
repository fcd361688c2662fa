"""Has the card lowered its clock because it is too hot?

Goes in: the identifier of an NVIDIA card. Comes out: yes, no, or nothing where its driver does not tell.
Never does: judge by a temperature of its own; fail.
"""

from __future__ import annotations

import pynvml


def slowed_by_heat(uuid: str) -> dict[str, bool]:
    """Return what the driver gives as the reason of the present clock; nothing when it gives none.

    Args:
        uuid: as `torch.cuda.get_device_properties` names the card; that of a MIG instance is not known to
            the driver, which then says nothing.
    """
    too_hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    try:
        pynvml.nvmlInit()  # counts its calls: after the first it costs nothing
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(card)
    except pynvml.NVMLError:
        return {}
    return {"slowed_by_heat": bool(reasons & too_hot)}
