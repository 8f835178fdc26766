"""How many elements of each size changed: what the null `magnitude` counts, added up for show."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.binades import bins
from ckdiff.overlaps.nulls.magnitude import BinadeCounts
from ckdiff.overlaps.nulls.null import Evidence
from ckdiff.stores.table import IntArray


class Magnitudes:
    """Listens to an overlap that counts the null ``magnitude``; see ``OverlapTask.heard``."""

    def __init__(self, dtypes: Sequence[str], stores: int) -> None:
        self._dtypes, self._stores = dtypes, stores
        self._counts: dict[str, IntArray] = {}  #: of each float dtype, (1 + stores, bins)
        self._lock = threading.Lock()

    def __call__(self, tensor: int, evidence: Evidence) -> None:
        """Take the evidence of one whole tensor; from any thread."""
        dtype = self._dtypes[tensor]
        if not isinstance(evidence, BinadeCounts) or DTYPES[dtype].kind != "float":
            return
        with self._lock:
            before = self._counts.get(dtype)
            self._counts[dtype] = evidence.counts + (0 if before is None else before)

    def rows(self) -> list[dict[str, Any]]:
        """``exponent`` (2**k <= abs(base) < 2**(k+1); None for zeros), ``elements``, ``changed``.

        ``changed`` has a count for each store. Subnormal numbers count under the exponent right
        below the normal ones. Infinities are left out, and NaN where it shares their exponent.
        """
        sums: dict[int | None, IntArray] = {}
        for dtype, counts in self._counts.items():
            kind = DTYPES[dtype]
            for k in range(bins(kind) - (kind.special == "ieee")):
                exponent = None if k == 0 else k - 1 - kind.bias
                column = sums.setdefault(exponent, np.zeros(1 + self._stores, np.int64))
                column += counts[:, k]
        order = sorted(sums, key=lambda k: (k is not None, k or 0))
        return [
            {"exponent": k, "elements": int(sums[k][0]), "changed": sums[k][1:].tolist()}
            for k in order
            if sums[k][0]
        ]
