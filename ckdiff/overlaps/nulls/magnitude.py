"""The null `magnitude`: masks are spread inside each tensor and binade of the base's values.

A binade is a power of two of |base|. In a float of few bits the step between neighbours grows with
it, so that small weights flip more easily, in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import counting
from ckdiff.kernels.binades import WAYS, bins
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import views
from ckdiff.overlaps.nulls.base import Base
from ckdiff.overlaps.nulls.moments import FloatArray, IntArray, of_cells
from ckdiff.overlaps.nulls.null import Evidence, Inputs, Null
from ckdiff.stores.maskwalk import MaskSpans


@dataclass(slots=True, eq=False)
class BinadeCounts:
    """Elements of each binade: of the tensor, and changed ones of each store."""

    elements: int
    counts: IntArray  #: (1 + stores, bins)
    sums: npt.NDArray[np.uint64]  #: of the content hash

    def join(self, later: Evidence) -> BinadeCounts:
        """See Evidence."""
        assert isinstance(later, BinadeCounts)
        return BinadeCounts(
            self.elements + later.elements, self.counts + later.counts, self.sums + later.sums
        )

    def moments(self, tensor: int, base: Base | None) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        assert base is not None
        base.verify(tensor, self.sums)
        return of_cells(self.counts[0], self.counts[1:])


class BinadeCollector:
    """Counts by binade of the base's values, and hashes what it reads of the base."""

    def __init__(self, inputs: Inputs) -> None:
        assert inputs.base is not None
        self.base, self.dtypes, self.stores = inputs.base, inputs.dtypes, inputs.stores
        self._found: dict[int, Evidence] = {}
        self._cells: dict[str, IntArray] = {}
        self._reader = self.base.checkpoint.reader()
        self._hasher = ContentHasher()

    def add(self, window: MaskSpans) -> None:
        """See Collector."""
        spans = window.spans
        begins, nbytes = spans.byte_ranges(self.base.bits)
        addresses = self._reader.acquire(self.base.index[spans.tensors], begins, nbytes)
        columns = zip(
            spans.tensors.tolist(), begins.tolist(), spans.elements.tolist(),
            views(addresses, nbytes), window.places.T, strict=True,
        )  # fmt: skip
        for tensor, begin, elements, data, places in columns:
            dtype = self.dtypes[tensor]
            cells = self._cells_of(dtype)
            sums = np.zeros(2, np.uint64)
            counting.cells(dtype, data, window.memory, places, cells)
            self._hasher.add(sums, data, begin, DTYPES[dtype].bits)
            counts = BinadeCounts(elements, cells.sum(1), sums)
            cells[:] = 0
            before = self._found.get(tensor)
            self._found[tensor] = counts if before is None else before.join(counts)
        self._reader.release()

    def finish(self) -> dict[int, Evidence]:
        """See Collector."""
        return self._found

    def close(self) -> None:
        """See Collector."""
        self._reader.close()

    def _cells_of(self, dtype: str) -> IntArray:
        if dtype not in self._cells:
            shape = self.stores + 1, WAYS, bins(DTYPES[dtype])
            self._cells[dtype] = np.zeros(shape, np.int64)
        return self._cells[dtype]


NULL = Null(
    given="Given each mask's size in each tensor and binade (power of two) of |base|.",
    rules_out="some tensors changing more than others, and small weights flipping more easily",
    leaves="the scale of gradients, and rows that no data reached",
    collector=BinadeCollector,
    reads_base=True,
)
