"""Tensors that are cut across their rows: where the rows of each part lie, in a few numbers.

Each of several files has some columns of a matrix, row by row. Whoever compares such parts where
they lie needs no address for each row: rows that are equally far apart, here and in the tensor, are
a *grid*. Parts whose rows begin elsewhere than hashed units do are gathered instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from ckdiff.checkpoints.copying import Request
from ckdiff.checkpoints.pieces import Piece, packed_strides
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.checkpoints.scattered import Rows
from ckdiff.kernels.hashing import UNIT

_Index = tuple[int, ...]
_MOST = 256  # strips of a tensor: each of one side is held against each of the other

#: columns of a grid, int64: which of a window's spans it is of; the tensor's element with which its
#: first row begins, and elements from there to the next row's; rows, and elements of each; the
#: address of the first, and bytes from there to the next
SPAN, FIRST, STEP, ROWS, ELEMENTS, ADDRESS, PITCH = range(7)
NO_GRIDS: IntArray = np.empty((0, 7), np.int64)


class _Strip(NamedTuple):
    """A part of a tensor that is seen as a matrix whose rows are long."""

    source: int
    begin: int  #: byte of the source at which its first element is
    pitch: int  #: elements in the source from one row to the next
    top: int  #: the first row
    bottom: int  #: the row after the last
    left: int  #: the first column
    right: int  #: the column after the last


@dataclass(frozen=True, slots=True)
class Strips:
    """Such a matrix."""

    row: int  #: elements of a row
    width: int  #: bytes of an element
    strips: list[_Strip]

    @classmethod
    def of(cls, shape: _Index, pieces: Sequence[Piece], width: int) -> Strips | None:
        """That of a tensor which is cut so that all rows of its parts begin with hashed units."""
        pieces = [piece for piece in pieces if prod(piece.shape)]
        cuts = (i for p in pieces for i, n in enumerate(shape) if n != p.shape[i])
        cut = max(cuts, default=0)
        inner = prod(shape[cut + 1 :])
        if not cut or shape[cut] * inner % UNIT:
            return None
        found = list[_Strip]()
        for piece in pieces:
            left, right = (n * inner for n in (piece.at[cut], piece.at[cut] + piece.shape[cut]))
            if left % UNIT or not _packed(piece, cut):
                return None
            for away, pitch, top, count in _evenly(shape[:cut], piece):
                begin = piece.begin + away * width
                strip = _Strip(piece.source, begin, pitch, top, top + count, left, right)
                found.append(strip)
                if len(found) > _MOST:
                    return None
        return cls(shape[cut] * inner, width, found)

    def between(self, first: int, stop: int) -> tuple[IntArray, list[Request], int]:
        """The elements [first, stop) in grids, of span 0 and without addresses; what has to be
        acquired for each, which begins with the grid's first row; and the bytes of that between
        rows.
        """
        grids, requests, idle = list[_Index](), list[Request](), 0
        width = self.width
        for high, low, begin, end in _bands(first, stop, self.row):
            for strip in self.strips:
                top, left = max(strip.top, high), max(strip.left, begin)
                rows, size = min(strip.bottom, low) - top, min(strip.right, end) - left
                if rows <= 0 or size <= 0:
                    continue
                away = (top - strip.top) * strip.pitch + left - strip.left
                reach = (rows - 1) * strip.pitch + size
                requests.append((strip.source, strip.begin + away * width, reach * width))
                idle += max(reach - rows * size, 0) * width
                at = top * self.row + left
                grids.append((0, at, self.row, rows, size, 0, strip.pitch * width))
        return np.array(grids, np.int64).reshape(-1, NO_GRIDS.shape[1]), requests, idle


def rows_of(grids: IntArray, starts: IntArray, bits: IntArray) -> Rows:
    """Grids row by row; of each span of the window its first element, and bits of one."""
    counts = grids[:, ROWS]
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    spans, first, step, _, _, address, pitch = np.repeat(grids, counts, axis=0).T
    begins = (first + nth * step - starts[spans]) * bits[spans] // 8
    order = np.lexsort((begins, spans))
    return Rows(spans[order], begins[order], (address + nth * pitch)[order])


def _bands(first: int, stop: int, row: int) -> Iterator[tuple[int, int, int, int]]:
    """The elements [first, stop) of a matrix: (first row, row after the last, first column, column
    after the last).
    """
    top, left = divmod(first, row)
    last, rest = divmod(stop, row)
    if left and top < last:
        yield top, top + 1, left, row
        top, left = top + 1, 0
    if top < last:
        yield top, last, 0, row
    if rest > left:
        yield last, last + 1, left, rest


def _packed(piece: Piece, cut: int) -> bool:
    """Whether what a piece has of a row, which are the dimensions from ``cut`` on, is one run."""
    inner = piece.shape[cut:]
    steps = zip(inner, piece.strides[cut:], packed_strides(inner), strict=True)
    return all(size == 1 or step == wanted for size, step, wanted in steps)


def _evenly(outer: _Index, piece: Piece) -> Iterator[tuple[int, int, int, int]]:
    """The rows of a piece, by the outer dimensions of its tensor, in lots that are equally far
    apart: (elements from the piece's first, elements from one row to the next, first row, rows).
    """
    steps = packed_strides(outer)
    count = pitch = 1
    whole, rest = True, len(outer)
    while rest and whole:
        size, step = piece.shape[rest - 1], piece.strides[rest - 1]
        if size > 1:
            if count > 1 and step != count * pitch:
                break
            pitch = pitch if count > 1 else step
            count *= size
        whole = size == outer[rest - 1]
        rest -= 1
    top = sum(a * s for a, s in zip(piece.at, steps, strict=False))
    for index in product(*map(range, piece.shape[:rest])):
        away = sum(i * s for i, s in zip(index, piece.strides, strict=False))
        yield away, pitch, top + sum(i * s for i, s in zip(index, steps, strict=False)), count
