"""Profiles of the mask of a matrix: its ones by row, by column, by block, and in fours of a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import (
    PROFILE_BAND,
    PROFILE_DIGITS,
    PROFILE_FIELDS,
    PROFILE_MARGIN,
    PROFILE_STRIP,
    PROFILE_TOTALS,
)
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room

#: bytes that must follow those of the last row that is added
MARGIN = PROFILE_MARGIN
_HELD = (1 << PROFILE_DIGITS) - 1  # rows that the digits hold
MOST_ROWS = (1 << 16) - 1  #: that a uint16 counts
_U16 = np.dtype(np.uint16)

Columns = npt.NDArray[np.uint16] | Int64


def counter(rows: int) -> int:
    """Bytes of each count of a column, where a matrix has so many rows."""
    return 2 if rows < MOST_ROWS else 8


def memory(width: int, rows: int) -> int:
    """Bytes that a :class:`Profile` of a matrix with so many columns and rows takes."""
    counts = 2 if rows < MOST_ROWS else 2 + 8
    return -(-width // PROFILE_STRIP) * (PROFILE_STRIP * counts + PROFILE_BAND)


class Profile:
    """What was counted of some rows of a matrix, which come in order. For one thread."""

    def __init__(self, width: int) -> None:
        """``width`` is the number of columns, at least 1."""
        strips = -(-width // PROFILE_STRIP)
        self.width = width
        self._columns: Int64 | None = None  # of the rows that are not in ``_recent`` any more
        self._recent: npt.NDArray[np.uint16] = np.zeros(strips * PROFILE_STRIP, np.uint16)
        self._rows = 0  # in ``_recent``, and in the digits
        self._held = 0  # in the digits
        self._bands = np.zeros(strips * PROFILE_BAND, np.uint8)
        self._totals = np.zeros(PROFILE_TOTALS, np.int64)

    def clear(self) -> None:
        """Forget all rows; what ``columns`` gave is gone."""
        self._columns, self._rows, self._held = None, 0, 0
        for counts in (self._recent, self._bands, self._totals):
            counts.fill(0)

    def add(self, mask: Bytes, bit: int, first: int, counts: Int64) -> None:
        """Add as many rows as ``counts`` has, which their ones are added to (int64).

        The first one begins at ``bit`` of ``mask`` and is row ``first`` of the matrix; rows that
        are not added after each other must have a multiple of 128 between them. MARGIN bytes of
        ``mask`` after the last one's must be there to be read.
        """
        done, width = 0, self.width
        while done < len(counts):
            step = min(len(counts) - done, MOST_ROWS - self._rows)
            self._call(mask, bit + done * width, first + done, counts[done : done + step])
            done += step
            self._rows += step
            if self._rows == MOST_ROWS:
                self._flush()

    def columns(self) -> Columns:
        """The ones of each column so far: uint16 where that holds any, or int64. A view."""
        if self._columns is None:
            self._settle()
            return self._recent[: self.width]
        self._flush()
        return self._columns[: self.width]

    def finish(self) -> tuple[int, int]:
        """After the last row: how many blocks of 16 x 16, and of 128 x 128, have ones.

        Blocks at the edges count, which are smaller.
        """
        bands = self._block_rows()
        small = np.ascontiguousarray(bands[:, 0])
        more = np.count_nonzero(small.view(np.uint16)), np.count_nonzero(self.begun())
        bands[:] = 0
        self._totals[:2] += more
        return int(self._totals[0]), int(self._totals[1])

    def begun(self) -> npt.NDArray[np.bool_]:
        """Before ``finish``: which blocks of 128 x 128 have ones, in a row of them that has begun
        and is not whole yet.
        """
        bands = self._block_rows()
        words = (bands[:, 0] | bands[:, 1]).view(np.uint64).reshape(-1, 2)
        found: npt.NDArray[np.bool_] = (words[:, 0] | words[:, 1]) != 0
        return found

    def fours(self) -> list[int]:
        """Of the fours of a row, from column 0 on, how many have at least 1, 2, 3 and 4 ones."""
        return [int(count) for count in self._totals[2:]]

    def _block_rows(self) -> Bytes:
        """(strips, 2, bytes): bits of the block rows that are not whole yet; a view."""
        return self._bands.reshape(-1, 2 + PROFILE_DIGITS, PROFILE_STRIP // 8)[:, :2]

    def _call(self, mask: Bytes, bit: int, first: int, counts: Int64) -> None:
        rows, width = len(counts), self.width
        walk = np.array([bit, rows, width, first, self._held], np.int64)
        c_function("profile").ctypes(
            place(mask, U8, -(-(bit + rows * width) // 8) + MARGIN),
            place(walk, I64, PROFILE_FIELDS), room(counts, I64, rows), room(self._recent, _U16),
            room(self._bands, U8), room(self._totals, I64),
        )  # fmt: skip
        self._held = (self._held + rows) % _HELD if rows else 0

    def _settle(self) -> None:
        """Have the counts of all rows in ``_recent``."""
        if self._held:
            self._call(np.zeros(MARGIN, np.uint8), 0, 0, np.zeros(0, np.int64))

    def _flush(self) -> None:
        self._settle()
        if self._columns is None:
            self._columns = np.zeros(len(self._recent), np.int64)
        self._columns += self._recent
        self._recent[:] = 0
        self._rows = 0
