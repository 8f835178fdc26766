"""The null `rowcol`: masks are spread inside each matrix, given its row and column counts.

The model and its formulas are in docs/design/0010-rowcol-null.md, their computation in
:mod:`~ckdiff.overlaps.nulls.fitting` and :mod:`~ckdiff.overlaps.nulls.margins`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckdiff.kernels import counting, entropy
from ckdiff.kernels.memory import Bytes
from ckdiff.overlaps.nulls.base import Base
from ckdiff.overlaps.nulls.fitting import fit
from ckdiff.overlaps.nulls.margins import expected_pairs
from ckdiff.overlaps.nulls.moments import FloatArray, IntArray, of_cells
from ckdiff.overlaps.nulls.null import Evidence, Inputs, Null
from ckdiff.stores.maskwalk import MaskSpans


@dataclass(slots=True, eq=False)
class MarginCounts:
    """Changed elements of each row and column of a matrix, or of some of its rows."""

    elements: int
    first_row: int
    rows: IntArray  #: (stores, rows from the first one on)
    columns: IntArray  #: (stores, columns)

    def join(self, later: Evidence) -> MarginCounts:
        """See Evidence."""
        assert isinstance(later, MarginCounts)
        shift = later.first_row - self.first_row  # the last row here may go on there
        rows = np.zeros((len(self.rows), shift + later.rows.shape[1]), np.int64)
        rows[:, : self.rows.shape[1]] += self.rows
        rows[:, shift:] += later.rows
        return MarginCounts(
            self.elements + later.elements, self.first_row, rows, self.columns + later.columns
        )

    def moments(self, tensor: int, base: Base | None) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        fits = [fit(r, c) for r, c in zip(self.rows, self.columns, strict=True)]
        mean, variance = expected_pairs(fits)
        upper = np.triu_indices(len(fits), 1)
        return mean[upper], variance[upper]


@dataclass(slots=True, eq=False)
class TotalCounts:
    """Changed elements of a tensor that is no matrix: its margins would say everything."""

    elements: int
    changed: IntArray  #: (stores,)

    def join(self, later: Evidence) -> TotalCounts:
        """See Evidence."""
        assert isinstance(later, TotalCounts)
        return TotalCounts(self.elements + later.elements, self.changed + later.changed)

    def moments(self, tensor: int, base: Base | None) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        return of_cells([self.elements], self.changed[:, None])


class MarginCollector:
    """Counts by row and by column."""

    def __init__(self, inputs: Inputs) -> None:
        self.shapes, self.stores = inputs.shapes, inputs.stores
        self._found: dict[int, Evidence] = {}
        #: of the matrix that is passing by: row counts by first row, and all column counts
        self._rows: list[tuple[int, IntArray]] = []
        self._columns: IntArray = np.empty((0, 0), np.int64)
        self._elements = 0
        self._tensor = -1

    def add(self, window: MaskSpans) -> None:
        """See Collector."""
        spans = window.spans
        columns = zip(
            spans.tensors.tolist(), spans.starts.tolist(), spans.elements.tolist(),
            window.sizes.tolist(), window.places.T.tolist(), strict=True,
        )  # fmt: skip
        for tensor, start, elements, size, places in columns:
            masks = [window.memory[at : at + size] for at in places]
            if is_matrix(self.shapes[tensor], self.stores):
                self._add_rows(tensor, start, elements, masks)
                continue
            counts = TotalCounts(
                elements, np.array([entropy.survey(mask)[0] for mask in masks], np.int64)
            )
            before = self._found.get(tensor)
            self._found[tensor] = counts if before is None else before.join(counts)

    def _add_rows(self, tensor: int, start: int, elements: int, masks: list[Bytes]) -> None:
        width = self.shapes[tensor][1]
        if tensor != self._tensor:
            self._finish_matrix()
            self._tensor = tensor
            self._columns = np.zeros((self.stores, width), np.int64)
        first, last = start // width, (start + elements - 1) // width
        rows = np.zeros((self.stores, last - first + 1), np.int64)
        for k, mask in enumerate(masks):
            counting.margins(mask, elements, start % width, rows[k], self._columns[k])
        self._rows.append((first, rows))
        self._elements += elements

    def _finish_matrix(self) -> None:
        if self._tensor < 0:
            return
        first = self._rows[0][0]
        last, rows = self._rows[-1]
        total = np.zeros((self.stores, last - first + rows.shape[1]), np.int64)
        for start, rows in self._rows:
            total[:, start - first : start - first + rows.shape[1]] += rows
        self._found[self._tensor] = MarginCounts(self._elements, first, total, self._columns)
        self._rows, self._elements, self._tensor = [], 0, -1

    def finish(self) -> dict[int, Evidence]:
        """See Collector."""
        self._finish_matrix()
        return self._found

    def close(self) -> None:
        """See Collector."""


#: rows and columns of all stores that are kept of a matrix
_MOST_MARGINS = 1 << 22


def is_matrix(shape: tuple[int, ...], stores: int) -> bool:
    """Whether a tensor has rows and columns that leave something to chance, and not too many."""
    return len(shape) == 2 and min(shape) > 1 and sum(shape) * stores <= _MOST_MARGINS


NULL = Null(
    given="Given row and column counts in each matrix; any other tensor is one cell.",
    rules_out="favoured rows and columns of a matrix, such as tokens that the data had",
    leaves="small weights flipping more easily under rounding",
    collector=MarginCollector,
)
