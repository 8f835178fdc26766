"""The null `rowcol`: how far two masks of a matrix agree when only their margins are known.

For one 2-D tensor we know each mask's number of changed elements in every row and every column. The
null says that the two masks are independent, and that each is uniform over the matrices with its
margins (the microcanonical configuration model of a bipartite graph). :func:`fit` finds the
maximum-entropy probabilities that reproduce one mask's margins,

    p_ij = x_i y_j / (1 + x_i y_j)        (always within [0, 1]),

the model of Squartini & Garlaschelli 2011 (arXiv:1103.0701), bipartite in Saracco et al. 2015
(arXiv:1503.05098). :func:`expected` turns two fits into the mean and the variance of the
intersection *given the margins*. The formulas, and how well they are calibrated, are in
docs/design/0010-rowcol-null.md.

Everything happens on a grid of at most GROUPS x GROUPS cells of like rows and like columns, so time
and memory hardly depend on the size of the matrix. What grouping loses is put back to second order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.errors import UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

#: at most this many groups of like rows, and of like columns, for two masks and for fitting one
GROUPS, FITTED = 512, 256
#: what grouping may do to z
ACCURACY = 1e-3
#: what is certain lies this far from what is not, in log-odds: there exp() is exactly 0
CERTAIN = 2000.0
LARGEST = 300.0  # log-odds of a row or column that is not certain
TOLERANCE, CONVERGED = 1e-10, 1e-6  # of the margins, relative: where to stop, what will do
ITERATIONS = 80
SWEEPS = 25
SMALLEST = 1e-6  # variance: below it, it is rounding
TINY = 1e-100


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
        return _moments(self.rows[:, None] + self.columns)[0]


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


# -- fitting one mask ------------------------------------------------------------------------------


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
    row_of, column_of = _groups(m, a, limit=FITTED), _groups(n, b, limit=FITTED)
    i, j = _Groups(row_of, m), _Groups(column_of, n)
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
        da, db = _normal(m[:, None] * v * n, m * left, n * right)
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
    p, v = _moments(odds)
    value = m @ np.logaddexp(0.0, odds) @ n - (m * r) @ a - (n * c) @ b
    return float(value), p, v


def _refine(
    one: _Groups, other: _Groups, a: FloatArray, b: FloatArray, r: FloatArray, c: FloatArray
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
        _, v = _moments(one.mean(a)[:, None] + other.mean(b))
        da, db = _normal(
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
    a: FloatArray, r: FloatArray, across: _Groups, b: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """By how much each row falls short of its count r, and the derivative by its log."""
    mean, spread = across.mean(b), across.weights * across.cross(b, b)
    left, slope = np.empty_like(a), np.empty_like(a)
    for start in range(0, a.size, 1024):
        part = slice(start, start + 1024)
        p, v = _moments(a[part, None] + mean)
        left[part] = r[part] - p @ across.weights - ((0.5 - p) * v) @ spread
        slope[part] = np.maximum(v @ across.weights, 1e-300)
    return left, slope


def _relative(left: FloatArray, counts: FloatArray) -> float:
    return float((np.abs(left) / np.maximum(counts, 1.0)).max())


# -- two masks -------------------------------------------------------------------------------------


def expected(
    one: Fit, other: Fit, *, groups: int = GROUPS, accuracy: float = ACCURACY
) -> tuple[float, float]:
    """Mean and variance of the intersection of two masks, independent but for their margins.

    Both fits are of masks of one shape; with (observed - mean) / sqrt(variance) the observed
    intersection becomes a z. The variance is 0 where the margins leave no choice. ``groups`` bounds
    the grid on which this is computed; groups are made until they shift z by about ``accuracy`` at
    most.
    """
    if one.rows.shape != other.rows.shape or one.columns.shape != other.columns.shape:
        raise UsageError("the masks do not have the same shape")
    if not one.total or not other.total:
        return 0.0, 0.0
    size = one.rows.size * one.columns.size
    density = (one.total / size * other.total / size) ** 0.5
    enough = accuracy * (1 - density) / (density * size**0.5)  # of the mean, relative: a guess
    for _ in range(2):
        mean, variance = _on_a_grid(one, other, groups, enough)
        known = accuracy * variance**0.5 / max(mean, 1e-300)
        if enough <= 4 * known:
            break
        enough = known
    return mean, variance


def _on_a_grid(one: Fit, other: Fit, groups: int, enough: float) -> tuple[float, float]:
    """Mean and variance of the intersection from groups of like rows and columns."""
    i = _Groups(_groups(None, one.rows, other.rows, limit=groups, enough=enough), None)
    j = _Groups(_groups(None, one.columns, other.columns, limit=groups, enough=enough), None)
    m, n = i.weights, j.weights
    p, v = _moments(i.mean(one.rows)[:, None] + j.mean(one.columns))
    q, w = _moments(i.mean(other.rows)[:, None] + j.mean(other.columns))
    mean = float(m @ (p * q) @ n)
    curvatures = (
        (v * w, one, other),
        ((0.5 - p) * v * q, one, one),
        ((0.5 - q) * w * p, other, other),
    )
    for curvature, x, y in curvatures:  # what the spread of the logs inside a group adds
        mean += float((m * i.cross(x.rows, y.rows)) @ curvature @ n)
        mean += float(m @ curvature @ (n * j.cross(x.columns, y.columns)))
    first, second = _one(m, n, p, v, q), _one(m, n, q, w, p)
    variance = _both(m, n, v, w) + first[1] + second[1]
    return mean + first[0] + second[0], variance if variance > SMALLEST else 0.0


def _one(
    m: FloatArray, n: FloatArray, p: FloatArray, v: FloatArray, q: FloatArray
) -> tuple[float, float]:
    """What fixed margins of the mask (p, v) do to the sum of q over it: shift of mean, variance."""
    u = v / (1 - np.clip(v * _leverage(m, n, v), 0.0, 0.75))
    grid = m[:, None] * u * n
    alpha, beta = _normal(grid, (grid * q).sum(1), (grid * q).sum(0))
    left = q - alpha[:, None] - beta
    shift = -0.5 * float(m @ (v * (1 - 2 * p) * _leverage(m, n, u, 1.0) * left) @ n)
    return shift, float((grid * left * left).sum())


def _leverage(m: FloatArray, n: FloatArray, v: FloatArray, least: float = TINY) -> FloatArray:
    """How much of an element of variance v its row and its column fix, divided by v."""
    row, column = v @ n, m @ v
    return _inverse(row, least)[:, None] + _inverse(column, least) - _inverse(m @ row, least)


def _both(m: FloatArray, n: FloatArray, v: FloatArray, w: FloatArray) -> float:
    """Variance of the sum of the products of both masks' deviations."""
    table = v * w
    row, column = table @ n, m @ table
    total = float(m @ row)
    if total <= 0:
        return 0.0
    rows = float(m @ (row**2 * _inverse(v @ n) * _inverse(w @ n))) / total
    columns = float(n @ (column**2 * _inverse(m @ v) * _inverse(m @ w))) / total
    return total / ((1 - min(rows, 0.75)) * (1 - min(columns, 0.75)))


