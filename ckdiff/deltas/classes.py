"""Which ranges of the base's magnitude change alike.

After a training step a weight's bits change the likelier the smaller the weight is: an update of
1e-6 moves every weight of 1e-5, and few of 1e-1. Coding the positions of each range by themselves
costs about a quarter less then. The ranges are found in a sample, by dynamic programming over
where to cut so that the entropy of the positions, given the range, is least.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST_CLASSES = 8
#: what one more class must save, in bits: its description and its streams; and, for each element,
#: the time that it takes, since a tenth of all time should not be spent on a hundredth of the size
_COST, _TIME = 1200.0, 0.0008
#: shares of the sample's elements and changes that a cut may move; what is finer is noise
_ELEMENTS, _CHANGES = 0.004, 0.015


def choose(counts: npt.NDArray[np.int64], elements: int) -> list[int]:
    """The first bins of the classes, ascending; the first one is 0.

    ``counts`` is (bins, 2): elements and changed elements of a sample, by bin. ``elements`` is how
    many there are in all.
    """
    totals = counts.sum(axis=0)
    sampled, changed = int(totals[0]), int(totals[1])
    if changed == 0 or changed == sampled:
        return [0]
    starts, n, k = _candidates(counts, sampled, changed)
    if len(starts) == 1:
        return [0]
    # cost[i, j]: the positions of the candidates i <= . < j as one class
    n_sums, k_sums = (np.concatenate(([0], np.cumsum(x))) for x in (n, k))
    below = np.tri(len(n_sums), dtype=np.bool_)  # no such ranges
    n_all, k_all = n_sums[None, :] - n_sums[:, None], k_sums[None, :] - k_sums[:, None]
    n_all[below] = k_all[below] = 0
    cost = _position_bits(n_all, k_all)
    cost += (_COST / max(elements, 1) + _TIME) * sampled
    cost[below] = np.inf
    best, origins = cost[0], list[npt.NDArray[np.intp]]()
    totals_by_classes = [best[-1]]
    for _ in range(1, min(MOST_CLASSES, len(starts))):
        through = best[:, None] + cost
        origin = through.argmin(axis=0)
        best = through[origin, np.arange(len(origin))]
        origins.append(origin)
        totals_by_classes.append(best[-1])
    end, cuts = len(n_sums) - 1, list[int]()
    for origin in reversed(origins[: int(np.argmin(totals_by_classes))]):
        end = int(origin[end])
        cuts.append(int(starts[end]))
    return [0, *reversed(cuts)]


def _candidates(
    counts: npt.NDArray[np.int64], sampled: int, changed: int
) -> tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First bins of groups that are large enough to be told apart, with their sums."""
    steps = np.maximum(
        np.cumsum(counts[:, 0]) / (_ELEMENTS * sampled),
        np.cumsum(counts[:, 1]) / (_CHANGES * changed),
    ).astype(np.int64)
    # a bin begins a group where the bins before it have filled one more share
    starts = [0, *(np.flatnonzero(np.diff(steps[:-1], prepend=0) > 0) + 1).tolist()]
    sums = np.add.reduceat(counts, starts, axis=0)
    return starts, sums[:, 0], sums[:, 1]


def _position_bits(n: npt.NDArray[np.int64], k: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """n * H(k / n), the bits that say which k of n elements changed."""
    table = _times_log(int(n.max()))
    bits: npt.NDArray[np.float64] = table[n] - table[k] - table[n - k]
    return bits


_tables: list[npt.NDArray[np.float64]] = [np.zeros(1)]


def _times_log(most: int) -> npt.NDArray[np.float64]:
    """x * log2(x) for x up to ``most`` at least: a sample has few different counts."""
    table = _tables[-1]
    if len(table) <= most:
        x = np.arange(1 << most.bit_length(), dtype=np.float64)
        table = x * np.log2(np.maximum(x, 1))
        _tables.append(table)
    return table
