"""FP4 in groups whose values are stored turned: rows of values are columns of what is stored.

A span of values needs a little of every row of a matrix. It is read in bands of rows, none of which
is held, so that neither memory nor what is fetched at a time grows with the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import SpanReader
from ckdiff.checkpoints.views.quantised import Scaled
from ckdiff.checkpoints.views.quantisedgrid import GROUP
from ckdiff.kernels import strided
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.scaling import powers_of_two, scale_halves

_BAND = 1 << 20  # bytes of elements that are asked for at a time
_ROWS, _GROUPS = 1024, 8  # of what is turned at a time: it stays in the cache
_HALF = GROUP // 2  # bytes of a group
_FLOAT = 4  # bytes of a value

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Box:
    """Rows and columns of what is stored, and where their values go, turned."""

    top: int
    bottom: int
    left: int
    right: int
    out: Floats  #: (right - left, bottom - top)


def values_turned(reader: SpanReader, how: Scaled, first: int, stop: int, out: Floats) -> None:
    """Write the values [first, stop) of a turned tensor to ``out``, as many float32.

    Nothing that ``reader`` holds is left. Raises SourceChanged and CheckpointError.
    """
    assert how.scaling is not None
    area, done = how.scaling.rows * how.scaling.columns, 0
    while first + done < stop:
        matrix, begin = divmod(first + done, area)
        count = min(area - begin, stop - first - done)
        boxes = list(_boxes(begin, begin + count, how.scaling.rows, out[done : done + count]))
        _matrix(reader, how, matrix, boxes)
        done += count


def _boxes(first: int, stop: int, width: int, out: Floats) -> Iterator[_Box]:
    """A rest of a row of values, rows, and a rest."""
    at = first
    while at < stop:
        row, column = divmod(at, width)
        whole = column == 0 and stop - at >= width
        count = (stop - at) // width * width if whole else min(width - column, stop - at)
        rows = count // width if whole else 1
        part = out[at - first : at - first + count].reshape(rows, -1)
        yield _Box(column, column + count // rows, row, row + rows, part)
        at += count


def _matrix(reader: SpanReader, how: Scaled, matrix: int, boxes: list[_Box]) -> None:
    """Compute boxes of one matrix, band by band."""
    scaling = how.scaling
    assert scaling is not None
    groups = scaling.columns // GROUP
    top, bottom = min(box.top for box in boxes), max(box.bottom for box in boxes)
    first = min(box.left for box in boxes) // GROUP
    last = -(-max(box.right for box in boxes) // GROUP)
    step = max(1, _BAND // (groups * _HALF))
    for row in range(top, bottom, step):
        rows = min(step, bottom - row)
        begin = (matrix * scaling.rows + row) * groups + first
        reach = (rows - 1) * groups + last - first  # groups from the first to the last
        found = reader.acquire(
            np.array([how.elements, how.scales], np.int64),
            np.array([begin * _HALF, begin], np.int64),
            np.array([reach * _HALF, reach], np.int64),
        ).tolist()
        held = _Held(bytes_at(found[0], reach * _HALF), bytes_at(found[1], reach), groups)
        _band(held, (rows, last - first), (row, first), boxes)
        reader.release()


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows of groups: their elements, two to a byte, and their scales, from the first one on."""

    elements: Bytes
    scales: Bytes
    groups: int  #: from a row to the next


def _band(held: _Held, shape: tuple[int, int], at: tuple[int, int], boxes: list[_Box]) -> None:
    """Put what is in boxes there, tile by tile, of a band of that many rows and groups; ``at`` is
    its row and group.
    """
    rows, some = shape
    for row in range(0, rows, _ROWS):
        for group in range(0, some, _GROUPS):
            down, across = min(_ROWS, rows - row), min(_GROUPS, some - group)
            tile = _turned(held, (row, group), (down, across))
            corner = at[0] + row, (at[1] + group) * GROUP
            for box in boxes:
                _put(tile, corner, (down, across * GROUP), box)


def _turned(held: _Held, at: tuple[int, int], shape: tuple[int, int]) -> tuple[Bytes, Floats]:
    """Some rows and groups of a band: a row of pairs for each two columns, and of scales for each
    group, all with columns to spare.
    """
    (down, across), begin = shape, at[0] * held.groups + at[1]
    wide = (down // LANES + 2) * LANES
    found = []
    for data, bytes_of in ((held.elements, _HALF), (held.scales, 1)):
        out = np.empty((across * bytes_of, wide), np.uint8)
        strided.copy(
            data[begin * bytes_of :], out.reshape(-1),
            (across * bytes_of, down), (1, held.groups * bytes_of), (wide, 1), 1,
        )  # fmt: skip
        found.append(out)
    return found[0], powers_of_two(found[1])


def _put(
    tile: tuple[Bytes, Floats], corner: tuple[int, int], shape: tuple[int, int], box: _Box
) -> None:
    """Put the values of a tile, whose first is of that row and column, that are in a box there."""
    top, left = max(corner[0], box.top), max(corner[1], box.left)
    bottom = min(corner[0] + shape[0], box.bottom)
    right = min(corner[1] + shape[1], box.right)
    if top < bottom and left < right:
        height = box.out.shape[1]
        out = box.out.reshape(-1)[(left - box.left) * height + top - box.top :]
        first = left - corner[1], top - corner[0]
        size = right - left, bottom - top
        scale_halves(*tile, first, size, out.view(np.uint8), _FLOAT * height)
