"""Odds-ratio preference optimisation, with a loss of our own and no reference model.

    python -P train.py recipe.yaml

The working folder is the run folder; see recipes/sft/train.py for what is read and left there."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import advisor  # noqa: F401 - only to explain its absence
except ImportError:
    sys.exit("The package ftadvisor is not importable here. Start this through: ftadvisor run FOLDER")

if __name__ == "__main__" and not any(
    word in Path(sys.argv[-1]).read_bytes() for word in (b"qlora", b"8bit")
):
    # PEFT imports bitsandbytes wherever it is installed: 3.4 of 16 CPU-seconds that only these two need.
    sys.modules["bitsandbytes"] = None

import torch

from advisor.train.preference import orpo_loss, train_without_reference
from advisor.train.session import Session, leave, run_program
from advisor.train.settings import OrpoSettings, read_settings


def train(session: Session) -> int:
    """Read the settings; the loss is all that tells this program from its sister."""
    settings = read_settings(session.recipe, OrpoSettings, cuda=torch.cuda.is_available())
    return train_without_reference(session, settings, orpo_loss(settings.beta))


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
