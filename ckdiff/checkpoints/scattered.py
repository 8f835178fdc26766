"""Rows of tensors that are compared where they lie, though the tensor is in pieces.

The columns of a matrix may be in several files. Where the rows of each are long, whoever compares
them can do it row by row, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.kernels.hashing import UNIT

_Index = tuple[int, ...]
_LIKE = 16  # sets of boxes whose rows are remembered


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


@lru_cache(_LIKE)  # windows of one tensor are cut alike
def in_order(boxes: tuple[tuple[int, _Index, _Index, _Index, int], ...]) -> Sequence[IntArray]:
    """The rows of boxes (first byte of the span, sizes, strides in the source and in the span,
    bytes of an element) as they follow each other in the span: which box has each, the byte of the
    span where it begins, and the bytes from the first of its box, in the source, to its first.
    """
    which, begins, away = [], [], []
    for i, (begin, shape, strides, into, width) in enumerate(boxes):
        source, to = steps(shape, strides, into)
        which.append(np.full(len(to), i, np.int64))
        begins.append(begin + to * width)
        away.append(source * width)
    order = np.argsort(np.concatenate(begins), kind="stable")
    return [np.concatenate(column)[order] for column in (which, begins, away)]


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
