"""What the warnings look at: the advice together with the settings that were derived from it.

Goes in: Advice, stages, export. Comes out: Case, with the few figures that several warnings share.
Never does: decide.
"""

from __future__ import annotations

from advisor.knowledge import Knowledge
from advisor.recommend import Advice, Option
from advisor.recommend.situation import Situation, rows_of, rule
from advisor.types import ExportPlan, ModelSpec, Record, Stage


class Case(Record, frozen=True, kw_only=True):
    """One plan in the making."""

    advice: Advice
    option: Option | None
    """The combination that is trained; None when nothing is."""
    spec: ModelSpec | None
    stages: tuple[Stage, ...]
    export: ExportPlan | None
    strange_overrides: tuple[str, ...] = ()
    """Overridden settings outside the range of the sources, in words."""
    over_memory: str = ""
    """Why the overridden settings do not fit, in words."""

    @property
    def situation(self) -> Situation:
        """The case in figures."""
        return self.advice.situation

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objectives that are trained."""
        return tuple(dict.fromkeys(stage.objective for stage in self.stages))

    @property
    def rows(self) -> int:
        """Demonstrations."""
        return rows_of(self.situation.demos)

    @property
    def tuner(self) -> str:
        """Tuner id, or empty."""
        return self.option.proposal.tuner if self.option else ""

    def seconds(self) -> float:
        """Expected seconds of all stages."""
        return sum(stage.estimate.seconds.expected for stage in self.stages)

    def longest(self) -> int:
        """Longest training sequence in tokens."""
        lengths = [stage.settings.get("max_seq_len") for stage in self.stages]
        return max([n for n in lengths if isinstance(n, int)], default=0)

    def trained(self) -> bool:
        """True when something is trained at all."""
        return bool(self.stages)


def allowed_hours(case: Case, knowledge: Knowledge) -> float:
    """Hours that training may take: what the person allows, else what nobody would wait for."""
    allowed = case.situation.scenario.goal.max_hours
    return limit(knowledge, "choice", "fit", "hopeless_hours") if allowed is None else allowed


def takes_too_long(case: Case, knowledge: Knowledge) -> bool:
    """True when the trained stages together exceed the hours allowed."""
    return case.trained() and case.seconds() > 3600 * allowed_hours(case, knowledge)


def limit(knowledge: Knowledge, file: str, table: str, key: str) -> float:
    """One figure of kb/rules."""
    return float(rule(knowledge, file, table)[key])
