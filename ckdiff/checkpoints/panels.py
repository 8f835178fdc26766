"""Spans of turned matrices that are not gathered before they are compared, but a panel at a time.

A panel is some whole rows of the matrix. Those who compare copy it, compare it while it is in the
caches, and copy the next one over it. Here is said how. Two matrices whose columns alternate are
not taken: copied together in panels they took a fifth longer than gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from ckdiff.kernels.memory import LINE, Bytes, bytes_at
from ckdiff.kernels.strided import WIDTHS, Copying, copying

#: bytes of a panel, about: less reads lines of the source that lie too far apart, and more does not
#: stay in the caches
PANEL = 1 << 21
_LARGEST = 4 * PANEL  # bytes of a panel of rows that are very long
_LONG = 2048  # elements of a row that is compared by itself as well as with others
_FEW = 8  # of how many parts of a window one has few rows
_MOST_KNOWN = 64  # tensors of which it is remembered how they lie


class Late(NamedTuple):
    """A panel: how it is copied, and what is there then: a span of the window, and its bytes from
    one to another.
    """

    copying: Copying
    part: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """A matrix that lies turned: where, and how it is cut."""

    source: int
    columns: int
    step: int  #: elements in the source from one column to the next
    width: int  #: bytes of an element
    every: int  #: rows that have whole units together: panels end after so many, or some times so
    count: int  #: rows of a panel, about

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.columns * self.width

    @property
    def side(self) -> int:
        """Elements of a line of the caches, and rows of a panel at least."""
        return LINE // self.width

    @property
    def apart(self) -> bool:
        """Whether rows are written so that each begins in another line of the caches than the one
        before: where all begin in the same, they push each other out.
        """
        return self.columns % UNIT == 0 and self.columns >= _LONG

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next in what is written."""
        return self.row + LINE * self.apart


@dataclass(frozen=True, slots=True)
class Later:
    """A span of a window that is copied panel by panel."""

    turn: Turn
    begin: int  #: byte of the source at which the first element of its matrix is
    place: int  #: which span of the window it is
    start: int  #: its first byte, of its tensor
    size: int  #: bytes

    @property
    def first(self) -> int:
        """The first row that is copied."""
        return self.start // self.turn.row

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return -(-(self.start + self.size) // self.turn.row)

    @property
    def request(self) -> Request:
        """What has to be acquired."""
        begin = self.begin + self.first * self.turn.width
        return self.turn.source, begin, self._reach(self.stop - self.first)

    @property
    def room(self) -> int:
        """Bytes that panels take."""
        most = self.turn.count + 2 * self.turn.side
        return min(self.stop - self.first, most) * self.turn.pitch

    def _reach(self, rows: int) -> int:
        """Bytes of the source from the first to the last element of some rows."""
        turn = self.turn
        return (rows + (turn.columns - 1) * turn.step) * turn.width

    def cut(self, found: int, into: Bytes) -> tuple[Rows, list[Late]]:
        """Where the bytes of the span are, and the panels, which are copied to ``into`` one after
        the other, once what was asked for is found at an address.
        """
        turn, first = self.turn, self.first
        edges = [first, *self._edges(found), self.stop]
        late = []
        for low, high in pairwise(edges):
            source = found + (low - first) * turn.width
            ready = copying(
                bytes_at(source, self._reach(high - low)), into,
                (high - low, turn.columns), (1, turn.step),
                (turn.pitch // turn.width, 1), turn.width,
            )  # fmt: skip
            assert ready is not None
            begin = max(low * turn.row - self.start, 0)
            end = min(high * turn.row - self.start, self.size)
            late.append(Late(ready, (self.place, begin, end)))
        lows = np.array(edges[:-1], np.int64)
        rows = np.arange(first, self.stop, dtype=np.int64) if turn.apart else lows
        away = (rows - lows[np.searchsorted(lows, rows, "right") - 1]) * turn.pitch
        return self._rows(rows * turn.row, away + int(into.ctypes.data)), late

    def _edges(self, found: int) -> Iterator[int]:
        """The rows at which panels after the first one begin, each with a line if it can be."""
        turn = self.turn
        ahead = -found % LINE // turn.width
        edge = (self.first + ahead) // turn.every * turn.every
        if edge - self.first < turn.side:
            edge += turn.count
        while self.stop - edge >= turn.side:
            yield edge
            edge += turn.count

    def _rows(self, begins: IntArray, addresses: IntArray) -> Rows:
        """What the span has of rows that begin at these bytes of its tensor."""
        low = int(np.searchsorted(begins, self.start, "right")) - 1
        some = slice(low, int(np.searchsorted(begins, self.start + self.size)))
        begins, addresses = begins[some] - self.start, addresses[some].copy()
        addresses[0] -= begins[0]
        begins[0] = 0
        return Rows(np.full(len(begins), self.place, np.int64), begins, addresses)


class Panels:
    """Which spans of some contents are copied so; for one reader."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._turns: dict[int, Turn | None] = {}

    def of(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> list[Later]:
        """Those of a window. A few rows are not worth that all of a matrix is gone through, unless
        the window has much more of others.
        """
        few, found = int(nbytes.sum()) // _FEW, list[Later]()
        spans = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for place, (tensor, start, size) in enumerate(spans):
            turn = self._turn(tensor) if size else None
            if turn is None:
                continue
            later = Later(turn, self._contents.pieces[tensor][0].begin, place, start, size)
            if size <= few or later.stop - later.first >= 2 * turn.side:
                found.append(later)
        return found

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
        side = LINE // width
        if width not in WIDTHS or across != 1 or step < max(rows, 3):
            return None
        if side < 8 or columns < 2 * side:
            return None
        every = UNIT // gcd(columns, UNIT)
        least = lcm(every, side)
        count = max(PANEL // (columns * width) // least, 1) * least
        if count * columns * width > _LARGEST:
            return None
        return Turn(pieces[0].source, columns, step, width, every, count)


def besides(late: list[Later], count: int) -> npt.NDArray[np.bool_]:
    """Which of so many spans are none of these."""
    found = np.ones(count, np.bool_)
    for later in late:
        found[later.place] = False
    return found
