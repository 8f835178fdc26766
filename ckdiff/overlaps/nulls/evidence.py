"""What nulls need to know of a tensor's masks, counted while the masks pass by.

A collector sees the windows of a chunk; what it found out about a tensor is *evidence*, and
evidence of the parts of a tensor can be joined. Only a whole tensor's evidence says what chance
would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable
from ckdiff.kernels import hashing
from ckdiff.kernels.abi import CELLS_SCRATCH
from ckdiff.kernels.binades import WAYS, bins
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.contents import ContentHasher
from ckdiff.overlaps.nulls import margins as rowcol
from ckdiff.overlaps.nulls import registry as nulls
from ckdiff.stores.maskwalk import MaskSpans
from ckdiff.stores.table import UNKNOWN

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Evidence(Protocol):
    """What is known of some elements of one tensor, next to each other."""

    elements: int

    def join(self, later: Evidence) -> Evidence:
        """Evidence of these elements and the ones right after them."""

    def moments(self) -> tuple[FloatArray, FloatArray]:
        """(mean, variance) of each pair's intersection; the evidence must be of a whole tensor."""


class Collector(Protocol):
    """Counts what one null needs. For one chunk and one thread."""

    def add(self, window: MaskSpans) -> None:
        """Look at a window; windows come in order."""

    def finish(self) -> dict[int, Evidence]:
        """Evidence by tensor (position in the layout)."""

    def close(self) -> None:
        """Let go of what is held."""


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

    def moments(self) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        return nulls.of_cells(self.counts[0], self.counts[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The base checkpoint, and what its tensors must be."""

    checkpoint: Checkpoint
    index: IntArray  #: for each tensor of the layout, its position in the checkpoint
    bits: IntArray  #: of one element of each
    hashes: Sequence[str]  #: content hashes that the stores recorded; UNKNOWN: none has read it
    names: Sequence[str]

    def verify(self, tensor: int, found: BinadeCounts) -> None:
        """Raise CheckpointError unless the content read is what the store was made from."""
        nbytes = int(self.checkpoint.table.nbytes[self.index[tensor]])
        low, high = found.sums.tolist()
        wanted = self.hashes[tensor]
        if wanted != UNKNOWN and hashing.finish(low, high, nbytes) != wanted:
            raise CheckpointError(
                f"{self.checkpoint.label} is not the base of these stores: "
                f"{printable(self.names[tensor])} has other content",
                hint="give the checkpoint that the runs started from to --base",
            )


class BinadeCollector:
    """Counts by binade of the base's values, and hashes what it reads of the base.

    ``dtypes`` are those of the layout's tensors.
    """

    def __init__(self, base: Base, dtypes: Sequence[str], stores: int) -> None:
        self.base, self.dtypes, self.stores = base, dtypes, stores
        self._found: dict[int, Evidence] = {}
        self._cells: dict[str, IntArray] = {}
        self._reader = base.checkpoint.reader()
        self._scratch = np.zeros(CELLS_SCRATCH, np.uint8)
        self._hasher = ContentHasher()

    def add(self, window: MaskSpans) -> None:
        """See Collector."""
        spans = window.spans
        begins, nbytes = spans.byte_ranges(self.base.bits)
        addresses = self._reader.acquire(self.base.index[spans.tensors], begins, nbytes)
        masks = np.ascontiguousarray(window.addresses.T)
        columns = zip(
            spans.tensors.tolist(), begins.tolist(), spans.elements.tolist(),
            addresses.tolist(), nbytes.tolist(), masks, strict=True,
        )  # fmt: skip
        for tensor, begin, elements, address, size, table in columns:
            dtype = self.dtypes[tensor]
            cells = self._cells_of(dtype)
            sums = np.zeros(2, np.uint64)
            c_function("cells", dtype).ctypes(
                address, elements, table.ctypes.data, self.stores, cells.ctypes.data,
                self._scratch.ctypes.data,
            )  # fmt: skip
            self._hasher.add(sums, address, size, begin, DTYPES[dtype].bits)
            found = BinadeCounts(elements, cells.sum(1), sums)
            cells[:] = 0
            before = self._found.get(tensor)
            self._found[tensor] = found if before is None else before.join(found)
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

    def moments(self) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        fits = [rowcol.fit(r, c) for r, c in zip(self.rows, self.columns, strict=True)]
        mean, variance = rowcol.expected_pairs(fits)
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

    def moments(self) -> tuple[FloatArray, FloatArray]:
        """See Evidence."""
        return nulls.of_cells([self.elements], self.changed[:, None])


class MarginCollector:
    """Counts by row and by column; ``shapes`` are those of the layout's tensors."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], stores: int) -> None:
        self.shapes, self.stores = shapes, stores
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
            window.sizes.tolist(), window.addresses.T.tolist(), strict=True,
        )  # fmt: skip
        for tensor, start, elements, size, masks in columns:
            if is_matrix(self.shapes[tensor], self.stores):
                self._add_rows(tensor, start, elements, masks)
                continue
            found = TotalCounts(elements, self._totals(size, masks))
            before = self._found.get(tensor)
            self._found[tensor] = found if before is None else before.join(found)

    def _add_rows(self, tensor: int, start: int, elements: int, masks: list[int]) -> None:
        width = self.shapes[tensor][1]
        if tensor != self._tensor:
            self._finish_matrix()
            self._tensor = tensor
            self._columns = np.zeros((self.stores, width), np.int64)
        first, last = start // width, (start + elements - 1) // width
        rows = np.zeros((self.stores, last - first + 1), np.int64)
        count = c_function("margins").ctypes
        for k, mask in enumerate(masks):
            count(
                mask, elements, start % width, width, rows[k].ctypes.data,
                self._columns[k].ctypes.data,
            )  # fmt: skip
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

    def _totals(self, size: int, masks: list[int]) -> IntArray:
        found = np.zeros((self.stores, 2), np.int64)
        survey = c_function("survey").ctypes
        for k, mask in enumerate(masks):
            survey(mask, size // 8, found[k].ctypes.data)
        return found[:, 0]

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
