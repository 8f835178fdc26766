"""Tensors whose rows go all through what holds them, as those of a transposed matrix do.

Whoever wants a few of their rows reads it all. So they are gathered in whole rows, in one pass, and
what lies between them is not read for nothing: the rows of the tensors that it is of (gate and up
of an expert make a *cluster*) are gathered with them, and kept until they are asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.copying import BETWEEN, STRETCH, Copy, columns_of, parts
from ckdiff.checkpoints.pieces import Contents, Piece, packed_strides
from ckdiff.checkpoints.protocol import IntArray, SpanReader, TensorTable

_LONGEST = 1 << 17  #: bytes of a row: of others there may be too many that are wanted in part
_SPARE = 4 * _LONGEST  #: bytes of rows that the first and the last span of a window have in part
_MOST = 4  #: windows whose bytes may be kept of one cluster


@dataclass(frozen=True, slots=True)
class Clusters:
    """The tensors that are read so."""

    of: Mapping[int, tuple[int, ...]]  #: for each of them its cluster, in order
    sizes: Sequence[int]  #: in order, bytes that may be kept of a cluster, of which there are some

    def largest(self, window: int) -> int:
        """The most bytes that are kept of one where windows have so many; 0 where nothing is."""
        fit = bisect_right(self.sizes, _MOST * window)
        return self.sizes[fit - 1] if fit else 0

    def room(self, window: int) -> int:
        """Bytes that are kept at most: a window may end one and begin another, or have many."""
        largest = self.largest(window)
        return max(2 * largest, window) if largest else 0

    def memory(self, window: int) -> int:
        """Bytes that a ``Turned`` takes at most."""
        return window + _SPARE + self.room(window) if self.of else 0


def clusters_of(table: TensorTable, pieces: Mapping[int, tuple[Piece, ...]]) -> Clusters:
    """The tensors whose rows are scattered, and which lie between the rows of which."""
    alike = defaultdict(list)
    for tensor, held in pieces.items():
        shape = table.shapes[tensor]
        if len(held) != 1 or held[0].shape != shape or len(shape) < 2:
            continue
        piece, width = held[0], _width(table, tensor)
        if min(piece.strides) > 0 and prod(shape[1:]) * width <= _LONGEST:
            alike[piece.source, shape, piece.strides, width].append((piece.begin, tensor))
    found: dict[int, tuple[int, ...]] = {}
    sizes = set()
    for (_, shape, strides, width), places in alike.items():
        reach = Copy(0, 0, shape, strides, strides, width).reach
        for cluster in _close(sorted(places), min(reach, BETWEEN)):
            if len(cluster) > 1 or strides[-1] != 1:
                found |= dict.fromkeys(cluster, tuple(sorted(cluster)))
                sizes.add((len(cluster) - 1) * prod(shape) * width)
    return Clusters(found, sorted(sizes - {0}))


def _close(places: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Tensors (first byte, tensor), in order, in lots that begin in less than ``most`` bytes."""
    start, lot = 0, list[int]()
    for begin, tensor in places:
        if lot and begin - start >= most:
            yield lot
            lot = []
        start = start if lot else begin
        lot.append(tensor)
    yield lot


def _width(table: TensorTable, tensor: int) -> int:
    return int(table.nbytes[tensor]) // max(prod(table.shapes[tensor]), 1)


@dataclass(slots=True)
class _Kept:
    """Rows of a tensor that were gathered with those of another."""

    data: npt.NDArray[np.uint8]  #: room for all of it
    first: int  #: rows
    stop: int
    window: int  #: the last one that put something in, or took something

    def add(self, first: int, stop: int, window: int) -> None:
        """Note that these rows are there now."""
        if not self.first <= first <= self.stop:
            self.first = self.stop = first
        self.stop, self.window = max(self.stop, stop), window


