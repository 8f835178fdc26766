"""A few kernels that are compiled in no time, and what they find: where code is kept is tested with
them, by many processes that have to compile.
"""

from __future__ import annotations

import itertools
import random

import numpy as np

from ckdiff.kernels.casting import widen
from ckdiff.kernels.copying import copy_runs
from ckdiff.kernels.counting import margins
from ckdiff.kernels.entropy import survey

KERNELS = ["copy", "margins", "survey", "widen F8_E4M3>F32"]
#: zeros, all bytes, and some more than whole words of lanes
DATA = random.Random(1).randbytes(2000) + bytes(85) + bytes(range(256)) + bytes([7] * 11)
_COLUMNS = 40
_ROWS = -(-8 * len(DATA) // _COLUMNS)


def found() -> list[list[int]]:
    """What the kernels make of DATA: one list of each, in the order of their names."""
    data = np.frombuffer(DATA, np.uint8)
    copied, wide = np.zeros(len(data), np.uint8), np.zeros(4 * len(data), np.uint8)
    cuts = [0, 1000, len(data)]
    runs = [
        [copied.ctypes.data + a, data.ctypes.data + a, b - a] for a, b in itertools.pairwise(cuts)
    ]
    copy_runs(np.array(runs, np.int64))
    rows, columns = np.zeros(_ROWS, np.int64), np.zeros(_COLUMNS, np.int64)
    margins(data, 8 * len(data), 0, rows, columns)
    widen(data, "F8_E4M3", "F32", wide)
    sums = [*rows.tolist(), *columns.tolist()]
    return [copied.tolist(), sums, list(survey(data)), wide.view("<u4").tolist()]


def expected() -> list[list[int]]:
    """The same without kernels."""
    from naive_values import wider  # not in the processes that only look

    data = np.frombuffer(DATA, np.uint8)
    flags = np.unpackbits(data, bitorder="little").astype(np.int64)
    matrix = np.pad(flags, (0, _ROWS * _COLUMNS - len(flags))).reshape(_ROWS, _COLUMNS)
    sums = [*matrix.sum(axis=1).tolist(), *matrix.sum(axis=0).tolist()]
    surveyed = [int(flags.sum()), int((data == 0).sum())]
    return [data.tolist(), sums, surveyed, wider("F8_E4M3", "F32", data).tolist()]
