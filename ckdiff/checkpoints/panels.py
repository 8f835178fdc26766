"""Spans of turned matrices that are not gathered before they are compared, but a panel at a time.

A panel is some whole rows of the matrix. Those who compare copy it, compare it while it is in the
caches, and copy the next one over it. Here is said how. Two matrices whose columns alternate are
copied together, where a window has the same rows of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.copying import Request
from ckdiff.checkpoints.pieces import Contents
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.checkpoints.scattered import Rows
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.strided import WIDTHS, Copying, copying

#: bytes of a panel, about: less reads lines of the source that lie too far apart, and more does not
#: stay in the caches
PANEL = 1 << 21
_LARGEST = 4 * PANEL  # bytes of a panel of rows that are very long
_LONG = 2048  # elements of a row that is compared by itself as well as with others
_LINE = 64  # bytes of a line of the caches
_FEW = 8  # of how many parts of a window one has few rows
_NOTHING = np.empty((0, 0), np.uint8)
_MOST_KNOWN = 64  # tensors of which it is remembered how they lie


class Late(NamedTuple):
    """A panel: how it is copied, and what is there then: spans of the window, and the bytes of each
    from one to another.
    """

    copying: Copying
    parts: tuple[tuple[int, int, int], ...]


class Cut(NamedTuple):
    """The panels of one or two spans."""

    rows: list[Rows]  #: of each span
    late: list[Late]
    last: int  #: the first row of the last panel
    places: list[int]  #: where that is of each span


@dataclass(frozen=True, slots=True)
class Turn:
    """A matrix that lies turned, or two that do so together: where, and how they are cut."""

    source: int
    columns: int
    across: int  #: elements in the source from one row to the next: how many matrices there are
    step: int  #: and from one column to the next
    width: int  #: bytes of an element
    every: int  #: rows that have whole units together: panels end after so many, or some times so
    count: int  #: rows of a panel, about
    twin: int = -1  #: the tensor that the other matrix is

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.columns * self.width

    @property
    def side(self) -> int:
        """Elements of a line of the caches, and rows of a panel at least."""
        return _LINE // self.width

    @property
    def apart(self) -> bool:
        """Whether rows are written so that each begins in another line of the caches than the one
        before: where all begin in the same, they push each other out.
        """
        return self.columns % UNIT == 0 and self.columns >= _LONG

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next in what is written."""
        return self.row + _LINE * self.apart


