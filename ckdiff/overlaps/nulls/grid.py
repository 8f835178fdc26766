"""The numerics of margins: moments of elements, normal equations, and groups of like rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

TINY = 1e-100


def moments(odds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p and p(1 - p) from log-odds; no overflow, no cancellation."""
    small = np.exp(-np.abs(odds))
    rest = 1.0 / (1.0 + small)
    tail = small * rest
    return np.where(odds >= 0, rest, tail), tail * rest


def inverse(x: npt.ArrayLike, least: float = TINY) -> FloatArray:
    """1 / x, as if no x were less than ``least``."""
    return 1.0 / np.maximum(np.asarray(x, dtype=np.float64), least)


def normal(grid: FloatArray, left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Solve the normal equations of a fit alpha_i + beta_j with the weights ``grid``."""
    if grid.shape[0] < grid.shape[1]:
        beta, alpha = normal(grid.T, right, left)
        return alpha, beta
    row, column = grid.sum(1), grid.sum(0)
    tiny = 1e-14 * float(row.max()) + 1e-290
    scaled = grid / (row + tiny)[:, None]
    matrix = -(grid.T @ scaled)
    total = float(column.sum()) + tiny
    matrix += np.outer(column, column / total)  # alpha + t, beta - t is the same fit
    matrix[np.diag_indices_from(matrix)] += column + tiny
    beta = np.linalg.solve(matrix, right - left @ scaled)
    alpha = (left - grid @ beta) / (row + tiny)
    return alpha, beta


class Groups:
    """Rows (or columns) put into groups: sizes, means and products of deviations."""

    def __init__(self, label: IntArray, weights: FloatArray | None) -> None:
        self.label = label
        self.each = weights
        self.weights = np.bincount(label, weights).astype(np.float64)

    def mean(self, x: FloatArray) -> FloatArray:
        """The mean of x in every group."""
        return self.total(x) / self.weights

    def cross(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """The covariance of x and y in every group."""
        dx = x - self.mean(x)[self.label]
        dy = y - self.mean(y)[self.label]
        return np.clip(self.total(dx * dy) / self.weights, -1.0, 1.0)

    def total(self, x: FloatArray) -> FloatArray:
        """The sum of x in every group."""
        each = x if self.each is None else x * self.each
        sums = np.bincount(self.label, each, minlength=self.weights.size)
        return sums.astype(np.float64, copy=False)


def grouped(
    weights: FloatArray | None, *coordinates: FloatArray, limit: int, enough: float = 0.0
) -> IntArray:
    """Put points into at most ``limit`` groups of small spread; the group of every point.

    Groups are cut in two at the mean of their widest coordinate, the most spread out ones first,
    until the mean cube of the standard deviations is no more than ``enough``. With ``enough`` 0 and
    no more than ``limit`` distinct points, every group is one of them.
    """
    label = np.zeros(coordinates[0].size, dtype=np.int64)
    count = 1
    while count < limit:
        group = Groups(label, weights)
        spread = np.array([group.total((x - group.mean(x)[label]) ** 2) for x in coordinates])
        score = spread.sum(0)
        candidates = np.flatnonzero(score > 1e-18 * group.weights)
        cubes = score**1.5 / group.weights**0.5
        if not candidates.size or cubes.sum() <= enough * group.weights.sum():
            break
        most = min(limit - count, max(1, (candidates.size + 1) // 2))
        chosen = candidates[np.argsort(-score[candidates], kind="stable")[:most]]
        new = np.full(count, -1)
        new[chosen] = count + np.arange(chosen.size)
        widest = spread.argmax(0)
        above = np.zeros(label.size, dtype=np.bool_)
        for axis, x in enumerate(coordinates):
            above |= (widest[label] == axis) & (x > group.mean(x)[label])
        moved = above & (new[label] >= 0)
        label[moved] = new[label[moved]]
        count += chosen.size
    return np.unique(label, return_inverse=True)[1]
