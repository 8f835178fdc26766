"""Reading quantised tensors by value, span by span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.checkpoints.views.blockscaleturned import values_turned
from ckdiff.checkpoints.views.quantised import Scaled
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.scaling import Scaling, scale

_PIECE = 1 << 18  # elements that are scaled at a time: their scales may have to be widened
_SPARE = 16  # scales beyond one for each element that a part may need
_FLOAT = 4  # bytes of a value
#: bytes of what is computed with besides the values: widened scales, or groups to be turned
SCRATCH = 4 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements of one tensor that are scaled together."""

    scaling: Scaling
    first: int
    stop: int
    low: int  #: the first of the scales that are asked for
    request: int  #: which of what is acquired are the elements; the scales follow
    into: int  #: byte of the buffer


@dataclass(slots=True)
class Wanted:
    """What a window asks of the inner reader, and what is made of it then."""

    requests: list[tuple[int, int, int]]  #: tensor, first byte, bytes
    straight: list[tuple[int, int]]  #: (span, request) of those that are read where they are
    made: list[tuple[int, int]]  #: (span, byte of the buffer)
    parts: list[_Part]
    turned: list[tuple[Scaled, int, int, int]]  #: first and last element, byte of the buffer
    buffer: int = 0  #: bytes

    @property
    def columns(self) -> tuple[IntArray, IntArray, IntArray]:
        numbers = np.array(self.requests, np.int64).reshape(-1, 3)
        tensors, starts, nbytes = (np.ascontiguousarray(column) for column in numbers.T)
        return tensors, starts, nbytes


class ScaledReader:
    """A SpanReader; one for each worker.

    ``inner`` reads what is held until the release; ``aside``, given where there are turned tensors,
    another reader of the same, reads those, of which nothing is held.
    """

    def __init__(
        self,
        within: IntArray,
        scaled: Mapping[int, Scaled],
        inner: SpanReader,
        aside: SpanReader | None,
    ) -> None:
        self._within, self._scaled = within, scaled
        self._inner, self._aside = inner, aside
        self._buffer = np.empty(0, np.uint8)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. Values are in a buffer of this reader."""
        wanted = self._wanted(tensors, starts, nbytes)
        columns = wanted.columns
        found = self._inner.acquire(*columns).tolist()
        if len(self._buffer) < wanted.buffer:
            self._buffer = np.empty(0, np.uint8)  # not both at once
            self._buffer = np.empty(wanted.buffer, np.uint8)
        sizes = columns[2].tolist()
        for part in wanted.parts:
            held = [bytes_at(found[i], sizes[i]) for i in (part.request, part.request + 1)]
            _scale(part, held[0], held[1], self._buffer[part.into :])
        for how, first, stop, into in wanted.turned:
            assert self._aside is not None
            out = self._buffer[into : into + _FLOAT * (stop - first)].view(np.float32)
            values_turned(self._aside, how, first, stop, out)
        addresses = np.zeros(len(tensors), np.int64)
        for span, request in wanted.straight:
            addresses[span] = found[request]
        base = self._buffer.ctypes.data
        for span, begin in wanted.made:
            addresses[span] = base + begin
        return addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader: elements and scales, but not of what is turned."""
        self._inner.prefetch(*self._wanted(tensors, starts, nbytes).columns)

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()
        if self._aside is not None:
            self._aside.close()
        self._buffer = np.empty(0, np.uint8)

    def _wanted(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> Wanted:
        return wanted(self._within, self._scaled, (tensors, starts, nbytes))


def wanted(
    within: IntArray, scaled: Mapping[int, Scaled], spans: tuple[IntArray, IntArray, IntArray]
) -> Wanted:
    """What has to be read for spans of tensors, that of turned ones aside."""
    found = Wanted([], [], [], [], [])
    rows = (column.tolist() for column in (*spans, within[spans[0]]))
    for span, (tensor, start, size, source) in enumerate(zip(*rows, strict=True)):
        how = scaled.get(tensor)
        if how is None:
            found.straight.append((span, len(found.requests)))
            found.requests.append((source, start, size))
            continue
        first, stop = start // _FLOAT, -(-(start + size) // _FLOAT) if size else 0
        if stop and how.scaling is not None and not how.turned:
            bits = DTYPES[how.scaling.dtype].bits
            first = first * bits // 8 * 8 // bits  # where a byte begins
        found.made.append((span, found.buffer + (start - _FLOAT * first if size else 0)))
        if size:
            _ask(found, how, first, stop)
    return found


def _ask(wanted: Wanted, how: Scaled, first: int, stop: int) -> None:
    """Ask for what the elements [first, stop) are made of; their values go to the buffer."""
    scaling, into = how.scaling, wanted.buffer
    assert scaling is not None
    wanted.buffer += -(-_FLOAT * (stop - first) // 64) * 64
    if how.turned:
        wanted.turned.append((how, first, stop, into))
        return
    bits, width = DTYPES[scaling.dtype].bits, DTYPES[scaling.scale_dtype].bits // 8
    for begin, end in _parts(scaling, first, stop):
        low, high = scaling.needed(begin, end)
        at = into + _FLOAT * (begin - first)
        wanted.parts.append(_Part(scaling, begin, end, low, len(wanted.requests), at))
        byte = begin * bits // 8
        wanted.requests.append((how.elements, byte, -(-end * bits // 8) - byte))
        wanted.requests.append((how.scales, low * width, (high - low) * width))


def _parts(scaling: Scaling, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Elements in parts that need few more scales than they are many, whatever a file says.

    A few elements on both sides of the end of a row may need all the scales of it.
    """
    low, high = scaling.needed(first, stop)
    columns = scaling.columns
    if high - low <= stop - first + _SPARE:
        yield first, stop
        return
    ends = [first, -(-first // columns) * columns, stop // columns * columns, stop]
    for begin, end in pairwise(ends):
        if begin < end:
            yield begin, end


def _scale(part: _Part, elements: Bytes, scales: Bytes, out: Bytes) -> None:
    bits = DTYPES[part.scaling.dtype].bits
    for at in range(part.first, part.stop, _PIECE):
        for first, stop in _parts(part.scaling, at, min(part.stop, at + _PIECE)):
            data = elements[(first - part.first) * bits // 8 :]
            values = out[_FLOAT * (first - part.first) : _FLOAT * (stop - part.first)]
            scale(data, part.scaling, first, scales, part.low, values)
