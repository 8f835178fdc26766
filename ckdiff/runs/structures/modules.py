"""The stripes of the most striped matrices."""

from __future__ import annotations

import heapq
import threading
from typing import Any

import numpy as np

from ckdiff.runs.structures.counting import Counts, Integers
from ckdiff.runs.structures.result import Ranked, Structure

BINS = 96  #: of a stripe: so many neighbours are drawn as one
_KEPT = 6  #: matrices of each store
_ENOUGH = 256  #: changes below which a stripe is noise


class Stripes:
    """Keeps row and column profiles of the matrices whose changes gather most in few of them.

    To be told of the counts of each whole matrix, from any thread.
    """

    def __init__(self, found: Structure) -> None:
        self._found = found
        self._kept: list[list[tuple[float, int, dict[str, Any]]]] = [[] for _ in found.stores]
        self._lock = threading.Lock()

    def __call__(self, counts: Counts) -> None:
        """Look at the counts of one matrix."""
        for store, kept in enumerate(self._kept):
            rows, columns = counts.rows[store], counts.columns[store]
            total = int(rows.sum())
            if total < _ENOUGH:
                continue
            score = max(Ranked(rows).top_share(10), Ranked(columns).top_share(10))
            if len(kept) == _KEPT and score <= kept[0][0]:
                continue
            drawn = {"rows": binned(rows, len(columns)), "columns": binned(columns, len(rows))}
            entry = score, -counts.tensor, {"name": self._found.names[counts.tensor], **drawn}
            with self._lock:
                if len(kept) < _KEPT:
                    heapq.heappush(kept, entry)
                else:
                    heapq.heappushpop(kept, entry)

    def rows(self) -> list[dict[str, Any]]:
        """``store``, ``name``, and ``rows`` and ``columns``: densities along the matrix, at most
        96 of each; the most striped matrix of a store first.
        """
        return [
            {"store": store, **entry}
            for store, kept in enumerate(self._kept)
            for _, _, entry in sorted(kept, key=lambda item: (-item[0], -item[1]))
        ]


def binned(counts: Integers, width: int) -> list[float]:
    """Densities of rows, or columns, of ``width`` elements: neighbours share a bin."""
    bins = min(BINS, len(counts))
    edges = np.arange(bins + 1) * len(counts) // bins
    sums = np.add.reduceat(counts, edges[:-1], dtype=np.int64)
    found: list[float] = (sums / (np.diff(edges) * width)).tolist()
    return found
