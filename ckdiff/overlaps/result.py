"""What an overlap found: counts, and the ratios they give.

Counts are exact integers, added up over groups; every ratio is computed from counts in the end.
Definitions (o1, o2, expected Jaccard) follow arXiv:2505.11711.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import CkdiffError
from ckdiff.figures.frames import Framed, Record
from ckdiff.overlaps.nulls.moments import Moments, figures
from ckdiff.overlaps.shown import COLUMNS, OverlapPlots, overlap_html, pair_records
from ckdiff.stores.summaries import By

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Overlap(Framed):
    """What some runs changed in common. Row 0 of every table is the whole model.

    Pairs of runs (a, b), a < b, are in row-major order in ``moments``; ``pairs`` holds the upper
    triangle with the diagonal, whose entries are the sizes.
    """

    stores: list[str]  #: as they were given
    rule: str
    by: By
    groups: list[str] = field(repr=False)  #: the first is ``model``
    elements: IntArray = field(repr=False)  #: (rows,)
    pairs: IntArray = field(repr=False)  #: (rows, upper triangle with diagonal)
    votes: IntArray = field(repr=False)  #: (rows, stores + 1): what changed in exactly j runs
    null_names: tuple[str, ...]
    moments: dict[str, Moments] = field(repr=False)  #: of the intersections, by null
    #: tensors that are not in all stores with one shape: name, reason, and which stores
    left_out: list[dict[str, Any]] = field(default_factory=list, repr=False)
    #: tensors whose base content is not the same in all stores
    other_base: list[str] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    #: tensors of which that is not known, because not every run read them
    unknown_base: list[str] = field(default_factory=list, repr=False)
    #: (rows, pairs, 3), where the checkpoints were read: of the shared elements those that moved
    #: the same way, opposite ways, and neither way
    directions: IntArray | None = field(default=None, repr=False)

    @property
    def counts(self) -> IntArray:
        """Intersections over the whole model, int64 (stores, stores); sizes on the diagonal."""
        return self._square(self.pairs[0])

    @property
    def jaccard(self) -> FloatArray:
        """``|A and B| / |A or B|`` of the model, (stores, stores); NaN for two empty masks."""
        counts = self.counts
        sizes = np.diag(counts)
        with np.errstate(invalid="ignore"):
            result: FloatArray = counts / (sizes[:, None] + sizes - counts)
        return result

    @property
    def nulls(self) -> dict[str, dict[str, FloatArray]]:
        """For each null ``expected``, ``lift``, ``z`` and ``expected_jaccard`` over the whole
        model, float64 (stores, stores); NaN on the diagonal and where there is no value."""
        size = len(self.stores)
        out = {}
        for name in self.null_names:
            keys = ("expected", "lift", "z", "expected_jaccard")
            tables = {key: np.full((size, size), np.nan) for key in keys}
            for pair in self._pairs(0):
                a, b, values = pair["a"], pair["b"], pair["nulls"][name]
                for key, table in tables.items():
                    table[a, b] = table[b, a] = np.nan if values[key] is None else values[key]
            out[name] = tables
        return out

    def each_row(self) -> Iterator[dict[str, Any]]:
        """The rows of the JSON contract, one at a time: a row is far larger than its counts."""
        sizes = self.pairs[:, diagonal(len(self.stores))]
        for row, group in enumerate(self.groups):
            yield {
                "group": group,
                "elements": int(self.elements[row]),
                "sizes": sizes[row].tolist(),
                "pairs": self._pairs(row),
                "votes": self.votes[row].tolist(),
            }

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the JSON contract."""
        return list(self.each_row())

    def to_dict(self) -> dict[str, Any]:
        """What ``ckdiff overlap --json`` prints."""
        return self.head() | {"rows": self.rows()}

    def head(self) -> dict[str, Any]:
        """What ``to_dict`` gives, without the rows."""
        return {
            "stores": self.stores,
            "rule": self.rule,
            "by": self.by,
            "nulls": list(self.null_names),
            "left_out": self.left_out,
            "other_base": self.other_base,
            "unknown_base": self.unknown_base,
            "seconds": self.seconds,
        }

    def records(self) -> list[Record]:
        """A dict for each row and each pair of runs: ``group``, ``a`` and ``b`` (positions),
        ``run_a`` and ``run_b`` (stores), ``elements``, ``size_a``, ``size_b``, then the keys of a
        pair in the JSON contract. Each null has its own keys, such as ``lift:tensor``.
        """
        return list(pair_records(self.each_row(), self.stores))

    @property
    def plot(self) -> OverlapPlots:
        """Pictures: ``plot.overlap()``, ``plot.votes()``."""
        return OverlapPlots(self.stores, self.null_names, next(self.each_row()))

    def _columns(self) -> Sequence[str]:
        return COLUMNS

    def _repr_html_(self) -> str:
        return overlap_html(self.head(), next(self.each_row()))

    def _square(self, upper: IntArray) -> IntArray:
        size = len(self.stores)
        out = np.zeros((size, size), np.int64)
        out[np.triu_indices(size)] = upper
        return out + np.triu(out, 1).T

    def _pairs(self, row: int) -> list[dict[str, Any]]:
        elements = int(self.elements[row])
        counts = self._square(self.pairs[row]).tolist()
        out = []
        pairs = [(a, b) for a in range(len(counts)) for b in range(a + 1, len(counts))]
        for i, (a, b) in enumerate(pairs):
            both, size_a, size_b = counts[a][b], counts[a][a], counts[b][b]
            nulls = {
                name: figures(
                    both, size_a, size_b, float(self.moments[name].mean[row, i]),
                    float(self.moments[name].variance[row, i]),
                )
                for name in self.null_names
            }  # fmt: skip
            first = nulls[self.null_names[0]]
            out.append(
                {
                    "a": a,
                    "b": b,
                    **pair_figures(both, size_a, size_b, elements),
                    "lift": first["lift"],
                    "z": first["z"],
                    "expected_jaccard": first["expected_jaccard"],
                    "nulls": nulls,
                    **({} if self.directions is None else ways(self.directions[row, i])),
                }
            )
        return out


