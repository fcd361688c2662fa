"""Blocks the network in the tests and in every process they start; only loopback is allowed.

Generated cases are the same in every run: a change is judged by what it changed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hypothesis

BLOCK = Path(__file__).parent / "blocked"
sys.path.insert(0, str(BLOCK))
sys.path.insert(0, str(Path(__file__).parent))

import network_block  # noqa: E402 - found only after the path is set

network_block.install()
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BLOCK), os.environ.get("PYTHONPATH", "")]))
os.environ["NO_COLOR"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["FTADVISOR_CALIBRATION"] = ""  # tests leave nothing in anyone's home
for name in ("FTADVISOR_KB", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell's `&`: no Ctrl-C would be seen
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
