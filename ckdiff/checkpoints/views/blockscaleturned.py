"""FP4 in groups whose values are stored turned: rows of values are columns of what is stored.

A span of values needs a little of every row of a matrix. It is read in bands of rows, none of which
is held, so that neither memory nor what is fetched at a time grows with the matrix: the bytes are
put together as rows of values, and become those when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ckdiff.checkpoints.protocol import SpanReader
from ckdiff.checkpoints.views.quantised import Scaled
from ckdiff.checkpoints.views.quantisedgrid import GROUP
from ckdiff.kernels import strided
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.scaling import Recipe, turned

_BAND = 1 << 20  # bytes of elements that are asked for at a time
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

    def nbytes(self, size: int) -> int:
        """Of a byte for each line and row, and what a kernel may read after them."""
        first, last = self.lines(size)
        return (last - first) * self.columns + LANES


@dataclass(frozen=True, slots=True)
class _Filled:
    """A box, and its bytes as rows of values."""

    box: _Box
    pairs: Bytes  #: a row for each two rows of values
    powers: Bytes  #: a row for each group of them

    def recipe(self) -> Recipe:
        box = self.box
        count = box.columns * (box.right - box.left)
        return turned(self.pairs, self.powers, box.left % GROUP, box.columns, count)


def turned_bytes(how: Scaled, first: int, stop: int) -> int:
    """Bytes that ``turned_recipes`` puts together for the values [first, stop)."""
    return sum(box.nbytes(2) + box.nbytes(GROUP) for box in _boxes(how, first, stop))


def turned_recipes(
    reader: SpanReader, how: Scaled, first: int, stop: int, out: Bytes
) -> list[Recipe]:
    """Recipes for the values [first, stop) of a turned tensor, in order; what they are made of goes
    to ``out``.

    Nothing that ``reader`` holds is left. Raises SourceChanged and CheckpointError.
    """
    filled = []
    for box in _boxes(how, first, stop):
        middle, end = box.nbytes(2), box.nbytes(2) + box.nbytes(GROUP)
        filled.append(_Filled(box, out[:middle], out[middle:end]))
        out = out[end:]
    for _, some in groupby(filled, lambda part: part.box.matrix):
        _read(reader, how, list(some))
    return [part.recipe() for part in filled]


def _boxes(how: Scaled, first: int, stop: int) -> Iterator[_Box]:
    """Of each matrix a rest of a row of values, rows, and a rest."""
    assert how.scaling is not None
    width, area = how.scaling.rows, how.scaling.rows * how.scaling.columns
    while first < stop:
        matrix, begin = divmod(first, area)
        count = min(area - begin, stop - first)
        row, column = divmod(begin, width)
        rows = 1 if column else max(1, count // width)
        box = _Box(matrix, column, min(width, column + count), row, row + rows)
        yield box
        first += rows * box.columns


def _read(reader: SpanReader, how: Scaled, filled: list[_Filled]) -> None:
    """Read boxes of one matrix, band by band."""
    scaling, boxes = how.scaling, [part.box for part in filled]
    assert scaling is not None
    groups = scaling.columns // GROUP
    first, last = min(box.left for box in boxes) // GROUP, max(box.lines(GROUP)[1] for box in boxes)
    top, bottom = min(box.top for box in boxes), max(box.bottom for box in boxes)
    step = max(1, _BAND // (groups * _HALF))
    for row in range(top, bottom, step):
        stop = min(row + step, bottom)
        begin = (boxes[0].matrix * scaling.rows + row) * groups + first
        reach = (stop - row - 1) * groups + last - first  # groups from the first to the last
        found = reader.acquire(
            np.array([how.elements, how.scales], np.int64),
            np.array([begin * _HALF, begin], np.int64),
            np.array([reach * _HALF, reach], np.int64),
        ).tolist()
        pairs, powers = bytes_at(found[0], reach * _HALF), bytes_at(found[1], reach)
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
