"""How much does each input column of a matrix matter to what the model is used for?

Goes in: nothing. Comes out: `Importance`, as measured elsewhere. Never does: measure; change what
a type of eight bits and more stores.
"""

from __future__ import annotations

import dataclasses

from advisor.errors import ExportError
from advisor.export.architecture import ModelPlan, PlannedTensor
from advisor.export.checkpoint import Floats

_NOTE = "types with fewer than eight bits follow an importance matrix"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """llama.cpp's importance matrix: what a quantiser keeps more exactly than the rest."""

    columns: dict[str, Floats]
    """Parameter -> mean square of what each of its input columns is multiplied by, (columns,)."""
    rows: int
    tokens: int
    source: str
    """File names of the texts that the model read meanwhile."""

    def of(self, tensor: PlannedTensor) -> Floats | None:
        """Return the importance of its columns; None for embedding and output layer, as in llama.cpp."""
        return self.columns.get(tensor.origin)

    def metadata(self) -> dict[str, int | str]:
        """Return what llama.cpp's own quantiser notes in a file."""
        return {
            "quantize.imatrix.dataset": self.source,
            "quantize.imatrix.entries_count": len(self.columns),
            "quantize.imatrix.chunks_count": self.rows,
        }

    @property
    def note(self) -> str:
        """Return what stands in the record of an export."""
        return f"{_NOTE}, measured on {self.rows} rows ({self.tokens} tokens) of {self.source}"

    @staticmethod
    def is_note(text: str) -> bool:
        """Whether a note of an export is about an importance matrix."""
        return text.startswith(_NOTE)

    def check(self, plan: ModelPlan) -> None:
        """Match the measured matrices with those of the file.

        Raises:
            ExportError: one was not measured, or has another width.
        """
        for tensor in plan.tensors:
            within = tensor.origin.startswith(f"{plan.architecture.block}.") and len(tensor.shape) > 1
            found = self.of(tensor)
            if within and (found is None or found.shape != tensor.shape[1:]):
                raise ExportError(
                    f"The importance of {tensor.origin} was not measured.",
                    "Leave --imatrix out, and report this.",
                )
