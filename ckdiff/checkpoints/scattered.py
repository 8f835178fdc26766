"""Rows of tensors that are compared where they lie, though the tensor is in pieces.

The columns of a matrix may be in several files. Where the rows of each are long, whoever compares
them can do it row by row, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ckdiff.checkpoints.protocol import IntArray


class Rows(NamedTuple):
    """Where the bytes of some spans of a window are; columns have an entry for each row."""

    spans: IntArray  #: which of the window's spans it is of
    begins: IntArray  #: its first byte, counted from the span's
    addresses: IntArray

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows | None:
        """All rows of several spans, given in order; None of nothing."""
        if len(parts) < 2:
            return parts[0] if parts else None
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))
