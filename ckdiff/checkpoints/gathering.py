"""Readers of tensors that lie inside something else: in files, or in tensors of another checkpoint.

What is in one place is read where it is. What is in pieces is gathered: a span of elements is cut
into boxes, the part of each piece inside a box is made addressable by whoever holds it, and copied.
A part whose elements lie far apart, of a transposed matrix, is copied a stretch of bytes at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.pieces import Contents, Piece, boxes, is_run, packed_strides
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.checkpoints.scattered import Rows, in_units, steps
from ckdiff.kernels import strided
from ckdiff.kernels.memory import bytes_at

_Index = tuple[int, ...]
_MOST_RUNS = 64  # tensors of which a reader knows the pieces in order
#: windows that are remembered between asking ahead and reading, and what each has of requests
_MOST_COMING, _MOST_REQUESTS = 4, 128
#: bytes of a window that may be read for nothing, because they lie between what is copied
_BETWEEN = 1 << 18
#: bytes that are read at a time of what lies farther apart, at least: else as many as the window's
_STRETCH = 1 << 20


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


_Request = tuple[int, int, int]  #: (source, begin, bytes)


@dataclass(slots=True)
class _Copy:
    """The part of a piece that is copied, as two strided views of elements."""

    request: int  #: which of what is acquired holds it
    begin: int  #: byte of the buffer at which its first element goes
    shape: _Index
    strides: _Index  #: elements in the source
    into: _Index  #: elements in the buffer
    width: int  #: bytes of an element

    def asked(self, requests: list[_Request], request: _Request) -> _Copy:
        """Itself, once ``request`` is one more of those."""
        self.request = len(requests)
        requests.append(request)
        return self


@dataclass(slots=True)
class _Wanted:
    """What a window asks of the inner reader, and what is copied from it then."""

    columns: tuple[IntArray, IntArray, IntArray]
    straight: list[tuple[int, int]]  #: (span, request) of those that are read where they are
    gathered: list[tuple[int, int]]  #: (span, byte of the buffer)
    copies: list[_Copy]
    far: list[tuple[_Copy, _Request]]  #: copied before, a stretch at a time
    buffer: int  #: bytes
    rows: list[tuple[int, _Copy]]  #: (span, part of it) of those that are given row by row


class PieceReader:
    """A SpanReader of tensors of which some are in pieces; one for each worker."""

    def __init__(self, inner: SpanReader, contents: Contents) -> None:
        self._inner = inner
        self._contents = contents
        self._buffer = np.empty(0, np.uint8)
        self._coming: dict[bytes, _Wanted] = {}  # windows that were asked for ahead
        self._runs: dict[int, _Runs | None] = {}  # of the tensors that were asked for last
        self._in_rows = False
        self.rows: Rows | None = None  #: of the spans of a window that have no address

    def give_rows(self) -> None:
        """From now on do not gather what has long rows: its spans get the address 0, and ``rows``
        say where they are. Each begins with a hashed unit of the tensor.
        """
        self._in_rows = True

    @staticmethod
    def memory(window: int) -> int:
        """Bytes that a reader takes at most for windows of so many bytes."""
        return window + (1 << 19)

    @staticmethod
    def asked(window: int) -> int:
        """Bytes that it asks of its source at a time, at most, for windows of so many bytes."""
        return max(window, _STRETCH) + _BETWEEN

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        wanted = self._coming.pop(_key(tensors, starts, nbytes), None)
        if wanted is None:
            wanted = self._wanted(tensors, starts, nbytes)
        if wanted.buffer > len(self._buffer):
            self._buffer = np.empty(wanted.buffer, np.uint8)
        base = self._buffer.ctypes.data
        for copies, columns in _stretches(wanted.far, max(int(nbytes.sum()), _STRETCH)):
            addresses = self._inner.acquire(*columns)
            for copy, address in zip(copies, addresses.tolist(), strict=True):
                _copy(copy, address, base + copy.begin)
            self._inner.release()
        found = self._inner.acquire(*wanted.columns).tolist()
        for copy in wanted.copies:
            _copy(copy, found[copy.request], base + copy.begin)
        self.rows = Rows.joined([_rows(*part, found) for part in wanted.rows])
        addresses = np.zeros(len(tensors), np.int64)
        for span, request in wanted.straight:
            addresses[span] = found[request]
        for span, begin in wanted.gathered:
            addresses[span] = base + begin
        return addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        wanted = self._wanted(tensors, starts, nbytes)
        if len(wanted.columns[0]) + len(wanted.far) <= _MOST_REQUESTS:
            while len(self._coming) >= _MOST_COMING:
                del self._coming[next(iter(self._coming))]
            self._coming[_key(tensors, starts, nbytes)] = wanted
        self._inner.prefetch(*wanted.columns)

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()
        self._coming.clear()
        self._buffer = np.empty(0, np.uint8)

    def _runs_of(self, tensor: int) -> _Runs | None:
        """A tensor's pieces in order; None where they are not runs of its elements."""
        if tensor not in self._runs:
            if len(self._runs) == _MOST_RUNS:
                self._runs.clear()
            shape, pieces = self._contents.table.shapes[tensor], self._contents.pieces[tensor]
            self._runs[tensor] = _Runs.of(shape, pieces)
        return self._runs[tensor]

    def _wanted(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> _Wanted:
        requests: list[_Request] = []
        straight, gathered, copies, far, rows, at, between = [], [], [], [], [], 0, 0
        contents = self._contents
        columns = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for span, (tensor, start, size) in enumerate(columns):
            pieces = contents.pieces.get(tensor)
            if pieces is None:
                place = int(contents.file_index[tensor]), int(contents.offset[tensor]) + start
                straight.append((span, len(requests)))
                requests.append((*place, size))
                continue
            shape = contents.table.shapes[tensor]
            width = int(contents.table.nbytes[tensor]) // max(prod(shape), 1)
            runs = self._runs_of(tensor)
            if runs is not None:
                pieces = runs.between(start // width, -(-(start + size) // width))
            run = _run(shape, pieces, start, size, width)
            if run is not None:
                straight.append((span, len(requests)))
                requests.append((*run, size))
                continue
            first, stop = start // width, -(-(start + size) // width)
            parts = list(_copies(shape, pieces, first, stop, width))
            in_rows = self._in_rows and start == first * width
            if in_rows and _are_rows(parts, first, _BETWEEN - between):
                between += sum(map(_idle, parts))
                rows += [(span, copy.asked(requests, request)) for copy, request in parts]
                continue
            gathered.append((span, at + start - first * width))
            for copy, request in parts:
                copy.begin += at
                if between + _idle((copy, request)) > _BETWEEN:
                    far.append((copy, request))
                    continue
                between += _idle((copy, request))
                copies.append(copy.asked(requests, request))
            at += -(-(stop - first) * width // 64) * 64
        return _Wanted(_columns(requests), straight, gathered, copies, far, at, rows)


def _key(*columns: IntArray) -> bytes:
    return b"".join(column.tobytes() for column in columns)


def _columns(requests: list[_Request]) -> tuple[IntArray, IntArray, IntArray]:
    numbers = np.array(requests, np.int64).reshape(-1, 3)
    sources, begins, sizes = (np.ascontiguousarray(column) for column in numbers.T)
    return sources, begins, sizes


def _stretches(
    far: list[tuple[_Copy, _Request]], most: int
) -> Iterator[tuple[list[_Copy], tuple[IntArray, IntArray, IntArray]]]:
    """What to copy from stretches of the sources that have ``most`` bytes together."""
    copies: list[_Copy] = []
    requests: list[_Request] = []
    room = most
    for whole, request in far:
        for copy, begin, size in _parts(whole, most):
            if size > room and copies:
                yield copies, _columns(requests)
                copies, requests, room = [], [], most
            copies.append(copy)
            requests.append((request[0], request[1] + begin, size))
            room -= size
    if copies:
        yield copies, _columns(requests)


def _parts(copy: _Copy, most: int) -> Iterator[tuple[_Copy, int, int]]:
    """A copy in parts that reach over ``most`` bytes of the source at most; where each begins
    there, counted from the copy's first byte, and its bytes.
    """
    width = copy.width
    reach = (1 + _last(copy.shape, copy.strides)) * width
    if reach <= most or prod(copy.shape) == 1:
        yield copy, 0, reach
        return
    # cut where the steps are the longest
    long = max(range(len(copy.shape)), key=lambda i: (copy.shape[i] > 1, copy.strides[i]))
    step = copy.strides[long] * width
    rest = reach - (copy.shape[long] - 1) * step
    count = max(1, (most - rest) // step + 1)
    for first in range(0, copy.shape[long], count):
        shape = list(copy.shape)
        shape[long] = min(count, shape[long] - first)
        begin = copy.begin + first * copy.into[long] * width
        part = replace(copy, begin=begin, shape=tuple(shape))
        for inner, at, size in _parts(part, most):
            yield inner, first * step + at, size


def _last(shape: _Index, strides: _Index) -> int:
    """Elements from the first of a box to its last."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


@dataclass(slots=True)
class _Runs:
    """The pieces of a tensor, each a run of its elements, in order: to look at a few of many."""

    starts: list[int]  #: the first element of each
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, shape: _Index, pieces: tuple[Piece, ...]) -> _Runs | None:
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
    shape: _Index, pieces: tuple[Piece, ...], start: int, size: int, width: int
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


def _index(shape: _Index, element: int) -> _Index:
    found = []
    for size in reversed(shape):
        element, rest = divmod(element, size)
        found.append(rest)
    return tuple(reversed(found))


def _copies(
    shape: _Index, pieces: tuple[Piece, ...], first: int, stop: int, width: int
) -> Iterator[tuple[_Copy, _Request]]:
    """What to copy for the elements [first, stop), and (source, begin, bytes) of each."""
    steps = packed_strides(shape)
    for at, extent in boxes(shape, first, stop):
        for piece in pieces:
            low = tuple(map(max, at, piece.at))
            high = tuple(
                min(a + e, b + n)
                for a, e, b, n in zip(at, extent, piece.at, piece.shape, strict=True)
            )
            part = tuple(h - n for h, n in zip(high, low, strict=True))
            if any(n <= 0 for n in part):
                continue
            offset = sum((n - a) * s for n, a, s in zip(low, piece.at, piece.strides, strict=True))
            reach = 1 + _last(part, piece.strides)
            into = sum(n * s for n, s in zip(low, steps, strict=True)) - first
            request = piece.source, piece.begin + offset * width, reach * width
            yield _Copy(0, into * width, part, piece.strides, steps, width), request


def _idle(part: tuple[_Copy, _Request]) -> int:
    """Bytes that are asked for, and not copied."""
    return max(0, part[1][2] - prod(part[0].shape) * part[0].width)


def _are_rows(parts: list[tuple[_Copy, _Request]], first: int, most: int) -> bool:
    """Whether what there is from element ``first`` on can be given row by row, with so many idle
    bytes.
    """
    return sum(map(_idle, parts)) <= most and all(
        in_units(first + copy.begin // copy.width, copy.shape, copy.strides, copy.into)
        for copy, _ in parts
    )


def _rows(span: int, copy: _Copy, found: list[int]) -> Rows:
    source, to = steps(copy.shape, copy.strides, copy.into)
    spans = np.full(len(to), span, np.int64)
    return Rows(spans, copy.begin + to * copy.width, found[copy.request] + source * copy.width)


def _copy(copy: _Copy, source: int, into: int) -> None:
    reach, room = (
        (1 + _last(copy.shape, strides)) * copy.width for strides in (copy.strides, copy.into)
    )
    strided.copy(
        bytes_at(source, reach), bytes_at(into, room, writable=True),
        copy.shape, copy.strides, copy.into, copy.width,
    )  # fmt: skip
