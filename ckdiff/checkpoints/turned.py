"""Tensors whose rows go all through what holds them, as those of a transposed matrix do.

Whoever wants a few of their rows reads it all. So all of them are gathered in one pass, and what
lies between them is not read for nothing: the tensors that it is of (gate and up of an expert make
a *cluster*) are gathered with them. They are kept while there is room. Of those that are too large
the rows that are asked for are gathered, and whole ones.
"""

from __future__ import annotations

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
_MOST = 4  #: windows whose bytes one cluster may have that is kept


@dataclass(frozen=True, slots=True)
class Clusters:
    """The tensors that are read so."""

    of: Mapping[int, tuple[int, ...]]  #: for each of them its cluster, in order
    #: bytes of a cluster and of each tensor of it, of which there are some
    sizes: Sequence[tuple[int, int]]

    def room(self, window: int) -> int:
        """Bytes that are kept at most for windows of so many: those of a cluster, and of what such
        a window has of the one before.
        """
        fit = [(size, each) for size, each in self.sizes if size <= _MOST * window]
        return window + sum(map(max, zip(*fit, strict=True))) if fit else 0

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
                each = prod(shape) * width
                sizes.add((len(cluster) * each, each))
    return Clusters(found, sorted(sizes))


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


class Turned:
    """Gathers spans of such tensors; for one worker."""

    def __init__(self, inner: SpanReader, contents: Contents, clusters: Clusters) -> None:
        self._inner, self._contents, self._clusters = inner, contents, clusters
        self._buffer, self._at = np.empty(0, np.uint8), 0
        self._kept: dict[int, npt.NDArray[np.uint8]] = {}
        self._used: dict[int, int] = {}  # the last window of which each of those was
        self._most = 0  # bytes of a window so far
        self._window = 0

    def has(self, tensors: IntArray) -> npt.NDArray[np.bool_]:
        """Which of these are gathered here, as a rule."""
        return np.array([tensor in self._clusters.of for tensor in tensors.tolist()], np.bool_)

    def gather(
        self,
        tensors: IntArray,
        starts: IntArray,
        nbytes: IntArray,
        wanted: npt.NDArray[np.bool_],
    ) -> IntArray:
        """The addresses of a window's spans, good until the next call; 0 of what is not gathered
        here, which is nothing that is not ``wanted``. Raises what the inner reader does, of which
        nothing is acquired then.
        """
        addresses = np.zeros(len(tensors), np.int64)
        here = np.flatnonzero(self.has(tensors) & (nbytes > 0) & wanted)
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
        """Where a span is, once it is there; 0 where there is no room for it."""
        if tensor in self._kept or self._keep(tensor):
            self._used[tensor] = self._window
            return int(self._kept[tensor].ctypes.data) + start
        table = self._contents.table
        row = prod(table.shapes[tensor][1:]) * _width(table, tensor)
        first, stop = start // row, -(-(start + size) // row)
        into = int(self._buffer.ctypes.data) + self._at
        self._at += -(-(stop - first) * row // 64) * 64
        if self._at > len(self._buffer):
            return 0
        self._gather([(tensor, into)], first, stop)
        return into + start - first * row

    def _keep(self, tensor: int) -> bool:
        """Gather a tensor, and those of its cluster that follow, if there is room for them."""
        table, cluster = self._contents.table, self._clusters.of[tensor]
        size = int(table.nbytes[tensor])
        if len(cluster) * size > _MOST * self._most:
            return False
        fresh = [other for other in cluster if other >= tensor and other not in self._kept]
        room = self._clusters.room(self._most) - len(fresh) * size
        held = sum(map(len, self._kept.values()))
        free = []  # to be taken again: what is new has to be cleared by the system
        for old in sorted(self._kept, key=self._used.__getitem__):
            if held > room and self._used[old] < self._window:
                free.append(self._kept.pop(old))
                held -= len(free[-1])
        if held > room:
            return False
        free = [data for data in free if len(data) == size]
        come = {other: free.pop() if free else np.empty(size, np.uint8) for other in fresh}
        into = [(other, int(data.ctypes.data)) for other, data in come.items()]
        self._gather(into, 0, table.shapes[tensor][0])
        self._kept |= come
        self._used |= dict.fromkeys(come, self._window)
        return True

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
