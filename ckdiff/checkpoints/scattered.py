"""Rows of tensors that are compared where they lie, though the tensor is in pieces.

The columns of a matrix may be in several files. Where the rows of each are long, whoever compares
them can do it row by row, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.kernels.hashing import UNIT

_Index = tuple[int, ...]


class Rows(NamedTuple):
    """Where the bytes of some spans of a window are; columns have an entry for each row."""

    spans: IntArray  #: which of the window's spans it is of
    begins: IntArray  #: its first byte, counted from the span's
    addresses: IntArray

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows | None:
        """All rows, span by span and in order; None of nothing."""
        if not parts:
            return None
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        return cls(*(column[order] for column in columns))


def steps(shape: _Index, strides: _Index, into: _Index) -> tuple[IntArray, IntArray]:
    """Elements from the first of a box to the first of each of its rows, as strides and ``into``
    count them: a row is what lies one after the other by both.
    """
    source = to = np.zeros(1, np.int64)
    for count, step, into_step in _apart(shape, strides, into):
        each = np.arange(count, dtype=np.int64)
        source = np.add.outer(source, each * step).reshape(-1)
        to = np.add.outer(to, each * into_step).reshape(-1)
    return source, to


def in_units(first: int, shape: _Index, strides: _Index, into: _Index) -> bool:
    """Whether all rows of a box begin with a hashed unit of the tensor; its first element is
    ``first``.

    Rows that cover a tensor end where others begin, so that they are long then.
    """
    box = _apart(shape, strides, into)
    return first % UNIT == 0 and all(step % UNIT == 0 for _, _, step in box)


def _apart(shape: _Index, strides: _Index, into: _Index) -> list[tuple[int, int, int]]:
    """The dimensions of a box without those that make up a row."""
    sides = zip(shape, strides, into, strict=True)
    box = [dimension for dimension in sides if dimension[0] != 1]
    size = 1
    while box and box[-1][1] == box[-1][2] == size:
        size *= box.pop()[0]
    return box
