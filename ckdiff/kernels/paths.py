"""How far the elements of a run went at a step, and whether onward or back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DType
from ckdiff.kernels import abi, hashing
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import F64, I64, U8, Int64, place, room, within

#: the columns of a row: two float64, then counts (int64)
STEP_LENGTH, DISTANCE, ONWARD, BACK, NONFINITE = range(abi.PATHS_STEP)
COUNTS = ONWARD  #: the first of the counts
COLUMNS = abi.PATHS_STEP
JOB_COLUMNS = abi.PATHS_COLUMNS

Float64 = npt.NDArray[np.float64]


def add_paths(dtype: DType, jobs: Int64, into: Float64) -> None:
    """Add to rows of ``into`` what elements of ``dtype``, which are numbers, add up to.

    ``jobs`` is C-contiguous int64, (n, JOB_COLUMNS); its column PATHS_OUT has a row of ``into``,
    which is float64, (rows, COLUMNS), and whose counts are int64 all the same. Sums are taken in
    blocks of PATHS_BLOCK positions, and added in the order of the jobs.
    """
    if not dtype.numeric:
        raise ValueError(f"{dtype.name} has no numbers")
    if jobs.ndim != 2 or jobs.shape[1] != abi.PATHS_COLUMNS:
        raise ValueError(f"jobs have {abi.PATHS_COLUMNS} columns")
    if not len(jobs):
        return
    rows, positions = jobs[:, abi.PATHS_OUT], jobs[:, abi.PATHS_POSITION]
    within(int(rows.min()), int(rows.max()) + 1, len(into))
    if int(jobs[:, abi.PATHS_ELEMENTS].min()) < 0 or int(positions.min()) < 0:
        raise ValueError("a job has fewer than no elements")
    if (positions % hashing.UNIT).any():
        raise ValueError("jobs begin at whole units")
    led = jobs.copy()
    led[:, abi.PATHS_OUT] = room(into, F64, len(into) * COLUMNS) + 8 * COLUMNS * rows
    scratch = np.zeros(abi.PATHS_SCRATCH, np.uint8)
    c_function("paths", dtype.name).ctypes(place(led, I64), len(led), room(scratch, U8))
