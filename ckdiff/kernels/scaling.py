"""Quantised elements by value: float32(q) times float32(scale), one product, rounded once.

Every NaN that comes out, from an element, a scale, or an infinity times zero, is the same one, the
positive quiet NaN without a payload: what a processor makes of two NaNs is not the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi
from ckdiff.kernels.compiled import Function, c_function
from ckdiff.kernels.memory import F32, I64, U8, Bytes, Float32, Int64, place, room, within

#: dtypes of quantised elements; F4 is E2M1, two to a byte, the low half first
QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "F4")
_GROUP = 32  # F4 that share a scale
_NOWHERE = np.empty(0, np.uint8)
_ENDLESS = 1 << 60  # columns


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
        if self.dtype not in QUANTISED or self.scale_dtype not in abi.SCALE_DTYPES:
            raise ValueError(f"{self.dtype} is not scaled by {self.scale_dtype}")
        if min(self.rows, self.columns, *self.block, self.matrices) < 1 or self.elements >> 60:
            raise ValueError("a matrix and its blocks have rows and columns")
        if self.dtype == "F4" and (
            self.columns % 2 or (self.block[1] % 2 and 1 < self.block[1] < self.columns)
        ):
            raise ValueError("rows of F4, and of its blocks, have whole bytes")

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

    def walk(self, start: int, first: int) -> tuple[int, ...]:
        """The part of a recipe that begins at ``start``, with scales from position ``first`` on."""
        row, column = divmod(start, self.columns)
        row_in_matrix = row % self.rows
        at = self._line(row) - first
        in_block = row_in_matrix % self.block[0], column % self.block[1]
        return (
            self.columns, self.rows, *self.block, self._across,
            column, row_in_matrix, *in_block, at, at + column // self.block[1],
        )  # fmt: skip

    @property
    def even(self) -> bool:
        """Whether it is F4 in groups that go on from row to row, whole ones, with E8M0."""
        of = self.dtype, self.scale_dtype, self.block, self.columns % _GROUP
        return of == ("F4", "F8_E8M0", (1, _GROUP), 0)

    @property
    def _across(self) -> int:
        return -(-self.columns // self.block[1])

    def _line(self, row: int) -> int:
        """The position of the first scale of a row."""
        matrix, row = divmod(row, self.rows)
        down = -(-self.rows // self.block[0])
        return (matrix * down + row // self.block[0]) * self._across


class Recipe(NamedTuple):
    """How some values are made, in order: arrays that must stay until they are."""

    kernel: Function
    units: Function | None  #: what compares both sides of whole units, if there is one
    values: int  #: how many
    row: tuple[int, ...]  #: where elements and scales are, and the walk over them

    def make(self, out: Bytes) -> None:
        """Write all values to ``out``, as float32. Releases the GIL. ValueError: no room."""
        written = room(out, U8, 4 * self.values)
        self.kernel.ctypes(place(table([self], _NOWHERE), I64), written, self.values)


def table(recipes: Sequence[Recipe], into: Bytes) -> Int64:
    """What the driver takes: each span's recipes lie one behind the other.

    ``into`` is where it has the values of a block written: ``4 * abi.BLOCK`` bytes, which should
    begin where a line of the cache does. The table is good for one walk.
    """
    to = room(into, U8)
    rows = [
        (kernel.address, 0 if units is None else units.address, values, to, 0, *row)
        for kernel, units, values, row in recipes
    ]
    return np.array(rows, np.int64).reshape(-1, abi.RECIPE_FIELDS)


def scaled(
    elements: Bytes, scaling: Scaling, start: int, count: int, scales: Bytes, first: int
) -> Recipe:
    """Values of elements and the scales of their blocks.

    ``elements`` begins with the element at position ``start`` of the flat tensor, which must begin
    a byte, and ``scales`` with the scale at position ``first``: those that ``scaling.needed`` says
    must be in it, which may be all of them. Both are bytes. Raises ValueError where something lies
    outside, and TypeError for arrays of something else.
    """
    bits, width = DTYPES[scaling.dtype].bits, DTYPES[scaling.scale_dtype].bits // 8
    within(start, start + count, scaling.elements)
    if start * bits % 8:
        raise ValueError("elements begin with a byte")
    low, high = scaling.needed(start, start + count)
    within(low - first, high - first, len(scales) // width)
    places = place(elements, U8, -(-count * bits // 8)), place(scales, U8)
    walk, units = scaling.walk(start, first), None
    if scaling.even and start % _GROUP == 0:
        # one row of groups, however long
        walk, units = (_ENDLESS, 1, 1, _GROUP, 0, *[0] * 5, walk[-1]), c_function("units", "groups")
    row = *places, abi.SCALE_DTYPES.index(scaling.scale_dtype), width, *walk
    return Recipe(c_function("scale", scaling.dtype), units, count, row)


def powers_of_two(exponents: Bytes, out: Float32) -> None:
    """Write F8_E8M0 as numbers: 2**(e - 127), and the one NaN for 255. As many as there are."""
    bits = out.view(np.uint32)
    np.left_shift(exponents, 23, out=bits, dtype=np.uint32)  # widened some at a time, in one pass
    if len(bits) and not 0 < exponents.min() <= exponents.max() < 255:
        bits[exponents + np.uint8(1) <= 1] |= 1 << 22  # 0 is subnormal, 255 would be an infinity


def turned(pairs: Bytes, powers: Float32, at: tuple[int, int], columns: int, values: int) -> Recipe:
    """Values of F4 that lie turned: rows of ``columns`` bytes are two rows of values, the low
    halves first, and each 32 rows of values have a row of powers of two.

    The first value is that of a row and a column; ``pairs`` begins with the row of bytes that it is
    in, and ``powers`` with its row of scales. Of both ``abi.LANES`` items more may be read. Raises
    ValueError where something lies outside, and TypeError for arrays of something else.
    """
    row, column = at
    if min(row, column, columns - column - 1, values - 1) < 0:
        raise ValueError("rows have columns, and recipes values")
    last = row + (column + values - 1) // columns
    places = [
        place(data, dtype, columns * (last // rows - row // rows + 1) + abi.LANES)
        for data, dtype, rows in ((pairs, U8, 2), (powers, F32, _GROUP))
    ]
    row %= _GROUP
    places[0] -= row // 2 * columns  # where the rows of its group would begin
    walk = columns, *[0] * 4, column, row, *[0] * 4
    units = c_function("units", "halves")
    return Recipe(c_function("halves"), units, values, (*places, 0, 0, *walk))


def scale(
    elements: Bytes, scaling: Scaling, start: int, scales: Bytes, first: int, out: Bytes
) -> None:
    """Write the values that :func:`scaled` describes to ``out``: as many as it has room for."""
    if len(out) % 4:
        raise ValueError("four bytes are written for each value")
    scaled(elements, scaling, start, len(out) // 4, scales, first).make(out)