# -- numerics --------------------------------------------------------------------------------------


def _moments(odds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p and p(1 - p) from log-odds; no overflow, no cancellation."""
    small = np.exp(-np.abs(odds))
    rest = 1.0 / (1.0 + small)
    tail = small * rest
    return np.where(odds >= 0, rest, tail), tail * rest


def _inverse(x: npt.ArrayLike, least: float = TINY) -> FloatArray:
    """1 / x, as if no x were less than ``least``."""
    return 1.0 / np.maximum(np.asarray(x, dtype=np.float64), least)


def _normal(grid: FloatArray, left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Solve the normal equations of a fit alpha_i + beta_j with the weights ``grid``."""
    if grid.shape[0] < grid.shape[1]:
        beta, alpha = _normal(grid.T, right, left)
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


class _Groups:
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


def _groups(
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
        group = _Groups(label, weights)
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


def expected_pairs(fits: Sequence[Fit]) -> tuple[FloatArray, FloatArray]:
    """:func:`expected` of every two of K fits: two symmetric matrices, float64, shape (K, K).

    The diagonal is a mask with itself: its size, and variance 0.
    """
    mean = np.diag([float(one.total) for one in fits])
    variance = np.zeros_like(mean)
    for a, one in enumerate(fits):
        for b in range(a):
            mean[a, b], variance[a, b] = expected(one, fits[b])
            mean[b, a], variance[b, a] = mean[a, b], variance[a, b]
    return mean, variance
