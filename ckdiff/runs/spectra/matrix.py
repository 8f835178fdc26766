"""One matrix in memory, and its singular values: what ``spectrum`` and ``principal`` compute with.

Everything is in float32, as the measurements of the papers are; sums of squares in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.runs.values import FloatReader, Floats

Shape = tuple[int, int]
FloatArray = npt.NDArray[np.float64]

_WINDOW = 1 << 20  #: elements that are read at a time


def read_matrix(
    reader: FloatReader, tensor: int, shape: Shape, minus: Floats | None = None
) -> Floats:
    """A tensor as a float32 matrix; with ``minus`` the difference, which is written there."""
    rows, width = shape
    elements = rows * width
    out = np.empty(elements, np.float32) if minus is None else minus.reshape(-1)
    for start in range(0, elements, _WINDOW):
        part = out[start : start + _WINDOW]
        if minus is None:
            reader.read(tensor, start, part)
        else:
            window = np.empty(len(part), np.float32)
            reader.read(tensor, start, window)
            with np.errstate(over="ignore", invalid="ignore"):
                np.subtract(window, part, out=part)
        reader.release()
    return out.reshape(rows, width)


def finite(matrix: Floats) -> bool:
    """Whether all elements are; looked at a few rows at a time."""
    return all(bool(np.isfinite(part).all()) for part in _parts(matrix))


def _parts(matrix: Floats) -> Iterator[Floats]:
    flat = matrix.reshape(-1)
    return (flat[at : at + _WINDOW] for at in range(0, len(flat), _WINDOW))


def values_memory(shape: Shape) -> int:
    """Bytes that the singular values of a matrix take, the matrix included: it, and LAPACK's copy
    and work.
    """
    small = min(shape)
    return 4 * (2 * shape[0] * shape[1] + 64 * sum(shape) + 8 * small) + 5 * 4 * _WINDOW


def vectors_memory(shape: Shape) -> int:
    """Bytes that singular vectors take as well: both sides, and more work."""
    small = min(shape)
    return values_memory(shape) + 4 * (sum(shape) * small + 8 * small * small)


def singular_values(matrix: Floats) -> FloatArray:
    """The singular values, the largest first; of a matrix that is all zeros, zeros."""
    if not matrix.any():
        return np.zeros(min(matrix.shape))
    return np.linalg.svd(matrix, compute_uv=False).astype(np.float64)


def rank(values: FloatArray, shape: Sequence[int]) -> int:
    """The numerical rank, as ``torch.linalg.matrix_rank`` counts it in float32: singular values
    above max(shape) * eps * the largest one.
    """
    if not len(values):
        return 0
    tolerance = max(shape) * float(np.finfo(np.float32).eps) * float(values[0])
    return int(np.count_nonzero(values > tolerance))


def rank_of_energy(values: FloatArray, share: float) -> int:
    """The fewest singular values with at least this share of the sum of squares; 0 of zeros."""
    energy = np.cumsum(values**2)
    if not len(values) or not energy[-1]:
        return 0
    return int(np.searchsorted(energy, share * energy[-1])) + 1
