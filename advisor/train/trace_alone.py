"""Keeps bitsandbytes out of the process that imports this; the tracer imports it before PEFT.

Goes in: nothing. Comes out: nothing. Never does: take it out of a process that has it already.

PEFT imports bitsandbytes where it is installed, and that a compiler: a sixth of the tracer's start, for
matrices that have a stand-in there. A name that is None in `sys.modules` counts as not installed.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_modules.setdefault("bitsandbytes", None)
