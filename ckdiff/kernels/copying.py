"""Copying many runs of bytes by one call."""

from __future__ import annotations

import ctypes

from ckdiff.kernels.abi import COPY_COLUMNS
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, Int64, place

_MEMMOVE = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0


def copy_runs(runs: Int64) -> None:
    """Copy each row (where to, where from, bytes), in order; the addresses must be good.

    Releases the GIL. Raises TypeError and ValueError for something else than runs.
    """
    if runs.ndim != 2 or runs.shape[1] != COPY_COLUMNS:
        raise ValueError(f"runs have {COPY_COLUMNS} columns")
    c_function("copy").ctypes(place(runs, I64), len(runs), _MEMMOVE)
