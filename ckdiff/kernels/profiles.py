"""Profiles of the mask of a matrix: its ones by row, by column, by block, and in fours of a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import (
    PROFILE_FIELDS,
    PROFILE_MARGIN,
    PROFILE_STRIP,
    PROFILE_TOTALS,
)
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room

#: bytes that must follow those of the last row that is added
MARGIN = PROFILE_MARGIN
_BAND = 2 * PROFILE_STRIP // 8  # bytes
_MOST_ROWS = (1 << 16) - 1  # that a uint16 counts
_U16 = np.dtype(np.uint16)

Columns = npt.NDArray[np.uint16] | Int64


def memory(width: int) -> int:
    """Bytes that a :class:`Profile` of matrices with so many columns takes."""
    return (-(-width // PROFILE_STRIP) * PROFILE_STRIP) * (8 + 2) + width


class Profile:
    """What was counted of some rows of a matrix, which come in order. For one thread."""

    def __init__(self, width: int) -> None:
        """``width`` is the number of columns, at least 1."""
        strips = -(-width // PROFILE_STRIP)
        self.width = width
        self._columns: Int64 | None = None  # of the rows that are not in ``_recent`` any more
        self._recent: npt.NDArray[np.uint16] = np.zeros(strips * PROFILE_STRIP, np.uint16)
        self._rows = 0  # in ``_recent``
        self._bands = np.zeros(strips * _BAND, np.uint8)
        self._totals = np.zeros(PROFILE_TOTALS, np.int64)

    def clear(self) -> None:
        """Forget all rows; what ``columns`` gave is gone."""
        self._columns, self._rows = None, 0
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
            step = min(len(counts) - done, _MOST_ROWS - self._rows)
            begin = bit + done * width
            walk = np.array([begin, step, width, first + done], np.int64)
            c_function("profile").ctypes(
                place(mask, U8, -(-(begin + step * width) // 8) + MARGIN),
                place(walk, I64, PROFILE_FIELDS), room(counts[done : done + step], I64, step),
                room(self._recent, _U16), room(self._bands, U8), room(self._totals, I64),
            )  # fmt: skip
            done += step
            self._rows += step
            if self._rows == _MOST_ROWS:
                self._flush()

    def columns(self) -> Columns:
        """The ones of each column so far: uint16 where that holds any, or int64. A view."""
        if self._columns is None:
            return self._recent[: self.width]
        self._flush()
        return self._columns[: self.width]

    def finish(self) -> tuple[int, int]:
        """After the last row: how many blocks of 16 x 16, and of 128 x 128, have ones.

        Blocks at the edges count, which are smaller.
        """
        bands = self._bands.reshape(-1, 2, PROFILE_STRIP // 8)
        small = np.ascontiguousarray(bands[:, 0])
        large = bands[:, 1] | small
        more = (
            np.count_nonzero(small.view(np.uint16)),
            np.count_nonzero(large.reshape(-1, 16).any(axis=1)),
        )
        self._bands[:] = 0
        self._totals[:2] += more
        return int(self._totals[0]), int(self._totals[1])

    def fours(self) -> list[int]:
        """Of the fours of a row, from column 0 on, how many have at least 1, 2, 3 and 4 ones."""
        return [int(count) for count in self._totals[2:]]

    def _flush(self) -> None:
        if self._columns is None:
            self._columns = np.zeros(len(self._recent), np.int64)
        self._columns += self._recent
        self._recent[:] = 0
        self._rows = 0
