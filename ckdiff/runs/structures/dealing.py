"""How matrices are dealt out: pieces for workers, and where the windows of a walk end.

A piece is several small matrices, or some rows of a large one; a window is as many whole rows as it
has room for. Both begin with a whole 64 bytes of mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckdiff.kernels import profiles
from ckdiff.layout import ALIGNMENT, Layout
from ckdiff.stores.maskwalk import window_elements, working_memory

Shape = tuple[int, int]  # of a matrix: rows, columns

BLOCK = 128  # rows of the largest blocks that are counted
LARGEST = 32  # inner chunks of a window: what is done for each is small beside decoding it
_PIECE = 1 << 25  # elements
_ROWS = 512  # at whose multiples pieces of a matrix begin
#: and where so many are much more than a piece: so that several workers have some of a few matrices
_FEWER = (256, BLOCK, 64, 32, 16)
_PIECES = 16  # as many are enough
_FEW = 8  # rows: where a window has fewer, several are put together
_GATHERED = 16  # rows that are


def pieces(layout: Layout, shapes: Sequence[Shape], size: int = _PIECE) -> list[tuple[int, int]]:
    """Ranges of addresses [first, stop), in order; all elements lie in one of them.

    Rows of a matrix that lie in one are whole blocks of 128 x 128, or of 16 x 16 in one row of
    these.
    """
    found: list[tuple[int, int]] = []
    most = max(size, layout.total // _PIECES)
    begin = end = 0
    rows = zip(layout.starts.tolist(), layout.elements.tolist(), shapes, strict=True)
    for start, elements, (_, width) in rows:
        if begin < end and start + elements - begin > size:
            found.append((begin, end))
            begin = start
        end = start + elements
        step = _rows(max(1, width), size, most) * width
        while (begin > start or end - begin > size) and begin + step < end:
            found.append((begin, begin + step))
            begin += step
        if begin > start:  # the rest of a matrix is a piece by itself
            found.append((begin, end))
            begin = end = start + -(-elements // ALIGNMENT) * ALIGNMENT
    if begin < end:
        found.append((begin, end))
    return found


def _rows(width: int, size: int, most: int) -> int:
    """Rows of a piece of a large matrix: about ``size`` elements, or ``most`` if need be."""
    if size // width >= _ROWS:
        return size // width // _ROWS * _ROWS
    least = _together(width)
    fine = [rows for rows in _FEWER if rows >= least]
    return next((rows for rows in fine if rows * width <= most), fine[-1] if fine else _ROWS)


def _together(width: int) -> int:
    """How many rows begin with a whole 64 bytes of mask, as the first one does."""
    return ALIGNMENT // math.gcd(ALIGNMENT, width)


def gathered(width: int, stores: int) -> int:
    """How many rows are put together before they are counted: of wide matrices several."""
    return _GATHERED if window_elements(stores, LARGEST) < _FEW * width else 1


@dataclass(frozen=True, slots=True)
class WholeRows:
    """Where a window of a walk ends: behind a row if it can; see ``walk``."""

    layout: Layout
    shapes: Sequence[Shape]

    def __call__(self, at: int, end: int) -> int:
        """The end of a window that begins ``at`` and has room up to ``end``."""
        starts = self.layout.starts
        last = int(np.searchsorted(starts, end, side="right")) - 1
        start, width = int(starts[last]), max(1, self.shapes[last][1])
        some = _together(width) * width
        last_row = start + (end - start) // some * some
        return last_row if last_row > at else end


def worker_memory(shapes: Sequence[Shape], stores: int, *, written: bool) -> int:
    """Bytes that a worker needs: a walk, and what it counts of the largest matrix.

    ``written`` says that profiles are written to a file.
    """
    most = max((_of_one(shape, stores, written=written) for shape in shapes), default=0)
    return working_memory(stores, LARGEST) + most


def _of_one(shape: Shape, stores: int, *, written: bool) -> int:
    rows, width = shape
    longest, counter = max(shape), profiles.counter(rows)
    kept = profiles.memory(width, rows) + gathered(width, stores) * width // 8
    # what was counted of some rows, and the matrix that they are added to
    parts = 2 * (8 * rows + counter * width) + rows * width // BLOCK**2
    # of one profile: its counts in order, or who is in the most changed tenth
    figures = 32 * longest if stores > 1 or min(shape) > profiles.MOST_ROWS else 2 << 20
    return stores * (kept + parts + (8 * longest if written else 0)) + figures
