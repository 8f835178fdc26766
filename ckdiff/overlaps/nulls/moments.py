"""What chance would give: expected intersections of masks, from counts of cells.

Inside a *cell* of n elements, of which a changed in one run and b in another, independence given
those counts makes the intersection hypergeometric: mean a*b/n, variance
a*b*(n-a)*(n-b) / (n**2 * (n-1)). A null says what the cells are; means and variances of cells add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_BLOCK = 1 << 20  # numbers worked on at a time


@dataclass(slots=True, eq=False)
class Moments:
    """Mean and variance of the intersection, for rows x pairs of runs (a < b, row-major)."""

    mean: FloatArray
    variance: FloatArray

    @classmethod
    def zeros(cls, rows: int, stores: int) -> Moments:
        """Nothing expected yet."""
        pairs = stores * (stores - 1) // 2
        return cls(np.zeros((rows, pairs)), np.zeros((rows, pairs)))

    def add(self, row: int, mean: FloatArray, variance: FloatArray) -> None:
        """Add the moments of a cell, or of several added up, to a row."""
        self.mean[row] += mean
        self.variance[row] += variance


def of_cells(elements: npt.ArrayLike, changed: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """(mean, variance) of the intersection of each pair, summed over cells.

    ``elements`` has shape (cells,), ``changed`` (stores, cells).
    """
    n = np.asarray(elements, np.float64)
    a = np.asarray(changed, np.float64)
    some = n > 0
    n, a = n[some], a[:, some]
    # n - a is exact as long as counts are below 2**53; n - 1 is 0 where nothing can vary
    spread = a * (n - a)
    return _pair_sums(a / n, a), _pair_sums(spread / (n * n * np.maximum(n - 1, 1)), spread)


def _pair_sums(left: FloatArray, right: FloatArray) -> FloatArray:
    """Sums of products of the rows of each pair a < b.

    Not a matrix product: libraries for those add up in an order that depends on threads and on the
    processor, and a result must not depend on which worker of a cluster computed it.
    """
    sums = [(left[i] * right[i + 1 :]).sum(1) for i in range(len(left) - 1)]
    return np.concatenate(sums) if sums else np.empty(0)


def of_tensors(elements: IntArray, changed: IntArray, groups: IntArray, number: int) -> Moments:
    """Moments of each group, every tensor (or whatever ``elements`` counts) being one cell.

    ``elements`` and ``groups`` have shape (tensors,), ``changed`` (stores, tensors).
    """
    stores = len(changed)
    first, second = np.triu_indices(stores, 1)
    out = Moments.zeros(number, stores)
    step = max(1, _BLOCK // max(1, len(first)))
    for at in range(0, len(elements), step):
        part = slice(at, at + step)
        n = np.maximum(elements[part].astype(np.float64), 1)
        a = changed[:, part].astype(np.float64)
        mean = a[first] * (a[second] / n)
        spread = a * (n - a)
        variance = spread[first] * (spread[second] / (n * n * np.maximum(n - 1, 1)))
        np.add.at(out.mean, groups[part], mean.T)
        np.add.at(out.variance, groups[part], variance.T)
    return out


def figures(
    intersection: int, size_a: int, size_b: int, mean: float, variance: float
) -> dict[str, Any]:
    """The figures of one pair under one null, for JSON: what has no value is None."""
    union = size_a + size_b - mean
    return {
        "expected": mean,
        "lift": intersection / mean if mean > 0 else None,
        "z": (intersection - mean) / variance**0.5 if variance > 0 else None,
        "expected_jaccard": mean / union if union > 0 else None,
    }
