"""The null `tensor`: masks are spread inside each tensor."""

from __future__ import annotations

from ckdiff.overlaps.nulls.moments import Moments, of_tensors
from ckdiff.overlaps.nulls.null import Counts, Null


def _moments(counts: Counts) -> Moments:
    """Every tensor is one cell."""
    groups = of_tensors(counts.elements, counts.changed, counts.groups, counts.number)
    return counts.shown(groups)


NULL = Null(
    given="Given each mask's size in each tensor.",
    rules_out="some tensors changing more than others",
    leaves="small weights flipping more easily under rounding, and favoured rows and columns",
    moments=_moments,
)
