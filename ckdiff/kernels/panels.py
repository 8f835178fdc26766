"""Panels: a copy, and the segments that are compared as soon as it is made.

What is gathered for a whole window goes out to memory and comes back. A panel stays in the caches,
and the next is written over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckdiff.kernels import abi
from ckdiff.kernels.memory import I64, Int64, place, within
from ckdiff.kernels.strided import Copying


@dataclass(frozen=True, slots=True)
class Panel:
    """What is copied, if anything, and which segments are compared then: from one to another."""

    copying: Copying | None
    first: int
    stop: int


def table(panels: Sequence[Panel], segments: int) -> Int64:
    """What the kernel walks: good as long as the panels are. Raises ValueError for panels that have
    a segment twice, or do not have all of them.
    """
    rows = []
    for panel in panels:
        within(panel.first, panel.stop, segments)
        copying, some = panel.copying, (panel.first, panel.stop - panel.first)
        if copying is None:
            rows.append((0, 0, 0, 0, *some))
        else:
            box = place(copying.table, I64)
            rows.append((copying.kernel.address, copying.source, copying.out, box, *some))
    found = np.array(rows, np.int64).reshape(-1, abi.PANEL_COLUMNS)
    order = np.argsort(found[:, abi.PANEL_FIRST], kind="stable")
    begins, counts = found[order, abi.PANEL_FIRST], found[order, abi.PANEL_SEGMENTS]
    some = counts > 0
    begins, ends = begins[some], (begins + counts)[some]
    if not (
        (counts >= 0).all() and np.array_equal(np.append(0, ends), np.append(begins, segments))
    ):
        raise ValueError("panels have each segment once")
    return found
