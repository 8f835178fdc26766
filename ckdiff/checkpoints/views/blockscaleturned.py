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
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.kernels.scaling import Scaling, scale

_BAND = 1 << 20  # bytes of elements that are asked for at a time
#: what is turned at a time; rows of a tile do not lie a power of two apart, where they would push
#: each other out of the cache
_ROWS, _GROUPS = 256, 7
_HALF = GROUP // 2  # bytes of a group

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
        shape = rows, last - first
        elements = _lines(bytes_at(found[0], reach * _HALF), shape, groups, _HALF)
        scales = _lines(bytes_at(found[1], reach), shape, groups, 1)
        _band(elements, scales, (row, first), boxes)
        reader.release()


def _lines(held: Bytes, shape: tuple[int, int], groups: int, width: int) -> Bytes:
    """The groups of some rows, that many bytes of each, as an array of rows."""
    rows, some = shape
    return np.ndarray((rows, some * width), np.uint8, held, strides=(groups * width, 1))


def _band(elements: Bytes, scales: Bytes, at: tuple[int, int], boxes: list[_Box]) -> None:
    """Scale a band, tile by tile, and put what is in boxes there; ``at`` is its row and group."""
    rows, groups = scales.shape
    made = np.empty(_ROWS * _GROUPS * GROUP, np.float32)
    for row in range(0, rows, _ROWS):
        for group in range(0, groups, _GROUPS):
            down, across = min(_ROWS, rows - row), min(_GROUPS, groups - group)
            held = elements[row : row + down, group * _HALF : (group + across) * _HALF]
            data = np.ascontiguousarray(held).reshape(-1)
            powers = np.ascontiguousarray(scales[row : row + down, group : group + across])
            tile = made[: down * across * GROUP]
            scaling = Scaling("F4", "F8_E8M0", down, across * GROUP, (1, GROUP))
            scale(data, scaling, 0, powers.reshape(-1), 0, tile.view(np.uint8))
            corner = at[0] + row, (at[1] + group) * GROUP
            for box in boxes:
                _put(tile.reshape(down, -1), corner, box)


def _put(tile: Floats, corner: tuple[int, int], box: _Box) -> None:
    """Put the values of a tile, whose first is of that row and column, that are in a box there."""
    top, left = max(corner[0], box.top), max(corner[1], box.left)
    bottom = min(corner[0] + tile.shape[0], box.bottom)
    right = min(corner[1] + tile.shape[1], box.right)
    if top < bottom and left < right:
        part = tile[top - corner[0] : bottom - corner[0], left - corner[1] : right - corner[1]]
        box.out[left - box.left : right - box.left, top - box.top : bottom - box.top] = part.T
