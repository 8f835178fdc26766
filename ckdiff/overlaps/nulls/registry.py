"""The nulls: one line for each; what it is, is in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckdiff.naming import Line, Registry

if TYPE_CHECKING:
    from ckdiff.overlaps.nulls.null import Null

#: what is meant where none is asked for
USUAL = ("tensor",)

#: the phrases also end the sentence "... times what chance would give"
NULLS: Registry[Null] = Registry(
    "null",
    {
        "model": Line("ckdiff.overlaps.nulls.model:NULL", "over all elements"),
        "tensor": Line("ckdiff.overlaps.nulls.tensor:NULL", "inside each tensor"),
        "magnitude": Line(
            "ckdiff.overlaps.nulls.magnitude:NULL",
            "inside each tensor and binade of the base's values",
        ),
        "rowcol": Line(
            "ckdiff.overlaps.nulls.rowcol:NULL",
            "with the row and column counts of each matrix",
        ),
    },
)
