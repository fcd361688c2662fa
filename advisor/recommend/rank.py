"""Which LoRA rank does the amount of data ask for, and what does a task's storage allow?

Goes in: a Proposal, an objective and the Situation. Comes out: the rank; 0 where a tuner has none.
Never does: look at memory.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.recommend.chains import PREFERENCE, REINFORCEMENT
from advisor.recommend.gates import Proposal, task_bytes
from advisor.recommend.situation import Situation, counted_rows, rule
from advisor.types import Objective

RANKS = (128, 64, 32, 16, 8, 4, 2, 1)


def rank_for(proposal: Proposal, objective: Objective, situation: Situation, knowledge: Knowledge) -> int:
    """The LoRA rank that the amount of data asks for and the storage of a task allows."""
    if proposal.facts.group != "lora" and "lora_r" not in proposal.facts.settings:
        return 0
    rank = _wanted_rank(objective, situation, knowledge)
    limit = situation.scenario.goal.storage_per_task_kb
    if limit is None:
        return rank
    for smaller in RANKS:
        size = task_bytes(proposal.spec, proposal.tuner, proposal.facts, smaller)
        if smaller <= rank and size <= limit * 1000:
            return smaller
    return 1


def _wanted_rank(objective: Objective, situation: Situation, knowledge: Knowledge) -> int:
    rules, capacity = rule(knowledge, "settings", "rank"), rule(knowledge, "data", "capacity")
    if objective == "cpt":
        return int(rules["pretraining"])
    if objective in PREFERENCE or objective == "reward":
        return int(rules["preference"])
    if objective in REINFORCEMENT:
        return int(rules["reinforcement"])
    if situation.tenants > 1:
        return int(rules["tenants"])
    rows = counted_rows("sft", situation, knowledge)
    if rows >= capacity["lora_rows"]:
        return int(rules["capacity"])
    if rows >= rules["large_from_rows"]:
        return int(rules["large"])
    if situation.tasks > 1:
        return int(rules["multi_task"])
    if rows < rule(knowledge, "data", "rows")["small_below"]:
        return int(rules["small_data"])
    return int(rules["default"])
