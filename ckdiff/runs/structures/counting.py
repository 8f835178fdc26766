"""Walking the masks of matrices row by row: the chunk task of ``structure``.

Matrices are dealt out in pieces: several small ones, or some rows of a large one. Pieces of one
matrix begin at multiples of 512 rows, so that no block of 128 x 128 lies in two of them, and that a
piece begins with a whole 64 bytes of mask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckdiff.kernels import profiles
from ckdiff.kernels.memory import Bytes, Int64
from ckdiff.layout import Layout
from ckdiff.running.threads import Stopped
from ckdiff.stores.maskwalk import MaskSpans, walk, working_memory
from ckdiff.stores.tally import Said, Tally, Waiting

Shape = tuple[int, int]  # of a matrix: rows, columns

_PIECE = 1 << 25  # elements
_ROWS = 512  # at whose multiples pieces of a matrix begin
_WIDE = 1 << 19  # columns from which on several rows are put together
_GATHERED = 16  # rows


@dataclass(slots=True, eq=False)
class Counts:
    """What was counted of some rows of a matrix, in each store."""

    tensor: int  #: position in the layout
    first: int  #: row
    rows: Int64  #: (stores, rows): changed elements of each row
    columns: Int64  #: (stores, columns)
    #: (stores, 6): blocks of 16 x 16 and of 128 x 128 with changed elements, then the whole fours
    #: of a row with at least 1, 2, 3 and 4
    totals: Int64

    def join(self, other: Counts) -> None:
        """Take in other rows of the same matrix; ``rows`` has room for all of them."""
        self.rows[:, other.first : other.first + other.rows.shape[1]] = other.rows
        self.columns += other.columns
        self.totals += other.totals


@dataclass(slots=True, eq=False)
class Part:
    """What one piece gave, but for whole matrices, which went to ``whole``."""

    rows: Counts | None = None  #: of a matrix that goes on in other pieces
    ones: Waiting = field(default_factory=dict)


def pieces(layout: Layout, shapes: Sequence[Shape], size: int = _PIECE) -> list[tuple[int, int]]:
    """Ranges of addresses [first, stop), in order; all elements lie in one of them."""
    found: list[tuple[int, int]] = []
    begin = end = 0
    rows = zip(layout.starts.tolist(), layout.elements.tolist(), shapes, strict=True)
    for start, elements, (_, width) in rows:
        if begin < end and start + elements - begin > size:
            found.append((begin, end))
            begin = start
        end = start + elements
        step = max(size // max(1, width) // _ROWS, 1) * _ROWS * width
        while end - begin > size and begin + step < end:
            found.append((begin, begin + step))
            begin += step
        if begin > start:  # the rest of a matrix is a piece by itself
            found.append((begin, end))
            begin = end = start + -(-elements // 512) * 512
    if begin < end:
        found.append((begin, end))
    return found


def worker_memory(shapes: Sequence[Shape], stores: int) -> int:
    """Bytes that a worker needs: a walk, and the counts of the matrix with most of them."""
    most = max((profiles.memory(width) + 8 * rows for rows, width in shapes), default=0)
    gathered = max(((_GATHERED if w > _WIDE else 1) * w // 8 for _, w in shapes), default=0)
    # and what figures are made with
    return working_memory(stores) + stores * (most + gathered) + 3 * most


@dataclass(slots=True, eq=False)
class ProfileTask:
    """The chunk task: piece number -> Part. Shared by the threads of a process."""

    said: Said
    starts: Int64  #: as in Matched, of the matrices
    shapes: Sequence[Shape]
    pieces: Sequence[tuple[int, int]]
    whole: Callable[[Counts], None]  #: what becomes of a matrix, on any thread
    on_bytes: Callable[[int], None] = lambda size: None

    def __call__(self, chunk: int, stop: threading.Event) -> Part:
        """See ChunkTask. Raises StoreCorrupt and Stopped."""
        part, tally = Part(), Tally(self.said)
        current: _Matrix | None = None
        for tensor, start, elements, masks in self._spans(chunk, tally, stop):
            if current is None or current.tensor != tensor:
                current = self._begin(tensor, start, chunk)
            current.add(start, elements, masks)
            if current.finished:
                counts = current.counts()
                if counts.rows.shape[1] == self.shapes[tensor][0]:
                    self.whole(counts)
                else:
                    part.rows = counts
        part.ones = tally.waiting
        return part

    def _spans(
        self, chunk: int, tally: Tally, stop: threading.Event
    ) -> Iterator[tuple[int, int, int, list[Bytes]]]:
        """Tensor, first element, elements, and each store's bits with what follows on them."""
        layout, sources = self.said.layout, self.said.sources
        for window in walk(layout, self.starts, sources, *self.pieces[chunk]):
            if stop.is_set():
                raise Stopped
            tally.add(window)
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
        return _Matrix(tensor, first, (stop // width - first, width), len(self.said.sources))


def _with_margin(window: MaskSpans, at: int, size: int) -> Bytes:
    """The bits of a span, and at least as many bytes after it as a profile may read."""
    memory = window.memory[at : at + size + profiles.MARGIN]
    if len(memory) < size + profiles.MARGIN:  # the last one of the buffer
        memory = np.concatenate([memory, np.zeros(profiles.MARGIN, np.uint8)])
    return memory


class _Matrix:
    """Some rows of a matrix that is passing by, of all stores."""

    def __init__(self, tensor: int, first: int, shape: Shape, stores: int) -> None:
        self.tensor, self._first, (rows, self._width) = tensor, first, shape
        self._rows = np.zeros((stores, rows), np.int64)
        self._stores = [_OneStore(self._width, first, counts) for counts in self._rows]
        self._at = first * self._width  # element

    @property
    def finished(self) -> bool:
        """Whether all rows have come."""
        return self._at == (self._first + self._rows.shape[1]) * self._width

    def add(self, start: int, elements: int, masks: Sequence[Bytes]) -> None:
        """Add the elements that follow on those before."""
        column = start % self._width
        head = min(self._width - column, elements) if column else 0
        whole, tail = divmod(elements - head, self._width)
        for mask, store in zip(masks, self._stores, strict=True):
            if self._width > _WIDE:
                store.gather(mask, 0, elements)
                continue
            store.gather(mask, 0, head)
            store.add(mask, head, whole)
            store.gather(mask, head + whole * self._width, tail)
        self._at = start + elements

    def counts(self) -> Counts:
        """What was counted, once all rows have come."""
        totals, columns = zip(*(store.finish() for store in self._stores), strict=True)
        return Counts(
            self.tensor, self._first, self._rows, np.stack(columns), np.array(totals, np.int64)
        )


class _OneStore:
    """The rows of one store: whole ones where they lie, and others put together in a buffer.

    Of a wide matrix, of which a window has a row or two, several rows are put together: a column
    has to be counted once for all of them.
    """

    def __init__(self, width: int, first: int, counts: Int64) -> None:
        self._width, self._first, self._counts = width, first, counts
        self._profile = profiles.Profile(width)
        self._row = 0  # the next one to be added
        self._room = width * (_GATHERED if width > _WIDE else 1)
        self._bits: Bytes | None = None
        self._filled = 0

    def add(self, mask: Bytes, bit: int, rows: int) -> None:
        """Add whole rows, the first of which begins at a bit of ``mask``."""
        if rows:
            first = self._row
            counts = self._counts[first : first + rows]
            self._profile.add(mask, bit, self._first + first, counts)
            self._row += rows

    def gather(self, mask: Bytes, bit: int, elements: int) -> None:
        """Add the next elements, which need not be whole rows."""
        if self._bits is None and elements:
            self._bits = np.zeros(-(-self._room // 8) + profiles.MARGIN, np.uint8)
        while elements and self._bits is not None:
            step = min(elements, self._room - self._filled)
            _put(self._bits, self._filled, mask, bit, step)
            self._filled += step
            if self._filled == self._room:
                self._flush()
            bit, elements = bit + step, elements - step

    def _flush(self) -> None:
        if self._filled and self._bits is not None:
            self.add(self._bits, 0, self._filled // self._width)
            self._bits[:] = 0
            self._filled = 0

    def finish(self) -> tuple[list[int], Int64]:
        """Totals and columns, once all rows have come."""
        self._flush()
        return [*self._profile.finish(), *self._profile.fours()], self._profile.columns()


def _put(target: Bytes, at: int, mask: Bytes, bit: int, elements: int) -> None:
    """Set the bits of ``target`` from ``at`` on, which are zero, to those of ``mask``."""
    begin, shift = divmod(at, 8)
    piece = _bits(mask, bit, elements)
    if shift:
        bits = np.unpackbits(piece, count=elements, bitorder="little")
        piece = np.packbits(np.concatenate([np.zeros(shift, np.uint8), bits]), bitorder="little")
    target[begin : begin + len(piece)] |= piece


def _bits(mask: Bytes, bit: int, elements: int) -> Bytes:
    """A copy of some bits of a mask that begins with the first one; bits past the end are 0."""
    first, shift = divmod(bit, 8)
    piece = mask[first : -(-(bit + elements) // 8)].copy()
    if shift:
        bits = np.unpackbits(piece, bitorder="little")[shift : shift + elements]
        return np.packbits(bits, bitorder="little")
    if elements % 8:
        piece[-1] &= (1 << elements % 8) - 1
    return piece