class Turned:
    """Gathers spans of such tensors; for one worker."""

    def __init__(self, inner: SpanReader, contents: Contents, clusters: Clusters) -> None:
        self._inner, self._contents, self._clusters = inner, contents, clusters
        self._buffer, self._at = np.empty(0, np.uint8), 0
        self._kept: dict[int, _Kept] = {}
        self._most = 0  # bytes of a window so far
        self._window = 0

    def has(self, tensors: IntArray) -> npt.NDArray[np.bool_]:
        """Which of these are gathered here, as a rule."""
        return np.array([tensor in self._clusters.of for tensor in tensors.tolist()], np.bool_)

    def gather(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """The addresses of a window's spans, good until the next call; 0 of what is not gathered
        here. Raises what the inner reader does, of which nothing is acquired then.
        """
        addresses = np.zeros(len(tensors), np.int64)
        here = np.flatnonzero(self.has(tensors) & (nbytes > 0))
        if not len(here):
            return addresses
        self._window += 1
        self._most = max(self._most, int(nbytes.sum()))
        if len(self._buffer) < self._most + _SPARE:
            self._buffer = np.empty(self._most + _SPARE, np.uint8)
        self._at = 0
        for span in here.tolist():
            tensor, start, size = int(tensors[span]), int(starts[span]), int(nbytes[span])
            addresses[span] = self._address(tensor, start, size)
        return addresses

    def close(self) -> None:
        """Give the memory back."""
        self._kept.clear()
        self._buffer = np.empty(0, np.uint8)

    def _address(self, tensor: int, start: int, size: int) -> int:
        """Where a span is, once it is there; 0 where it is not."""
        table = self._contents.table
        row = prod(table.shapes[tensor][1:]) * _width(table, tensor)
        first, stop = start // row, -(-(start + size) // row)
        kept = self._kept.get(tensor)
        if kept is not None and kept.first <= first and stop <= kept.stop:
            kept.window = self._window
            return int(kept.data.ctypes.data) + start
        room = -(-(stop - first) * row // 64) * 64
        if self._at + room > len(self._buffer):
            return 0
        into = int(self._buffer.ctypes.data) + self._at
        self._at += room
        others = self._beside(tensor)
        places = [int(self._kept[other].data.ctypes.data) + first * row for other in others]
        self._gather([(tensor, into), *zip(others, places, strict=True)], first, stop)
        for other in others:
            self._kept[other].add(first, stop, self._window)
        return into + start - first * row

    def _beside(self, tensor: int) -> Sequence[int]:
        """The tensors that are kept where a span of this one is gathered; there is room for them
        then.
        """
        table, (leader, *others) = self._contents.table, self._clusters.of[tensor]
        size = int(table.nbytes[tensor])
        if tensor != leader or not 0 < len(others) * size <= self._clusters.largest(self._most):
            return ()
        fresh = [other for other in others if other not in self._kept]
        room = self._clusters.room(self._most) - len(fresh) * size
        held = sum(len(kept.data) for kept in self._kept.values())
        free = []  # to be taken again: what is new has to be cleared by the system
        for old, kept in sorted(self._kept.items(), key=lambda pair: pair[1].window):
            if held > room and kept.window < self._window and old not in others:
                free.append(self._kept.pop(old).data)
                held -= len(free[-1])
        if held > room:
            return ()
        free = [data for data in free if len(data) == size]
        for other in fresh:
            data = free.pop() if free else np.empty(size, np.uint8)
            self._kept[other] = _Kept(data, 0, 0, self._window)
        return others

    def _gather(self, into: Sequence[tuple[int, int]], first: int, stop: int) -> None:
        """Copy these rows of tensors of one cluster, each to an address."""
        table, pieces = self._contents.table, [self._contents.pieces[x][0] for x, _ in into]
        piece, width = pieces[0], _width(table, into[0][0])
        shape = (stop - first, *piece.shape[1:])
        whole = Copy(0, 0, shape, piece.strides, packed_strides(shape), width)
        low = min(each.begin for each in pieces)
        beyond = max(each.begin for each in pieces) - low
        begin = low + first * piece.strides[0] * width
        cut = [
            (copy, (piece.source, begin + at, size + beyond))
            for copy, at, size in parts(whole, max(self._most, STRETCH))
        ]
        for (copy, request), (_, coming) in pairwise([*cut, cut[-1]]):
            (address,) = self._inner.acquire(*columns_of([request])).tolist()
            if coming is not request:
                self._inner.prefetch(*columns_of([coming]))
            both = sorted(
                (address + each.begin - low, to + copy.begin)
                for each, (_, to) in zip(pieces, into, strict=True)
            )
            (source, place), (last, end) = both[0], both[-1]
            if len(both) == 2 and (last - source) % width == (end - place) % width == 0:
                copy.twice(last - source, end - place).run(source, min(place, end))
            else:
                for source, place in both:
                    copy.run(source, place)
            self._inner.release()
