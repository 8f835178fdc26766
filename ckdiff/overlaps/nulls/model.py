"""The null `model`: masks are spread over all elements, or over those of a group in its row."""

from __future__ import annotations

import numpy as np

from ckdiff.overlaps.nulls.moments import Moments, of_tensors
from ckdiff.overlaps.nulls.null import Counts, Null


def _moments(counts: Counts) -> Moments:
    """Every row is one cell."""
    rows = np.arange(len(counts.row_elements))
    return of_tensors(counts.row_elements, counts.row_changed, rows, len(rows))


NULL = Null(
    given="In a group's row masks are spread over that group, given their sizes in it.",
    rules_out="an agreement that comes from the sizes of the masks",
    leaves="some tensors changing more than others",
    moments=_moments,
)