@dataclass(frozen=True, slots=True)
class Later:
    """A span of a window, or one of each of two matrices, that are copied panel by panel."""

    turn: Turn
    begin: int  #: byte of the source at which the first element of its matrices is
    spans: tuple[tuple[int, int, int], ...]  #: of the window; first bytes of their tensors, bytes

    @property
    def first(self) -> int:
        """The first row that is copied."""
        return min(start // self.turn.row for _, start, _ in self.spans)

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return max(-(-(start + size) // self.turn.row) for _, start, size in self.spans)

    @property
    def size(self) -> int:
        """Bytes of its spans."""
        return sum(size for _, _, size in self.spans)

    @property
    def places(self) -> list[int]:
        """Which spans of the window they are."""
        return [span for span, _, _ in self.spans]

    @property
    def request(self) -> Request:
        """What has to be acquired."""
        begin = self.begin + self.first * self.turn.across * self.turn.width
        return self.turn.source, begin, self._reach(self.stop - self.first)

    @property
    def room(self) -> int:
        """Bytes that panels take."""
        most = self.turn.count + 2 * self.turn.side
        return len(self.spans) * min(self.stop - self.first, most) * self.turn.pitch

    def _reach(self, rows: int) -> int:
        """Bytes of the source from the first to the last element of some rows."""
        turn = self.turn
        elements = (rows - 1) * turn.across + (turn.columns - 1) * turn.step + len(self.spans)
        return elements * turn.width

    def cut(self, found: int, into: Bytes) -> Cut:
        """The panels, one after the other in ``into``, and where the bytes of the spans are then,
        once what was asked for is found at an address.
        """
        turn, first = self.turn, self.first
        edges = [first, *self._edges(found), self.stop]
        gap = max(high - low for low, high in pairwise(edges)) * turn.pitch
        late = []
        for low, high in pairwise(edges):
            source = found + (low - first) * turn.across * turn.width
            ready = copying(
                bytes_at(source, self._reach(high - low)), into,
                (len(self.spans), high - low, turn.columns), (1, turn.across, turn.step),
                (gap // turn.width, turn.pitch // turn.width, 1), turn.width,
            )  # fmt: skip
            assert ready is not None
            parts = (
                (at, max(low * turn.row - start, 0), min(high * turn.row - start, size))
                for at, start, size in self.spans
            )
            late.append(Late(ready, tuple(part for part in parts if part[1] < part[2])))
        lows = np.array(edges[:-1], np.int64)
        rows = np.arange(first, self.stop, dtype=np.int64) if turn.apart else lows
        away = (rows - lows[np.searchsorted(lows, rows, "right") - 1]) * turn.pitch
        places = [int(into.ctypes.data) + i * gap for i in range(len(self.spans))]
        pairs = zip(self.spans, places, strict=True)
        each = [_rows(span, rows * turn.row, away + place) for span, place in pairs]
        return Cut(each, late, edges[-2], places)

    def _edges(self, found: int) -> Iterator[int]:
        """The rows at which panels after the first one begin, each with a line if it can be."""
        turn = self.turn
        ahead = -found % _LINE // (turn.width * turn.across)
        edge = (self.first + ahead) // turn.every * turn.every
        if edge - self.first < turn.side:
            edge += turn.count
        while self.stop - edge >= turn.side:
            yield edge
            edge += turn.count


def _rows(span: tuple[int, int, int], begins: IntArray, addresses: IntArray) -> Rows:
    """What a span has of rows that begin at these bytes of its tensor."""
    at, start, size = span
    low = int(np.searchsorted(begins, start, "right")) - 1
    some = slice(low, int(np.searchsorted(begins, start + size)))
    begins, addresses = begins[some] - start, addresses[some].copy()
    addresses[0] -= begins[0]
    begins[0] = 0
    return Rows(np.full(len(begins), at, np.int64), begins, addresses)


class Panels:
    """Which spans of some contents are copied so; for one reader."""

    def __init__(self, contents: Contents, clusters: Mapping[int, tuple[int, ...]]) -> None:
        """``clusters`` are tensors that lie between each other."""
        self._contents, self._clusters = contents, clusters
        self._turns: dict[int, Turn | None] = {}
        #: of the panel that was copied last, for each tensor: its first byte, bytes of a row, rows
        self._last: dict[int, tuple[int, int, Bytes]] = {}

    def note(self, tensors: IntArray, later: Later, cut: Cut) -> None:
        """These panels are the last that are copied: what of the last one is wanted later, as a
        window has less of one matrix than of the other, can be taken before the next is.
        """
        turn = later.turn
        for (at, _, _), place in zip(later.spans, cut.places, strict=True):
            held = bytes_at(place, (later.stop - cut.last) * turn.pitch).reshape(-1, turn.pitch)
            self._last[int(tensors[at])] = cut.last * turn.row, turn.row, held

    def take(self, tensors: IntArray, late: list[Later]) -> dict[int, Bytes]:
        """The bytes of those spans of a window that the last panel of the one before had."""
        found = {}
        for later in late:
            at, start, size = later.spans[0]
            first, row, held = self._last.get(int(tensors[at]), (0, 1, _NOTHING))
            inside = first <= start and start + size <= first + row * len(held)
            if inside and len(later.spans) == 1:
                low, high = (start - first) // row, -(-(start + size - first) // row)
                begin = start - first - low * row
                found[at] = held[low:high, :row].flatten()[begin : begin + size]
        self._last.clear()
        return found

    def of(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> list[Later]:
        """Those of a window. A few rows are not worth that all of a matrix is gone through, unless
        the window has much more of others.
        """
        few, found, open_ = int(nbytes.sum()) // _FEW, list[Later](), dict[int, Later]()
        spans = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for at, (tensor, start, size) in enumerate(spans):
            turn = self._turn(tensor) if size else None
            if turn is None:
                continue
            later = Later(turn, self._contents.pieces[tensor][0].begin, ((at, start, size),))
            other = open_.pop(turn.twin, None)
            if other is not None and (both := _both(later, other)) is not None:
                found.remove(other)
                later = both
            elif turn.twin >= 0:
                open_[tensor] = later
            found.append(later)
        return [
            later
            for later in found
            if later.size <= few
            or (
                len(later.spans) == later.turn.across
                and later.stop - later.first >= 2 * later.turn.side
            )
        ]

    def _turn(self, tensor: int) -> Turn | None:
        if tensor not in self._turns:
            if len(self._turns) == _MOST_KNOWN:
                self._turns.clear()
            self._turns[tensor] = self._found(tensor)
        return self._turns[tensor]

    def _found(self, tensor: int) -> Turn | None:
        """How a tensor lies; None where it does not lie so."""
        table, pieces = self._contents.table, self._contents.pieces.get(tensor, ())
        shape = table.shapes[tensor]
        if len(pieces) != 1 or pieces[0].shape != shape or len(shape) != 2 or not prod(shape):
            return None
        width = int(table.nbytes[tensor]) // prod(shape)
        (rows, columns), (across, step) = shape, pieces[0].strides
        side = _LINE // width
        if width not in WIDTHS or across not in (1, 2) or step < max(across * rows, 3):
            return None
        if side < 8 or columns < 2 * side:
            return None
        twin = self._twin(tensor, width) if across == 2 else -1
        every = UNIT // gcd(columns, UNIT)
        least = lcm(every, side)
        count = max(PANEL // (across * columns * width) // least, 1) * least
        if across * count * columns * width > _LARGEST:
            return None
        return Turn(pieces[0].source, columns, across, step, width, every, count, twin)

    def _twin(self, tensor: int, width: int) -> int:
        """The tensor whose elements are between those of one, or -1."""
        cluster = self._clusters.get(tensor, ())
        if len(cluster) != 2 or width > 4:
            return -1
        one, other = (self._contents.pieces[each][0] for each in cluster)
        if abs(one.begin - other.begin) != width:
            return -1
        return cluster[0] + cluster[1] - tensor


def besides(late: list[Later], count: int) -> npt.NDArray[np.bool_]:
    """Which of so many spans are none of these."""
    found = np.ones(count, np.bool_)
    for later in late:
        found[later.places] = False
    return found


def _both(one: Later, other: Later) -> Later | None:
    """Spans of two matrices that alternate, as one; None where they have few rows in common."""
    low, high = sorted((one, other), key=lambda later: later.begin)
    both = Later(one.turn, low.begin, (*low.spans, *high.spans))
    common = min(one.stop, other.stop) - max(one.first, other.first)
    return both if 2 * common >= both.stop - both.first else None
