"""FP4 in groups whose values are stored turned: rows of values are columns of what is stored.

A span of values needs a little of every row of a matrix. It is read in bands of rows, none of which
is held, so that neither memory nor what is fetched at a time grows with the matrix: the bytes are
put together as rows of values, and become those when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.protocol import SpanReader
from ckdiff.checkpoints.views.quantised import Scaled
from ckdiff.checkpoints.views.quantisedgrid import GROUP
from ckdiff.kernels import strided
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.memory import LINE, Bytes, bytes_at
from ckdiff.kernels.scaling import Recipe, powers_of_two, turned

_BAND = 1 << 22  # bytes of elements that are asked for at a time, at most
_LEAST_BAND = 1 << 20
_HALF = GROUP // 2  # bytes of a group


@dataclass(frozen=True, slots=True)
class _Box:
    """Some rows of values of a matrix, or a part of one; as they are stored, these are columns."""

    matrix: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def columns(self) -> int:
        """Values of a row."""
        return self.bottom - self.top

    def lines(self, size: int) -> tuple[int, int]:
        """Between which lines of ``size`` columns each they are."""
        return self.left // size, -(-self.right // size)

    def items(self, size: int) -> int:
        """One for each line and row, and what a kernel may read after them."""
        first, last = self.lines(size)
        return (last - first) * self.columns + LANES

    @property
    def nbytes(self) -> int:
        """What it takes, filled, and to begin where a line of the cache does."""
        return self.items(2) + 5 * self.items(GROUP) + LINE


class _Filled:
    """A box, and its bytes as rows of values: to be filled."""

    def __init__(self, box: _Box, room: Bytes) -> None:
        """``room`` has as many bytes as the box says."""
        self.box, self.room = box, room
        room = room[-room.ctypes.data % LINE :]
        floats = 4 * box.items(GROUP)
        self.factors = room[:floats].view(np.float32)  #: a row for each group of rows of values
        #: a row for each two rows of values, and a row for each group of them
        self.pairs, self.powers = np.split(
            room[floats : floats + box.items(2) + box.items(GROUP)], [box.items(2)]
        )

    def finish(self) -> None:
        """All bytes are there."""
        powers_of_two(self.powers[:-LANES], self.factors[:-LANES])

    def recipe(self, first: int, stop: int) -> Recipe:
        """For the values [first, stop) of the box."""
        columns = self.box.columns
        row, column = divmod(first, columns)
        row += self.box.left
        down = (row // size - self.box.left // size for size in (2, GROUP))
        pairs, factors = (columns * lines for lines in down)
        return turned(
            self.pairs[pairs:], self.factors[factors:], (row, column), columns, stop - first
        )


class Turning:
    """Puts together what the windows of one reader want, one after the other.

    Of what ``reader`` reads nothing is held.
    """

    def __init__(self, reader: SpanReader) -> None:
        self._reader = reader
        self._whole: dict[tuple[int, int], _Filled] = {}  # matrices, by elements and number
        self._before = self._whole  # those of the window before
        self._parts: list[_Filled] = []
        self._free: list[Bytes] = []  # to be taken again: what is new the system has to clear

    @staticmethod
    def memory(window: int) -> int:
        """Bytes that are held at most for windows of so many bytes."""
        return 2 * window

    def begin(self) -> None:
        """Begin a window: recipes of the one before are good no more."""
        self._forget(self._whole)
        self._before, self._whole, self._parts = self._whole, {}, []

    def _forget(self, kept: Mapping[tuple[int, int], _Filled]) -> None:
        """Drop the matrices of the window before, but for those that are kept."""
        self._free += [filled.room for key, filled in self._before.items() if key not in kept]
        self._before = {}

    def _room(self, size: int) -> Bytes:
        """Memory that was used before, if there is some of that size."""
        fit = [room for room in self._free if len(room) == size]
        self._free = fit[1:2]
        return fit[0] if fit else np.empty(size, np.uint8)

    def recipes(self, how: Scaled, first: int, stop: int, window: int) -> list[Recipe]:
        """Recipes for the values [first, stop) of a turned tensor, in order. ``window`` are bytes.

        Raises SourceChanged and CheckpointError.
        """
        assert how.scaling is not None
        height, width = how.scaling.columns, how.scaling.rows
        found: list[Recipe] = []
        while first < stop:
            matrix, begin = divmod(first, height * width)
            end = min(height * width, begin + stop - first)
            whole = self._matrix(how, _Box(matrix, 0, width, 0, height), window)
            if whole is not None:
                found.append(whole.recipe(begin, end))
            else:
                boxes = _boxes(matrix, width, begin, end)
                parts = [_Filled(box, np.empty(box.nbytes, np.uint8)) for box in boxes]
                _read(self._reader, how, parts, window)
                self._parts += parts
                found += [part.recipe(0, _size(part.box)) for part in parts]
            first += end - begin
        return found

    def _matrix(self, how: Scaled, box: _Box, window: int) -> _Filled | None:
        """A whole matrix, which the windows that follow want as well; None where it is large."""
        key = how.elements, box.matrix
        filled = self._whole.get(key) or self._before.get(key)
        if key in self._before:  # it is good as long as the source is what it was
            _acquired(self._reader, how, box.matrix * box.bottom * (box.right // GROUP), 1)
            self._reader.release()
        if filled is None and box.nbytes <= 3 * window // 4:
            # windows go on: what it has first is what the one before had last
            self._forget(self._whole)
            filled = _Filled(box, self._room(box.nbytes))
            _read(self._reader, how, [filled], window)
        if filled is not None:
            self._whole[key] = filled
        return filled


def _size(box: _Box) -> int:
    return box.columns * (box.right - box.left)


def _boxes(matrix: int, width: int, first: int, stop: int) -> Iterator[_Box]:
    """A rest of a row of values, rows, and a rest."""
    while first < stop:
        row, column = divmod(first, width)
        rows = 1 if column else max(1, (stop - first) // width)
        box = _Box(matrix, column, min(width, column + stop - first), row, row + rows)
        yield box
        first += _size(box)


def _read(reader: SpanReader, how: Scaled, filled: list[_Filled], window: int) -> None:
    """Read boxes of one matrix, band by band."""
    scaling, boxes = how.scaling, [part.box for part in filled]
    assert scaling is not None
    groups = scaling.columns // GROUP
    first, last = min(box.left for box in boxes) // GROUP, max(box.lines(GROUP)[1] for box in boxes)
    top, bottom = min(box.top for box in boxes), max(box.bottom for box in boxes)
    band = min(_BAND, max(_LEAST_BAND, window // 4))
    step = max(1, band // (groups * _HALF))
    for row in range(top, bottom, step):
        stop = min(row + step, bottom)
        begin = (boxes[0].matrix * scaling.rows + row) * groups + first
        reach = (stop - row - 1) * groups + last - first  # groups from the first to the last
        pairs, powers = _acquired(reader, how, begin, reach)
        for part in filled:
            low, high = max(row, part.box.top), min(stop, part.box.bottom)
            for data, out, size, width in (
                (pairs, part.pairs, 2, _HALF), (powers, part.powers, GROUP, 1),
            ):  # fmt: skip
                line, end = part.box.lines(size)
                if low < high:
                    strided.copy(
                        data[(low - row) * groups * width + line - first * width :],
                        out[low - part.box.top :],
                        (end - line, high - low), (1, groups * width), (part.box.columns, 1), 1,
                    )  # fmt: skip
        reader.release()
    for part in filled:
        part.finish()


def _acquired(reader: SpanReader, how: Scaled, begin: int, reach: int) -> tuple[Bytes, Bytes]:
    """So many groups as they are stored, and their scales."""
    found = reader.acquire(
        np.array([how.elements, how.scales], np.int64),
        np.array([begin * _HALF, begin], np.int64),
        np.array([reach * _HALF, reach], np.int64),
    ).tolist()
    return bytes_at(found[0], reach * _HALF), bytes_at(found[1], reach)
