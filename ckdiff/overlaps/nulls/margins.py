"""How far two masks of a matrix agree when only their margins are known.

For one 2-D tensor we know each mask's number of changed elements in every row and every column. The
masks are taken to be independent, and each uniform over the matrices with its margins (the
microcanonical configuration model of a bipartite graph). :func:`expected` turns the fits of two
masks into the mean and the variance of the intersection *given the margins*. The formulas, and how
well they are calibrated, are in docs/design/0010-rowcol-null.md.

Everything happens on a grid of at most GROUPS x GROUPS cells of like rows and like columns, so time
and memory hardly depend on the size of the matrix. What grouping loses is put back to second order.

The symbols are that page's: p, q for the two masks' probabilities, v = p(1 - p), w = q(1 - q); V_i,
V_j, V are sums of v over a row, a column, everything; u is v with the degrees of freedom that the
margins take put back; alpha_i + beta_j is the least-squares fit to q with the weights u. On the
grid p, q, v, w, u are of one element of a cell, and m, n are the numbers of rows and of columns in
each group: a sum over the matrix is m @ table @ n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckdiff.errors import UsageError
from ckdiff.overlaps.nulls.fitting import Fit
from ckdiff.overlaps.nulls.grid import (
    TINY,
    FloatArray,
    Groups,
    grouped,
    inverse,
    moments,
    normal,
)

#: at most this many groups of like rows, and of like columns
GROUPS = 512
#: what grouping may do to z
ACCURACY = 1e-3
SMALLEST = 1e-6  # variance: below it, it is rounding


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
    i = Groups(grouped(None, one.rows, other.rows, limit=groups, enough=enough), None)
    j = Groups(grouped(None, one.columns, other.columns, limit=groups, enough=enough), None)
    m, n = i.weights, j.weights
    p, v = moments(i.mean(one.rows)[:, None] + j.mean(one.columns))
    q, w = moments(i.mean(other.rows)[:, None] + j.mean(other.columns))
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
    """What fixed margins of the mask (p, v) do to the sum of q over it: shift of mean, variance.

    The page's -1/2 sum v(1 - 2p) g (q - alpha - beta), and sum u(q - alpha - beta)**2.
    """
    u = v / (1 - np.clip(v * _leverage(m, n, v), 0.0, 0.75))
    grid = m[:, None] * u * n
    alpha, beta = normal(grid, (grid * q).sum(1), (grid * q).sum(0))
    left = q - alpha[:, None] - beta
    shift = -0.5 * float(m @ (v * (1 - 2 * p) * _leverage(m, n, u, 1.0) * left) @ n)
    return shift, float((grid * left * left).sum())


def _leverage(m: FloatArray, n: FloatArray, v: FloatArray, least: float = TINY) -> FloatArray:
    """How much of an element of variance v its row and its column fix, divided by v.

    1/V_i + 1/V_j - 1/V; with ``least`` 1 and u for v it is the page's g.
    """
    row, column = v @ n, m @ v
    return inverse(row, least)[:, None] + inverse(column, least) - inverse(m @ row, least)


def _both(m: FloatArray, n: FloatArray, v: FloatArray, w: FloatArray) -> float:
    """Variance of the sum of the products of both masks' deviations.

    Sum vw / ((1 - rho_r)(1 - rho_c)), where ``rows`` is rho_r and ``columns`` is rho_c.
    """
    table = v * w
    row, column = table @ n, m @ table
    total = float(m @ row)
    if total <= 0:
        return 0.0
    rows = float(m @ (row**2 * inverse(v @ n) * inverse(w @ n))) / total
    columns = float(n @ (column**2 * inverse(m @ v) * inverse(m @ w))) / total
    return total / ((1 - min(rows, 0.75)) * (1 - min(columns, 0.75)))


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
