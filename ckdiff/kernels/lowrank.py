"""Thin matrices multiplied, in float32 and in one order: the same everywhere, however it is cut.

An element of ``left @ right`` begins as +0, and each k adds left[i, k] * right[k, j] in one fused
step, rounded once; a rank of one is the plain product. It is then multiplied by the scale, and
added to another matrix, and rounded at both. Denormals are kept, whatever mode the thread is in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import place, room

Float32 = npt.NDArray[np.float32]
_F32: np.dtype[Any] = np.dtype(np.float32)


def padded(columns: int) -> int:
    """The columns that a matrix must have so that it has ``columns``: whole words of lanes."""
    return -(-columns // LANES) * LANES


def multiply(
    left: Float32, right: Float32, scale: float, out: Float32, added: Float32 | None = None
) -> None:
    """Write ``added + scale * (left @ right)`` to ``out``; ``added`` may be ``out`` itself.

    left is (rows, rank), right (rank, columns), the others (rows, columns), all C-contiguous
    float32; columns are a multiple of 64. The scale is rounded to float32. Releases the GIL. Raises
    ValueError and TypeError for other arrays.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    wrong = right.shape[0] != rank or out.shape != (rows, columns)
    if wrong or columns % LANES or not rank or (added is not None and added.shape != out.shape):
        raise ValueError("the shapes of the matrices do not fit, or are not padded")
    (bits,) = np.array([scale]).astype(_F32).view(np.int32).tolist()
    c_function("lowrank").ctypes(
        place(left, _F32), place(right, _F32), 0 if added is None else place(added, _F32),
        room(out, _F32), rows, columns, rank, bits,
    )  # fmt: skip
