"""Quantised elements by value: float32(q) times float32(scale), one product, rounded once.

Every NaN that comes out, from an element, a scale, or an infinity times zero, is the same one, the
positive quiet NaN without a payload: what a processor makes of two NaNs is not the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi
from ckdiff.kernels.casting import widen
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room, within

#: dtypes of quantised elements; F4 is E2M1, two to a byte, the low half first
QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "F4")
_GROUP = 32  # rows of F4 that lie turned and share a scale
_F32: np.dtype[Any] = np.dtype(np.float32)

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Scaling:
    """Which scale is whose, in a matrix or a stack of matrices whose blocks have a scale each.

    Blocks begin anew with each matrix, and the last ones of a row and a column may be smaller. The
    scales of a matrix have the shape (ceil(rows / block[0]), ceil(columns / block[1])). A scale for
    a tensor is a block of (rows, columns), one for each row is (1, columns), one for each column
    (rows, 1), and a group of 32 is (1, 32). Raises ValueError where this describes nothing.
    """

    dtype: str  #: of the elements, one of QUANTISED
    scale_dtype: str  #: F32, F8_E8M0, or a float that F32 holds
    rows: int  #: of each matrix
    columns: int  #: elements of a row
    block: tuple[int, int]  #: rows and columns that share a scale
    matrices: int = 1

    def __post_init__(self) -> None:
        scale = DTYPES[self.scale_dtype]
        if self.dtype not in QUANTISED or not (
            scale.name in ("F32", "F8_E8M0") or DTYPES["F32"].holds(scale)
        ):
            raise ValueError(f"{self.dtype} is not scaled by {self.scale_dtype}")
        if min(self.rows, self.columns, *self.block, self.matrices) < 1 or self.elements >> 60:
            raise ValueError("a matrix and its blocks have rows and columns")

    @property
    def elements(self) -> int:
        """How many elements there are in all."""
        return self.matrices * self.rows * self.columns

    @property
    def scales(self) -> int:
        """How many scales there are in all."""
        return self.matrices * -(-self.rows // self.block[0]) * self._across

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """The scales, from one position to another, that the elements [start, stop) take.

        There is a scale for each block, in order; some in between may not be needed. Those of rows
        of blocks are given whole where more than one row of elements takes them.
        """
        if start >= stop:
            return 0, 0
        (top, left), (bottom, right) = (divmod(at, self.columns) for at in (start, stop - 1))
        low, high = self._line(top), self._line(bottom)
        first, last = low + left // self.block[1], high + right // self.block[1] + 1
        if top < bottom and self._line(top + 1) == low:
            first = low
        if top < bottom and self._line(bottom - 1) == high:
            last = high + self._across
        return first, last

    def walk(self, start: int, first: int) -> Int64:
        """What the kernel takes to begin at ``start``, with scales from position ``first`` on."""
        row, column = divmod(start, self.columns)
        row_in_matrix = row % self.rows
        at = self._line(row) - first
        in_block = row_in_matrix % self.block[0], column % self.block[1]
        found = (
            self.columns, self.rows, *self.block, self._across,
            column, row_in_matrix, *in_block, at, at + column // self.block[1],
        )  # fmt: skip
        return np.array(found, np.int64)

    @property
    def _across(self) -> int:
        return -(-self.columns // self.block[1])

    def _line(self, row: int) -> int:
        """The position of the first scale of a row."""
        matrix, row = divmod(row, self.rows)
        down = -(-self.rows // self.block[0])
        return (matrix * down + row // self.block[0]) * self._across


def scale(
    elements: Bytes, scaling: Scaling, start: int, scales: Bytes, first: int, out: Bytes
) -> None:
    """Write the values of elements to ``out``, as float32: as many as it has room for.

    ``elements`` begins with the element at position ``start`` of the flat tensor, which must begin
    a byte, and ``scales`` with the scale at position ``first``: those that ``scaling.needed`` says
    must be in it, which may be all of them. All three are bytes. Scales that are not float32 are
    converted aside, four bytes for each that is needed. Releases the GIL. Raises ValueError where
    something lies outside, and TypeError for arrays of something else.
    """
    count = len(out) // 4
    bits, width = DTYPES[scaling.dtype].bits, DTYPES[scaling.scale_dtype].bits // 8
    within(start, start + count, scaling.elements)
    if start * bits % 8 or len(out) % 4:
        raise ValueError("elements begin with a byte, and four bytes are written for each")
    if not count:
        return
    low, high = scaling.needed(start, start + count)
    within(low - first, high - first, len(scales) // width)
    place(scales, U8)
    factors = _as_float32(scales[(low - first) * width : (high - first) * width], scaling)
    walk, scratch = scaling.walk(start, low), np.zeros(abi.SCALE_SCRATCH, np.uint8)
    c_function("scale", scaling.dtype).ctypes(
        place(elements, U8, -(-count * bits // 8)), room(out, U8, 4 * count), count,
        place(factors, U8, 4 * (high - low)), place(walk, I64, abi.WALK_FIELDS),
        room(scratch, U8),
    )  # fmt: skip


def scale_halves(
    pairs: Bytes, factors: Float32, at: tuple[int, int], shape: tuple[int, int], out: Bytes,
    step: int,
) -> None:  # fmt: skip
    """Write the values of F4 that lie turned to ``out``, as float32 in rows ``step`` bytes apart.

    ``pairs`` is (rows / 2, columns): a row of bytes is two rows of F4, the low halves first.
    ``factors`` is (groups, columns), the scales of each 32 rows. Of them a box of that ``shape``,
    (rows, columns), is taken that begins ``at`` a row and a column; both have as many columns that
    it may be read in whole words of 64. Releases the GIL. Raises ValueError where something lies
    outside, and TypeError for arrays of something else.
    """
    (row, column), (rows, columns) = at, shape
    if not rows or not columns:
        return
    wide = pairs.shape[1]
    if factors.shape[1] != wide or step < 4 * columns:
        raise ValueError("rows of pairs, of scales or of values do not fit each other")
    within(min(column, columns), column + -(-columns // abi.LANES) * abi.LANES, wide)
    within(min(row, rows), row + rows, min(2 * len(pairs), _GROUP * len(factors)))
    scratch = np.empty(4 * abi.LANES, np.uint8)
    c_function("halves").ctypes(
        place(pairs, U8) + column, wide, place(factors, _F32) + 4 * column, 4 * wide, _GROUP,
        room(out, U8, (rows - 1) * step + 4 * columns), step, row, rows, columns,
        room(scratch, U8),
    )  # fmt: skip


def powers_of_two(scales: Bytes) -> Float32:
    """The float32 of each E8M0, in the same shape."""
    return np.take(_powers().view(np.float32).reshape(-1), scales)


def _as_float32(scales: Bytes, scaling: Scaling) -> Bytes:
    """The bytes of scales as float32: those that were given, or others."""
    if scaling.scale_dtype == "F32":
        return scales
    if scaling.scale_dtype == "F8_E8M0":
        return _powers()[scales].reshape(-1)
    found = np.empty(4 * len(scales) * 8 // DTYPES[scaling.scale_dtype].bits, np.uint8)
    widen(scales, scaling.scale_dtype, "F32", found)
    return found


@cache
def _powers() -> Bytes:
    """The float32 of each E8M0, four bytes each: 2**(e - 127), the lowest subnormal; 255 is NaN."""
    bits = np.arange(256, dtype=np.uint32) << 23
    bits[0], bits[255] = 1 << 22, 0x7FC00000
    return bits.view(np.uint8).reshape(256, 4)
