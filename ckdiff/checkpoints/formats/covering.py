"""Tensors in pieces: whether the pieces are all of a tensor, and the columns of what was found.

What pieces a file speaks of may be hostile: that they cover the tensor once is found out from their
numbers alone, in time and memory that grow with how many pieces there are and not with their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from ckdiff.checkpoints.formats.pickledvalues import shown
from ckdiff.checkpoints.pieces import Contents, Piece
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError

#: elements, and elements with a size of zero counted as one: numbers and their sums stay in 63 bits
FURTHEST = 1 << 60
_MOST_PAIRS = 1 << 27  # of pieces that are held against each other
_HINT = "copy the files of the whole run, or save it again"

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  #: index of the first element, sizes


def is_shape(numbers: object) -> TypeGuard[Shape]:
    """Whether something that a file holds is the shape of a tensor that anybody could have."""
    return (
        type(numbers) is tuple
        and len(numbers) <= 64
        and all(type(n) is int and 0 <= n < FURTHEST for n in numbers)
        and math.prod(max(n, 1) for n in numbers) < FURTHEST >> 4
    )


class Joining:
    """Takes tensors with their pieces, holds them against each other, and makes the columns."""

    def __init__(self, where: str, first: int) -> None:
        """``where`` is how messages name the checkpoint, ``first`` the place of its first file."""
        self.where = where
        self._first = first
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[Shape] = []
        self._nbytes: list[int] = []
        self._files: list[int] = []
        self._offsets: list[int] = []
        self._pieces: dict[int, tuple[Piece, ...]] = {}

    def add(self, name: str, dtype: str, shape: Shape, pieces: Sequence[Piece]) -> None:
        """A tensor. Pieces without elements do not count. Raises CheckpointError where the pieces
        are not all of it, or two hold the same element.
        """
        there = sorted((p for p in pieces if math.prod(p.shape)), key=lambda piece: piece.at)
        fault = cover_fault(shape, [(piece.at, piece.shape) for piece in there])
        if fault is not None:
            raise CheckpointError(
                f"{self.where}: tensor {shown(name)} of shape {list(shape)}: {fault}", hint=_HINT
            )
        file, offset = self._first, 0
        if len(there) == 1 and there[0].packed:
            file, offset = there[0].source, there[0].begin
        elif there:
            self._pieces[len(self._names)] = tuple(there)
            file = offset = -1
        self._names.append(name)
        self._dtypes.append(dtype)
        self._shapes.append(shape)
        self._nbytes.append(math.prod(shape) * DTYPES[dtype].bits // 8)
        self._files.append(file)
        self._offsets.append(offset)

    def finish(self, notes: list[str], absent: Sequence[str] = ()) -> Contents:
        """The columns of all tensors; ``absent`` cannot be compared."""
        return Contents(
            TensorTable(
                self._names,
                self._dtypes,
                self._shapes,
                np.array(self._nbytes, np.int64),
                list(absent),
            ),
            np.array(self._files, np.int32),
            np.array(self._offsets, np.int64),
            pieces=self._pieces,
            notes=notes,
        )  # fmt: skip


def cover_fault(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Why boxes, none of them empty, are not all of a tensor exactly once; None where they are."""
    for at, extent in boxes:
        if not len(at) == len(extent) == len(shape):
            return f"a piece of it has {len(extent)} dimensions"
        if any(a < 0 or a + n > size for a, n, size in zip(at, extent, shape, strict=True)):
            return f"a piece of {list(extent)} at {list(at)} goes beyond it"
    held, wanted = sum(math.prod(extent) for _, extent in boxes), math.prod(shape)
    if held < wanted:
        return f"its {len(boxes):,} pieces hold {held:,} of {wanted:,} elements: some are missing"
    if len(boxes) > 1:
        lows = np.array([at for at, _ in boxes], np.int64)
        sizes = np.array([extent for _, extent in boxes], np.int64)
        pair = _overlap(lows, lows + sizes)
        if pair is not None:
            if min(pair) < 0:
                return f"its {len(boxes):,} pieces lie in a way that is not read"
            one, other = (list(boxes[i][0]) for i in pair)
            return f"its pieces at {one} and {other} overlap"
    return None


def _overlap(lows: IntArray, highs: IntArray) -> tuple[int, int] | None:
    """Two boxes that have an element in common, or None; (-1, -1) where it takes too long to say.

    Along the dimension with the most cuts each box is held only against those that begin before it
    ends: neighbours, where boxes are a tiling.
    """
    if lows.shape[1] == 0:
        return 0, 1  # two boxes of a single element
    cuts = [len(set(column.tolist())) for column in lows.T]  # numpy imports much for unique()
    axis = int(np.argmax(cuts))
    order = np.argsort(lows[:, axis], kind="stable")
    lows, highs = lows[order], highs[order]
    ends = np.searchsorted(lows[:, axis], highs[:, axis], "left")
    left = ends - np.arange(len(lows)) - 1  # how many of those that follow may share something
    if int(left.sum()) > _MOST_PAIRS:
        return -1, -1
    one = np.flatnonzero(left > 0)
    step = 1
    while len(one):
        other = one + step
        shared = ((lows[one] < highs[other]) & (lows[other] < highs[one])).all(axis=1)
        if shared.any():
            at = int(np.argmax(shared))
            return int(order[one[at]]), int(order[other[at]])
        step += 1
        one = one[left[one] >= step]
    return None
