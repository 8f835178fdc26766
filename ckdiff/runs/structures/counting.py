"""Walking the masks of matrices row by row: the chunk task of ``structure``.

A piece of the masks is several small matrices, or some rows of a large one, which are joined with
the other rows of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.kernels import profiles
from ckdiff.kernels.memory import Bytes, Int64
from ckdiff.running.threads import PerThread, Stopped
from ckdiff.runs.structures.dealing import BLOCK, LARGEST, Shape, WholeRows, gathered
from ckdiff.stores.maskwalk import MaskSpans, walk
from ckdiff.stores.tally import Said, check_padding

Integers = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Counts:
    """What was counted of some rows of a matrix, in each store."""

    tensor: int  #: position in the layout
    first: int  #: row
    rows: Int64  #: (stores, rows): changed elements of each row
    columns: Sequence[Integers]  #: of each store those of each column
    #: (stores, 6): blocks of 16 x 16 and of 128 x 128 with changed elements, then the whole fours
    #: of a row with at least 1, 2, 3 and 4
    totals: Int64
    #: of rows of blocks of 128 x 128 that other pieces have rows of, too: which blocks have changed
    #: elements, (stores, blocks); they are not in ``totals``
    begun: dict[int, Flags] = field(default_factory=dict)

    @classmethod
    def none(cls, tensor: int, shape: Shape, stores: int) -> Counts:
        """Those of a whole matrix before any rows have come."""
        rows, width = shape
        kind = f"u{profiles.counter(rows)}"
        columns = [np.zeros(width, kind) for _ in range(stores)]
        return cls(
            tensor, 0, np.zeros((stores, rows), np.int64), columns, np.zeros((stores, 6), np.int64)
        )

    def join(self, other: Counts) -> None:
        """Take in other rows of the same matrix; ``rows`` has room for all of them."""
        self.rows[:, other.first : other.first + other.rows.shape[1]] = other.rows
        for mine, more in zip(self.columns, other.columns, strict=True):
            mine += more
        self.totals += other.totals
        for block, flags in other.begun.items():
            if block in self.begun:
                flags = flags | self.begun[block]
            self.begun[block] = flags

    def close(self) -> None:
        """After the last rows: add what of blocks lay in several pieces."""
        for flags in self.begun.values():
            self.totals[:, 1] += np.count_nonzero(flags, axis=1)
        self.begun.clear()


@dataclass(slots=True, eq=False)
class ProfileTask:
    """The chunk task: piece number -> the rows of a matrix that goes on in other pieces, if it has
    some; whole matrices go to ``whole``. Shared by the threads of a process.
    """

    said: Said
    starts: Int64  #: as in Matched, of the matrices
    shapes: Sequence[Shape]
    pieces: Sequence[tuple[int, int]]
    whole: Callable[[Counts], None]  #: what becomes of a matrix, on any thread
    on_bytes: Callable[[int], None] = lambda size: None
    #: of each thread, what counted its last matrix: memory that is there costs less than new one
    _kept: PerThread[list[_OneStore]] = field(init=False, default_factory=lambda: PerThread(list))

    def __call__(self, chunk: int, stop: threading.Event) -> Counts | None:
        """See ChunkTask. Raises StoreCorrupt and Stopped."""
        part = None
        current: _Matrix | None = None
        for tensor, start, elements, masks in self._spans(chunk, stop):
            if current is None or current.tensor != tensor:
                current = self._begin(tensor, start, chunk)
            current.add(start, elements, masks)
            if current.finished:
                counts = current.counts()
                if counts.rows.shape[1] == self.shapes[tensor][0]:
                    self.whole(counts)
                else:  # what counted them goes on with another matrix
                    counts.columns = [columns.copy() for columns in counts.columns]
                    part = counts
        return part

    def _spans(
        self, chunk: int, stop: threading.Event
    ) -> Iterator[tuple[int, int, int, list[Bytes]]]:
        """Tensor, first element, elements, and each store's bits with what follows on them."""
        layout, sources = self.said.layout, self.said.sources
        cut = WholeRows(layout, self.shapes)
        for window in walk(
            layout, self.starts, sources, *self.pieces[chunk], largest=LARGEST, cut=cut
        ):
            if stop.is_set():
                raise Stopped
            check_padding(self.said, window)
            spans = window.spans
            columns = zip(
                spans.tensors.tolist(), spans.starts.tolist(), spans.elements.tolist(),
                window.sizes.tolist(), window.places.T.tolist(), strict=True,
            )  # fmt: skip
            for tensor, start, elements, size, places in columns:
                yield tensor, start, elements, [_with_margin(window, at, size) for at in places]
            self.on_bytes(len(sources) * int(window.sizes.sum()))

    def _begin(self, tensor: int, start: int, chunk: int) -> _Matrix:
        layout, (rows, width) = self.said.layout, self.shapes[tensor]
        stop = min(rows * width, self.pieces[chunk][1] - int(layout.starts[tensor]))
        first = start // width
        kept = self._kept()
        if not kept or kept[0].width != width:
            kept.clear()  # there is room for one
            many = gathered(width, len(self.said.sources))
            kept += (_OneStore(width, many) for _ in self.said.sources)
        return _Matrix(tensor, (first, stop // width, rows), kept)


def _with_margin(window: MaskSpans, at: int, size: int) -> Bytes:
    """The bits of a span, and at least as many bytes after it as a profile may read."""
    memory = window.memory[at : at + size + profiles.MARGIN]
    if len(memory) < size + profiles.MARGIN:  # the last one of the buffer
        memory = np.concatenate([memory, np.zeros(profiles.MARGIN, np.uint8)])
    return memory


class _Matrix:
    """Some rows of a matrix that is passing by, of all stores."""

    def __init__(
        self, tensor: int, rows: tuple[int, int, int], stores: Sequence[_OneStore]
    ) -> None:
        """``rows`` are the first one, that after the last one, and how many the matrix has."""
        first, stop, height = rows
        self.tensor, self._first, self._stores = tensor, first, stores
        # whether others have rows of the same blocks
        self._shared = bool(first % BLOCK or (stop % BLOCK and stop < height))
        self._rows = np.zeros((len(stores), stop - first), np.int64)
        for store, counts in zip(stores, self._rows, strict=True):
            store.begin(first, counts)
        self._at, self._end = (row * stores[0].width for row in (first, stop))  # elements

    @property
    def finished(self) -> bool:
        """Whether all rows have come."""
        return self._at == self._end

    def add(self, start: int, elements: int, masks: Sequence[Bytes]) -> None:
        """Add the elements that follow on those before; ``start`` is a multiple of 512."""
        self._at = start + elements
        for mask, store in zip(masks, self._stores, strict=True):
            store.add(mask, start, self._at)

    def counts(self) -> Counts:
        """What was counted, once all rows have come."""
        profiled = [store.profile for store in self._stores]
        begun = {}
        if self._shared:
            begun[self._first // BLOCK] = np.stack([one.begun() for one in profiled])
        totals = np.array([[*one.finish(), *one.fours()] for one in profiled], np.int64)
        if self._shared:
            totals[:, 1] = 0
        columns = [one.columns() for one in profiled]
        return Counts(self.tensor, self._first, self._rows, columns, totals, begun)


class _OneStore:
    """The rows of one store: whole ones where they lie, and others put together in a buffer.

    Of a wide matrix, of which a window has a row or two, several rows are put together: a column
    has to be counted once for all of them.
    """

    def __init__(self, width: int, many: int) -> None:
        """``many`` is how many rows are put together."""
        self.width, self.profile = width, profiles.Profile(width)
        self._many = many
        self._bits: Bytes | None = None  # from the byte on in which the next row begins
        self.begin(0, np.zeros(0, np.int64))

    def begin(self, first: int, counts: Int64) -> None:
        """Count as many rows as ``counts`` has, from row ``first`` on; forget those of before.

        Rows of one row of blocks, if they are not all of it, are counted as its first ones: blocks
        do not end with them.
        """
        self._first, self._counts = first, counts
        self._offset = first if first % BLOCK else 0
        self._row = first  # the next one to be counted
        self.profile.clear()

    def add(self, mask: Bytes, start: int, stop: int) -> None:
        """Add the elements [start, stop) of the matrix; the first one is the first bit."""
        width, last = self.width, self._first + len(self._counts)
        while (at := self._row * width) < stop:
            whole = (stop - at) // width
            if at >= start and whole and self._many == 1:
                self._count(mask, at - start, whole)
                continue
            goal = min(self._row + self._many, last) * width
            self._keep(mask, at // 8, start // 8, min(goal, stop))
            if goal > stop or self._bits is None:
                return
            self._count(self._bits, at % 8, goal // width - self._row)

    def _keep(self, mask: Bytes, begin: int, start: int, stop: int) -> None:
        """Put bits up to ``stop`` into the buffer, which begins with byte ``begin`` of the matrix;
        ``mask`` does with ``start``.
        """
        if self._bits is None:
            self._bits = np.empty(-(-self._many * self.width // 8) + 1 + profiles.MARGIN, np.uint8)
        first, end = max(begin, start), -(-stop // 8)
        self._bits[first - begin : end - begin] = mask[first - start : end - start]

    def _count(self, mask: Bytes, bit: int, rows: int) -> None:
        """Count the rows that come next, the first of which begins at a bit of ``mask``."""
        begin = self._row - self._first
        self.profile.add(mask, bit, self._row - self._offset, self._counts[begin : begin + rows])
        self._row += rows
