"""REINFORCE leave-one-out against rewards, with TRL's RLOOTrainer.

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

from trl import RLOOConfig, RLOOTrainer

from advisor.train.reinforcement import SameOrder, train_against_rewards
from advisor.train.session import Session, leave, run_program


class OrderedRLOOTrainer(SameOrder, RLOOTrainer):  # type: ignore[misc]  # trl is not typed
    """RLOOTrainer that resumes exactly in any epoch."""


def train(session: Session) -> int:
    """Train with TRL's trainer of this program and its arguments."""
    return train_against_rewards(session, OrderedRLOOTrainer, RLOOConfig)


if __name__ == "__main__":
    leave(run_program(train, Path(sys.argv[1])))