def with_directions(result: Overlap, directions: IntArray) -> Overlap:
    """The same with which way runs moved what they share; CkdiffError unless that adds up."""
    shared = np.delete(result.pairs, diagonal(len(result.stores)), axis=1)
    if not np.array_equal(directions.sum(2), shared):
        raise CkdiffError(
            "the directions and the shared elements contradict each other",
            hint="run it again; if that does not help, please report it",
        )
    return replace(result, directions=directions)


def ways(counts: IntArray) -> dict[str, Any]:
    """The share of shared elements that moved the same way, of those that moved one way or another;
    without any None. By chance it is one half.
    """
    same, opposite, neither = counts.tolist()
    moved = same + opposite
    return {
        "same_direction": same / moved if moved else None,
        "moved_same": same,
        "moved_opposite": opposite,
        "moved_neither": neither,
    }


def diagonal(stores: int) -> list[int]:
    """Where in the upper triangle of pairs the sizes of the masks are."""
    return [a * stores - a * (a - 1) // 2 for a in range(stores)]


def pair_figures(both: int, size_a: int, size_b: int, elements: int) -> dict[str, Any]:
    """What the four counts of two masks say about their agreement; None where it has no value."""
    union = size_a + size_b - both
    neither = elements - union
    spread = math.sqrt(size_a * (elements - size_a)) * math.sqrt(size_b * (elements - size_b))
    crossed = (size_a - both) * (size_b - both)
    return {
        "intersection": both,
        "union": union,
        "jaccard": both / union if union else None,
        "o1": both / size_a if size_a else None,
        "o2": both / size_b if size_b else None,
        "phi": (both * elements - size_a * size_b) / spread if spread else None,
        "odds_ratio": both * neither / crossed if crossed else None,
    }
