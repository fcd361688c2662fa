"""Every error a person can meet, one class for each remedy.

    AdvisorError                 code              exit
    ├── UsageError               usage               2   the command line is wrong
    │   └── UnknownNameError     unknown_name        2   a name we do not have; the nearest is named
    ├── InputError               input               1   a file or folder that was given is not usable
    │   ├── DataError            data                1   a dataset: missing, empty, broken, wrong columns
    │   └── ModelError           model               1   a model: incomplete, no template, unknown
    ├── HubError                 hub                 1   the hub refused, is out of reach or lacks it
    ├── MissingPackageError      missing_package     1   an extra is not installed
    ├── KnowledgeError           knowledge           1   a file in kb/ is wrong; names file and key
    ├── DiskError                disk                1   not enough space, or the place is not writable
    ├── TrainingError            training            1   the training program failed
    ├── ExportError              export              1   the model cannot be exported as asked
    ├── VerificationError        verification        1   the file does not answer as the model does
    ├── InterruptedRunError      interrupted       130   a person stopped it; it can go on
    └── RefusedError             refused             3   it does not fit, or must not be done as asked

To add one: only if its remedy differs from all of these; give it a code, an exit status and a line here.
Goes in: what was given, what is valid, the next command. Never does: print, exit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdvisorError(Exception):
    """An error with a stable code and the next step; shown without a traceback."""

    code = "error"
    exit_status = 1

    def __init__(self, message: str, remedy: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        if code is not None:
            self.code = code


class UsageError(AdvisorError):
    """The command line or an answers file is wrong."""

    code = "usage"
    exit_status = 2


class UnknownNameError(UsageError):
    """A name that we do not have; the nearest valid ones come first."""

    code = "unknown_name"

    def __init__(self, kind: str, given: str, valid: Iterable[str], see: str = "") -> None:
        names = sorted(set(valid))
        near = nearest(given, names)
        if near:
            hint = f"Did you mean {' or '.join(repr(n) for n in near)}?"
        else:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            hint = f"Valid: {shown}."
        super().__init__(f"Unknown {kind} {given!r}. {hint}", see)


class InputError(AdvisorError):
    """A file or folder that was given is not usable."""

    code = "input"


class DataError(InputError):
    """A dataset cannot be used as it is."""

    code = "data"


class ModelError(InputError):
    """A model cannot be used as it is."""

    code = "model"


class HubError(AdvisorError):
    """The hub refused, is out of reach or does not have it."""

    code = "hub"


class MissingPackageError(AdvisorError):
    """An optional part of ftadvisor is not installed."""

    code = "missing_package"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed.",
            f"pip install 'ftadvisor[{extra}]'",
        )


class KnowledgeError(AdvisorError):
    """A file in kb/ is wrong."""

    code = "knowledge"


class DiskError(AdvisorError):
    """Not enough space, or the place cannot be written."""

    code = "disk"


class TrainingError(AdvisorError):
    """The training program failed."""

    code = "training"


class ExportError(AdvisorError):
    """The model cannot be exported as asked."""

    code = "export"


class VerificationError(AdvisorError):
    """The file does not answer as the trained model does."""

    code = "verification"


class InterruptedRunError(AdvisorError):
    """A person stopped a run; what was saved stays and it can go on."""

    code = "interrupted"
    exit_status = 130


class RefusedError(AdvisorError):
    """It does not fit, or must not be done as asked."""

    code = "refused"
    exit_status = 3


def nearest(given: str, names: Iterable[str], limit: int = 2) -> list[str]:
    """Return up to `limit` names that look like `given`, the nearest first, ignoring case and dashes."""
    plain = {n.lower().replace("_", "-").replace(" ", "-"): n for n in names}
    key = given.lower().replace("_", "-").replace(" ", "-")
    close = difflib.get_close_matches(key, list(plain), n=3 * limit, cutoff=0.6)
    swapped_first = sorted(close, key=lambda name: sorted(name) != sorted(key))
    return [plain[name] for name in swapped_first[:limit]]
