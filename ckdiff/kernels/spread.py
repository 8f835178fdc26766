"""Tables of segments, made from few numbers where rows are equally far apart."""

from __future__ import annotations

import numpy as np

from ckdiff.kernels import abi
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import I64, Int64, place, room

_MOST = 1 << 40  # rows of all: no table has more


def spread(heads: Int64, steps: Int64) -> Int64:
    """The segments of rows that are equally far apart on both sides.

    ``heads`` are those of the first rows, (n, SEG_COLUMNS) int64, and ``steps``, (n, STEP_COLUMNS)
    int64, say how many rows there are and how far each is from the one before. Gives C-contiguous
    (rows, SEG_COLUMNS) int64. Raises ValueError for tables of other sizes, for rows that are no
    number of them, and for steps that are no whole units.
    """
    count = len(heads)
    if heads.shape[1:] != (abi.SEG_COLUMNS,) or steps.shape != (count, abi.STEP_COLUMNS):
        raise ValueError("each segment has its steps")
    rows, further = steps[:, abi.STEP_ROWS], steps[:, abi.STEP_POSITION]
    if count and not 0 <= int(rows.min()) <= int(rows.max()) <= _MOST // count:
        raise ValueError("so many rows are no number of rows")
    if (further % UNIT).any():
        raise ValueError("rows begin with whole units")
    out = np.empty((int(rows.sum()), abi.SEG_COLUMNS), np.int64)
    c_function("spread").ctypes(place(heads, I64), place(steps, I64), count, room(out, I64))
    return out
