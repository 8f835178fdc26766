"""The maximum-entropy model of one mask of a matrix, given its margins.

The margins are the numbers of changed elements of every row and every column. :func:`fit` finds the
probabilities that reproduce them,

    p_ij = x_i y_j / (1 + x_i y_j)        (always within [0, 1]),

the model of Squartini & Garlaschelli 2011 (arXiv:1103.0701), bipartite in Saracco et al. 2015
(arXiv:1503.05098). Like counts have like probabilities: everything happens on the distinct counts,
or on a grid of groups of them.

r, c are the counts of rows and columns; m, n how many rows and columns have each; a, b the logs of
x, y, to be found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.errors import UsageError
from ckdiff.overlaps.nulls.grid import FloatArray, Groups, IntArray, grouped, moments, normal

#: at most this many groups of like rows, and of like columns
FITTED = 256
#: what is certain lies this far from what is not, in log-odds: there exp() is exactly 0
CERTAIN = 2000.0
LARGEST = 300.0  # log-odds of a row or column that is not certain
TOLERANCE, CONVERGED = 1e-10, 1e-6  # of the margins, relative: where to stop, what will do
ITERATIONS = 80
SWEEPS = 25


@dataclass(frozen=True, eq=False)
class Fit:
    """Maximum-entropy probabilities of one mask of shape (R, C), made by :func:`fit`.

    Element (i, j) is changed with probability 1 / (1 + exp(-(rows[i] + columns[j]))). Rows and
    columns whose elements the margins leave no choice about have parameters beyond 1000.
    """

    #: float64, shape (R,): log x of every row
    rows: FloatArray
    #: float64, shape (C,): log y of every column
    columns: FloatArray
    #: changed elements of the mask
    total: int
    #: did the fit reproduce the margins to the tolerance?
    converged: bool
    #: largest difference between a fitted and a given margin, divided by max(1, margin)
    residual: float

    def probabilities(self) -> FloatArray:
        """p, float64, shape (R, C). For small matrices: it is as large as the matrix."""
        return moments(self.rows[:, None] + self.columns)[0]


def fit(rows: npt.ArrayLike, columns: npt.ArrayLike) -> Fit:
    """The maximum-entropy model of a mask with these margins.

    ``rows`` are the changed elements of each of the R rows, ``columns`` of each of the C columns
    (integers, shapes (R,) and (C,)). Never fails to return: margins that no matrix has give
    ``converged=False``. Raises UsageError if the margins contradict each other in their sum or
    range.
    """
    r = np.asarray(rows, dtype=np.int64)
    c = np.asarray(columns, dtype=np.int64)
    if r.ndim != 1 or c.ndim != 1:
        raise UsageError("the margins of a matrix are two lists of counts")
    for counts, most in ((r, c.size), (c, r.size)):
        if counts.size and (counts.min() < 0 or counts.max() > most):
            raise UsageError(f"a margin is not within 0 and {most}")
    total = int(r.sum())
    if total != int(c.sum()):
        raise UsageError(f"the rows hold {total} changed elements, the columns {int(c.sum())}")
    # one entry per distinct count is all there is to solve for
    row_counts, row_of, row_weights = np.unique(r, return_inverse=True, return_counts=True)
    column_counts, column_of, column_weights = np.unique(c, return_inverse=True, return_counts=True)
    one = _Side(row_counts, row_weights)
    other = _Side(column_counts, column_weights)
    residual = _solve(one, other) if _peel(one, other) else float("inf")
    converged = bool(residual <= CONVERGED)
    return Fit(one.logs[row_of], other.logs[column_of], total, converged, residual)


class _Side:
    """The distinct counts of the rows (or columns): how often, and the logs to be found."""

    def __init__(self, counts: IntArray, weights: IntArray) -> None:
        self.counts = counts.astype(np.float64)  # what the free part of the other side must supply
        self.weights = weights.astype(np.float64)
        self.free = np.ones(counts.size, dtype=np.bool_)
        self.logs = np.zeros(counts.size)
        self.order = np.zeros(counts.size)  # when it was found certain, with the sign; 0: free

    def size(self) -> float:
        """How many rows are free."""
        return float(self.weights[self.free].sum())


def _peel(one: _Side, other: _Side) -> bool:
    """Set aside rows and columns that are empty or full, then those that become so, and so on.

    What is found first gets the largest logs, so that the sign of a sum of logs is right.
    False where no matrix has these margins.
    """
    step = 0
    again = True
    while again:
        again = False
        for side, across in ((one, other), (other, one)):
            length = across.size()
            if (side.free & ((side.counts < 0) | (side.counts > length))).any():
                return False
            full = side.free & (side.counts >= length)
            empty = side.free & (side.counts <= 0) & ~full
            if not (full.any() or empty.any()):
                continue
            again = True
            step += 1
            across.counts[across.free] -= side.weights[full].sum()
            side.free &= ~(full | empty)
            side.order[full] = step
            side.order[empty] = -step
    for side in (one, other):
        size = np.where(side.order == 0, 0.0, step + 1 - np.abs(side.order))
        side.logs = CERTAIN * np.sign(side.order) * size
    return True


def _solve(one: _Side, other: _Side) -> float:
    """Find the logs of the free rows and columns; the residual of the margins."""
    if not one.free.any() or not other.free.any():
        return 0.0
    sides = (one, other)
    r, c = (side.counts[side.free] for side in sides)
    m, n = (side.weights[side.free] for side in sides)
    rows, columns = float(m.sum()), float(n.sum())
    density = float(m @ r) / (rows * columns)
    if not 0 < density < 1 or r.min() < 0 or c.min() < 0:
        return float("inf")  # margins that no matrix has
    half = 0.5 * np.log(density / (1 - density))
    a = np.log(r / (columns - r)) - half  # right where either margin is constant
    b = np.log(c / (rows - c)) - half
    row_of, column_of = grouped(m, a, limit=FITTED), grouped(n, b, limit=FITTED)
    i, j = Groups(row_of, m), Groups(column_of, n)
    start = i.mean(a), j.mean(b)
    x, y, residual = _newton(i.weights, j.weights, i.mean(r), j.mean(c), *start)
    a += (x - start[0])[row_of]
    b += (y - start[1])[column_of]
    if i.weights.size < a.size or j.weights.size < b.size:
        residual = _refine(i, j, a, b, r, c)
    one.logs[one.free] = a
    other.logs[other.free] = b
    return residual


def _newton(
    m: FloatArray, n: FloatArray, r: FloatArray, c: FloatArray, a: FloatArray, b: FloatArray
) -> tuple[FloatArray, FloatArray, float]:
    """Damped Newton iteration on the convex dual of the entropy; a, b and the residual."""
    best = (a, b, np.inf)
    value, p, v = _dual(m, n, r, c, a, b)
    for _ in range(ITERATIONS):
        left, right = r - p @ n, c - m @ p
        residual = max(_relative(left, r), _relative(right, c))
        if residual < best[2]:
            best = (a, b, residual)
        if residual <= TOLERANCE / 100:
            break
        da, db = normal(m[:, None] * v * n, m * left, n * right)
        slope = float((m * left) @ da + (n * right) @ db)
        step = min(1.0, 20.0 / max(1e-300, np.abs(da).max(), np.abs(db).max()))
        while step > 1e-6:
            x = np.clip(a + step * da, -LARGEST, LARGEST)
            y = np.clip(b + step * db, -LARGEST, LARGEST)
            new, p, v = _dual(m, n, r, c, x, y)
            closer = max(_relative(r - p @ n, r), _relative(c - m @ p, c)) < 0.9 * residual
            if closer or new < value - 1e-4 * step * slope:
                break
            step /= 2
        else:
            break  # as good as rounding lets it be
        a, b, value = x, y, new
    return best


def _dual(
    m: FloatArray, n: FloatArray, r: FloatArray, c: FloatArray, a: FloatArray, b: FloatArray
) -> tuple[float, FloatArray, FloatArray]:
    """What Newton minimises (minus the log-likelihood), p and p(1 - p)."""
    odds = a[:, None] + b
    p, v = moments(odds)
    value = m @ np.logaddexp(0.0, odds) @ n - (m * r) @ a - (n * c) @ b
    return float(value), p, v


def _refine(
    one: Groups, other: Groups, a: FloatArray, b: FloatArray, r: FloatArray, c: FloatArray
) -> float:
    """Give every distinct count its own log: changes ``a`` and ``b``; the residual.

    Newton steps on the grid of groups alternate with steps of every row against the groups of
    columns and of every column against the groups of rows.
    """
    residual = np.inf
    best = a.copy(), b.copy()
    for _ in range(SWEEPS):
        left, _, right, _ = *_missing(a, r, other, b), *_missing(b, c, one, a)
        now = max(_relative(left, r), _relative(right, c))
        if now < residual:
            best = a.copy(), b.copy()
        if not now < 0.8 * residual:
            break
        residual = now
        if residual <= TOLERANCE:
            break
        _, v = moments(one.mean(a)[:, None] + other.mean(b))
        da, db = normal(
            one.weights[:, None] * v * other.weights, one.total(left), other.total(right)
        )
        a += np.clip(da, -1, 1)[one.label]
        b += np.clip(db, -1, 1)[other.label]
        for _ in range(2):
            left, slope = _missing(a, r, other, b)
            a += np.clip(left / slope, -1, 1)
        for _ in range(2):
            left, slope = _missing(b, c, one, a)
            b += np.clip(left / slope, -1, 1)
    a[:], b[:] = best
    return float(residual)


def _missing(
    a: FloatArray, r: FloatArray, across: Groups, b: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """By how much each row falls short of its count r, and the derivative by its log."""
    mean, spread = across.mean(b), across.weights * across.cross(b, b)
    left, slope = np.empty_like(a), np.empty_like(a)
    for start in range(0, a.size, 1024):
        part = slice(start, start + 1024)
        p, v = moments(a[part, None] + mean)
        left[part] = r[part] - p @ across.weights - ((0.5 - p) * v) @ spread
        slope[part] = np.maximum(v @ across.weights, 1e-300)
    return left, slope


def _relative(left: FloatArray, counts: FloatArray) -> float:
    return float((np.abs(left) / np.maximum(counts, 1.0)).max())
