"""Readers of tensors that lie inside something else: in files, or in tensors of another checkpoint.

What is in one place is read where it is. What is in pieces is gathered: a span of elements is cut
into boxes, the part of each piece inside a box is made addressable by whoever holds it, and copied.
A part whose elements lie far apart, of a transposed matrix, is copied a stretch of bytes at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from operator import add, mul, sub

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.asked import Asked
from ckdiff.checkpoints.copying import (
    BETWEEN,
    STRETCH,
    Columns,
    Copy,
    Index,
    Request,
    columns_of,
    stretches,
)
from ckdiff.checkpoints.panels import Late, Later, Panels, besides
from ckdiff.checkpoints.pieces import Contents, Piece, boxes, is_run, packed_strides
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.checkpoints.scattered import Rows
from ckdiff.checkpoints.strips import ADDRESS, NO_GRIDS, SPAN, Strips
from ckdiff.checkpoints.turned import Clusters, Turned
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import enough

_MOST_RUNS = 64  # tensors of which a reader knows the pieces in order
_MOST_REQUESTS = 128  # of a window that is remembered between asking ahead and reading


class Located:
    """A SpanReader of tensors that are each packed in one place of what ``inner`` reads."""

    def __init__(
        self, inner: SpanReader, file_index: npt.NDArray[np.int32], offset: IntArray
    ) -> None:
        self._inner = inner
        self._file_index = file_index
        self._offset = offset

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. Nothing is copied."""
        return self._inner.acquire(*self._at(tensors, starts), nbytes)

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        self._inner.prefetch(*self._at(tensors, starts), nbytes)

    def _at(self, tensors: IntArray, starts: IntArray) -> tuple[IntArray, IntArray]:
        return self._file_index[tensors].astype(np.int64), self._offset[tensors] + starts

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()


@dataclass(slots=True)
class _Wanted:
    """What a window asks of the inner reader, and what is copied from it then."""

    columns: Columns
    straight: list[tuple[int, int]]  #: (span, request) of those that are read where they are
    gathered: list[tuple[int, int]]  #: (span, byte of the buffer)
    copies: list[Copy]
    far: list[tuple[Copy, Request]]  #: copied before, a stretch at a time
    buffer: int  #: bytes
    grids: IntArray  #: of those that are given row by row
    first: int  #: the request for the first grid; those for the others follow
    #: those that are copied while they are compared, each with its request
    late: list[tuple[Later, int]]


