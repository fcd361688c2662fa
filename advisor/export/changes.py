"""What an adapter does to one parameter: a low-rank sum, a scale, replaced rows.

Goes in: rows of the base's weight as (out, in). Comes out: the trained rows. Never does: read a file.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from advisor.errors import ModelError
from advisor.export.checkpoint import Floats, Rows

_HALF = "The adapter lacks one half of a low-rank pair."


@dataclasses.dataclass(kw_only=True)
class Delta:
    """The low-rank change of one module; shapes as in peft."""

    scale: float
    embedding: bool = False
    a: Floats | None = None
    """(rank, columns), for an embedding (rank, rows)."""
    b: Floats | None = None
    """(rows, rank), for an embedding (columns, rank)."""
    b_bias: Floats | None = None
    magnitude: Floats | None = None
    """DoRA: the length of each row."""

    def rows(self, weight: Floats, rows: Rows) -> Floats:
        """Return the merged rows, given the base's."""
        if self.a is None or self.b is None:
            raise ModelError(_HALF, "Save the adapter again.")
        merged = self.a.T[rows] @ self.b.T if self.embedding else self.b[rows] @ self.a
        merged *= np.float32(self.scale)
        merged += weight
        if self.magnitude is None:
            return merged
        length = np.linalg.norm(merged, axis=1)
        return np.asarray((self.magnitude[rows] / length)[:, None] * merged, dtype=np.float32)

    def bias(self, bias: Floats, rows: Rows) -> Floats:
        """Return the trained bias."""
        return bias if self.b_bias is None else bias + np.float32(self.scale) * self.b_bias[rows]

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that this belongs to."""
        if self.a is None or self.b is None:
            raise ModelError(_HALF, "Save the adapter again.")
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)


@dataclasses.dataclass(kw_only=True)
class Scale:
    """(IA)^3: what goes into a module or comes out of it, entry by entry."""

    values: Floats
    incoming: bool
    """Scales columns; otherwise rows, and the bias."""

    def rows(self, weight: Floats, rows: Rows) -> Floats:
        """Return the scaled rows."""
        return weight * (self.values[None, :] if self.incoming else self.values[rows][:, None])

    def bias(self, bias: Floats, rows: Rows) -> Floats:
        """Return the scaled bias."""
        return bias if self.incoming else bias * self.values[rows]


@dataclasses.dataclass(kw_only=True)
class NewRows:
    """Trained tokens: some rows of the embedding have other values."""

    indices: npt.NDArray[np.intp]
    values: Floats

    def rows(self, weight: Floats, rows: Rows) -> Floats:
        """Return the rows with the trained ones in place."""
        asked = np.arange(*rows.indices(int(self.indices.max()) + 1)) if isinstance(rows, slice) else rows
        place = {int(index): number for number, index in enumerate(self.indices)}
        hits = [(here, place[int(row)]) for here, row in enumerate(asked) if int(row) in place]
        if not hits:
            return weight
        changed = np.array(weight)
        here, there = zip(*hits, strict=True)
        changed[list(here)] = self.values[list(there)]
        return changed

    def bias(self, bias: Floats, rows: Rows) -> Floats:
        """Return the bias as it was."""
        return bias