class PieceReader:
    """A SpanReader of tensors of which some are in pieces; one for each worker."""

    def __init__(
        self,
        inner: SpanReader,
        contents: Contents,
        clusters: Clusters | None = None,
        *,
        mapped: bool = False,
    ) -> None:
        """``clusters`` are those of the contents, see :mod:`ckdiff.checkpoints.turned`; ``mapped``
        says that ``inner`` takes no memory, however much it is asked for.
        """
        self._inner = inner
        self._contents = contents
        self._turned = Turned(inner, contents, clusters) if clusters and clusters.of else None
        self._buffer = np.empty(0, np.uint8)
        self._coming = Asked[_Wanted]()
        self._runs: dict[int, _Runs | None] = {}  # of the tensors that were asked for last
        self._strips: dict[int, Strips | None] = {}
        self._in_rows = False
        self._mapped, self._in_panels = mapped, False
        self._panels = Panels(contents)
        self._room = np.empty(0, np.uint8)
        #: of the spans of a window that have no address; see :mod:`ckdiff.checkpoints.strips`
        self.grids = NO_GRIDS
        self.rows: Rows | None = None  #: of those of them that have to be copied before
        self.late: list[Late] = []  #: how, in order

    def give_rows(self) -> None:
        """From now on do not gather what has long rows: its spans get the address 0, and ``grids``
        say where they are. Each row begins with a hashed unit of the tensor.
        """
        self._in_rows = True

    @property
    def turns(self) -> bool:
        """Whether it has tensors whose rows are scattered."""
        return self._turned is not None

    def give_panels(self) -> None:
        """From now on do not gather what lies turned: its spans get the address 0, ``rows`` say
        where they will be and ``late`` what is copied then, all of it and in order, before the
        release; if that costs no memory.
        """
        self._in_panels = self._mapped

    @staticmethod
    def memory(window: int) -> int:
        """Bytes that a reader takes at most for windows of so many bytes."""
        return window + (1 << 19)

    @staticmethod
    def asked(window: int) -> int:
        """Bytes that it asks of its source at a time, at most, for windows of so many bytes."""
        return max(window, STRETCH) + BETWEEN

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        late = self._later(tensors, starts, nbytes)
        if self._turned is None:
            return self._acquire(tensors, starts, nbytes, late)
        found = self._turned.gather(tensors, starts, nbytes, besides(late, len(tensors)))
        rest = np.where(found == 0, nbytes, 0)
        return np.where(found == 0, self._acquire(tensors, starts, rest, late), found)

    def _acquire(
        self, tensors: IntArray, starts: IntArray, nbytes: IntArray, late: list[Later]
    ) -> IntArray:
        """The same for spans that are read by themselves."""
        wanted = self._coming.take(tensors, starts, nbytes)
        if wanted is None:
            wanted = self._wanted(tensors, starts, nbytes, late)
        if wanted.buffer > len(self._buffer):
            self._buffer = np.empty(wanted.buffer, np.uint8)
        base = self._buffer.ctypes.data
        for copies, columns in stretches(wanted.far, max(int(nbytes.sum()), STRETCH)):
            addresses = self._inner.acquire(*columns)
            for copy, address in zip(copies, addresses.tolist(), strict=True):
                copy.run(address, base + copy.begin)
            self._inner.release()
        found = self._inner.acquire(*wanted.columns).tolist()
        for copy in wanted.copies:
            copy.run(found[copy.request], base + copy.begin)
        self.grids = wanted.grids
        self.grids[:, ADDRESS] = found[wanted.first : wanted.first + len(wanted.grids)]
        parts = self._cut(wanted.late, found)
        self.rows = Rows.joined(sorted(parts, key=lambda part: int(part.spans[0])))
        addresses = np.zeros(len(tensors), np.int64)
        for span, request in wanted.straight:
            addresses[span] = found[request]
        for span, begin in wanted.gathered:
            addresses[span] = base + begin
        return addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        late = self._later(tensors, starts, nbytes)
        if self._turned is not None:
            here = self._turned.has(tensors) & besides(late, len(tensors))
            nbytes = np.where(here, 0, nbytes)
        wanted = self._wanted(tensors, starts, nbytes, late)
        if len(wanted.columns[0]) + len(wanted.far) <= _MOST_REQUESTS:
            self._coming.note(wanted, tensors, starts, nbytes)
        self._inner.prefetch(*wanted.columns)

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()
        self._coming.clear()
        self._buffer = self._room = np.empty(0, np.uint8)
        if self._turned is not None:
            self._turned.close()

    def _later(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> list[Later]:
        """Which of these spans are copied panel by panel."""
        return self._panels.of(tensors, starts, nbytes) if self._in_panels else []

    def _cut(self, late: list[tuple[Later, int]], found: list[int]) -> list[Rows]:
        """Say of spans what has to be copied, all to one place, and where they are then."""
        self._room = enough(self._room, max((later.room for later, _ in late), default=0))
        self.late, rows = [], []
        for later, request in late:
            of_span, copied = later.cut(found[request], self._room)
            rows.append(of_span)
            self.late += copied
        return rows

    def _width(self, tensor: int) -> int:
        table = self._contents.table
        return int(table.nbytes[tensor]) // max(prod(table.shapes[tensor]), 1)

    def _runs_of(self, tensor: int) -> _Runs | None:
        """A tensor's pieces in order; None where they are not runs of its elements."""
        if tensor not in self._runs:
            if len(self._runs) == _MOST_RUNS:
                self._runs.clear()
            shape, pieces = self._contents.table.shapes[tensor], self._contents.pieces[tensor]
            self._runs[tensor] = _Runs.of(shape, pieces)
        return self._runs[tensor]

    def _strips_of(self, tensor: int) -> Strips | None:
        """A tensor's parts, where it is cut across long rows."""
        if tensor not in self._contents.pieces:
            return None
        if tensor not in self._strips:
            if len(self._strips) == _MOST_RUNS:
                self._strips.clear()
            shape, pieces = self._contents.table.shapes[tensor], self._contents.pieces[tensor]
            self._strips[tensor] = Strips.of(shape, pieces, self._width(tensor))
        return self._strips[tensor]

    def _near(self, tensor: int, first: int, stop: int) -> tuple[Piece, ...]:
        """Those of a tensor's pieces that may have some of these elements."""
        runs = self._runs_of(tensor)
        return self._contents.pieces[tensor] if runs is None else runs.between(first, stop)

    def _place(self, tensor: int, start: int, size: int) -> tuple[int, int] | None:
        """(source, byte) of a span that is in one place."""
        held = self._contents
        if tensor not in held.pieces:
            return int(held.file_index[tensor]), int(held.offset[tensor]) + start
        width = self._width(tensor)
        pieces = self._near(tensor, start // width, -(-(start + size) // width))
        return _run(held.table.shapes[tensor], pieces, start, size, width)

    def _wanted(
        self, tensors: IntArray, starts: IntArray, nbytes: IntArray, later: list[Later]
    ) -> _Wanted:
        straight, gathered, copies, far, at = [], [], [], [], 0
        late = [(each, at) for at, each in enumerate(later)]
        requests = [each.request for each in later]
        done = {each.place for each in later}
        grids, asked, between = self._in_grids(tensors, starts, nbytes, done)
        begin = len(requests)
        requests += asked
        columns = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for span, (tensor, start, size) in enumerate(columns):
            if span in done:
                continue
            place = self._place(tensor, start, size)
            if place is not None:
                straight.append((span, len(requests)))
                requests.append((*place, size))
                continue
            width = self._width(tensor)
            first, stop = start // width, -(-(start + size) // width)
            pieces = self._near(tensor, first, stop)
            parts = _copies(self._contents.table.shapes[tensor], pieces, first, stop, width)
            gathered.append((span, at + start - first * width))
            for copy, request in parts:
                copy.begin += at
                if between + _idle((copy, request)) > BETWEEN:
                    far.append((copy, request))
                    continue
                between += _idle((copy, request))
                copies.append(copy.asked(requests, request))
            at += -(-(stop - first) * width // 64) * 64
        wanted = columns_of(requests)
        return _Wanted(wanted, straight, gathered, copies, far, at, grids, begin, late)

    def _in_grids(
        self, tensors: IntArray, starts: IntArray, nbytes: IntArray, done: set[int]
    ) -> tuple[IntArray, list[Request], int]:
        """What is given row by row, which is ``done`` then: grids, what is asked for each, and the
        bytes of that which nobody wants.
        """
        found, requests, idle = [NO_GRIDS], list[Request](), 0
        spans = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for span, (tensor, start, size) in enumerate(spans if self._in_rows else ()):
            strips = self._strips_of(tensor) if size and span not in done else None
            if strips is None or start % (UNIT * strips.width):
                continue
            first, stop = start // strips.width, -(-(start + size) // strips.width)
            grids, asked, between = strips.between(first, stop)
            if idle + between <= BETWEEN:
                idle += between
                done.add(span)
                grids[:, SPAN] = span
                found.append(grids)
                requests += asked
        return np.concatenate(found), requests, idle


@dataclass(slots=True)
class _Runs:
    """The pieces of a tensor, each a run of its elements, in order: to look at a few of many."""

    starts: list[int]  #: the first element of each
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, shape: Index, pieces: tuple[Piece, ...]) -> _Runs | None:
        """Of the pieces that have elements; None where one of them is no run."""
        steps = packed_strides(shape)
        found = []
        for piece in pieces:
            if not is_run(shape, piece):
                return None
            if prod(piece.shape):
                found.append((sum(a * s for a, s in zip(piece.at, steps, strict=True)), piece))
        found.sort(key=lambda pair: pair[0])
        return cls([start for start, _ in found], tuple(piece for _, piece in found))

    def between(self, first: int, stop: int) -> tuple[Piece, ...]:
        """Those that have some of the elements [first, stop), or the one at ``first``."""
        low = max(bisect_right(self.starts, first) - 1, 0)
        return self.pieces[low : max(bisect_right(self.starts, stop - 1), low + 1)]


def _run(
    shape: Index, pieces: tuple[Piece, ...], start: int, size: int, width: int
) -> tuple[int, int] | None:
    """(source, byte) of a span that is one run of bytes of one piece, whole elements or not."""
    if not size:
        return (pieces[0].source, pieces[0].begin) if pieces else (0, 0)
    first, last = start // width, (start + size - 1) // width
    ends = _index(shape, first), _index(shape, last)
    for piece in pieces:
        inside = [tuple(i - a for i, a in zip(index, piece.at, strict=True)) for index in ends]
        if not all(0 <= i < n for index in inside for i, n in zip(index, piece.shape, strict=True)):
            continue
        # a run of the tensor that stays in the piece is one of the piece where both count alike
        places = [sum(i * s for i, s in zip(index, piece.strides, strict=True)) for index in inside]
        lead = next((i for i, n in enumerate(piece.shape) if n != 1), len(shape))
        whole = piece.packed and piece.shape[lead + 1 :] == shape[lead + 1 :]
        if first == last or (whole and places[1] - places[0] == last - first):
            return piece.source, piece.begin + places[0] * width + start % width
        return None
    return None


def _index(shape: Index, element: int) -> Index:
    found = []
    for size in reversed(shape):
        element, rest = divmod(element, size)
        found.append(rest)
    return tuple(reversed(found))


def _copies(
    shape: Index, pieces: tuple[Piece, ...], first: int, stop: int, width: int
) -> Iterator[tuple[Copy, Request]]:
    """What to copy for the elements [first, stop), and (source, begin, bytes) of each."""
    steps = packed_strides(shape)
    for at, extent in boxes(shape, first, stop):
        ends = tuple(map(add, at, extent))
        for piece in pieces:
            low = tuple(map(max, at, piece.at))
            high = map(min, ends, map(add, piece.at, piece.shape))
            part = tuple(map(sub, high, low))
            if min(part, default=1) <= 0:
                continue
            offset = sum(map(mul, map(sub, low, piece.at), piece.strides))
            into = sum(map(mul, low, steps)) - first
            copy = Copy(0, into * width, part, piece.strides, steps, width)
            yield copy, (piece.source, piece.begin + offset * width, copy.reach)


def _idle(part: tuple[Copy, Request]) -> int:
    """Bytes that are asked for, and not copied."""
    return max(0, part[1][2] - prod(part[0].shape) * part[0].width)
