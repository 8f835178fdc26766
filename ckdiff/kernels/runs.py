"""What differs between two windows, as the sequences of which a zstd encoder makes blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import LEAST_ZEROS, RUNS_COLUMNS, RUNS_MARGIN, SEQUENCE_BYTES
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, U32, Bytes, Int64, place, room

WIDTHS = (1, 2, 4, 8)  #: bytes of the elements that are counted

_FIELDS = SEQUENCE_BYTES // 4  # of a sequence: offset, literals, match, and one that is not used

Sequences = npt.NDArray[np.uint32]


class Runs(NamedTuple):
    """The exclusive or of two windows. It lies in the buffers of whoever found it, where a few
    more literals may be read.
    """

    literals: Bytes
    sequences: Sequences  #: (n, 4): offset (1, or 0 where a block ends), literals, match, 0
    #: (blocks, 4): literals, sequences, elements and bytes that differ, up to the block's end
    ends: Int64

    @property
    def elements(self) -> int:
        """Elements that differ."""
        return int(self.ends[-1, 2]) if len(self.ends) else 0

    @property
    def changed(self) -> int:
        """Bytes that differ."""
        return int(self.ends[-1, 3]) if len(self.ends) else 0

    def of_blocks(self, first: int, stop: int) -> Runs:
        """Those of some of the blocks."""
        before = self.ends[first - 1] if first else np.zeros(RUNS_COLUMNS, np.int64)
        ends = self.ends[first:stop]
        literals = self.literals[int(before[0]) : int(ends[-1, 0])]
        return Runs(literals, self.sequences[int(before[1]) : int(ends[-1, 1])], ends - before)


class RunFinder:
    """Buffers for windows of at most ``window`` bytes in blocks of ``block``; for one thread."""

    def __init__(self, window: int, block: int) -> None:
        self._window, self._block = window, block
        blocks = -(-window // block)
        self._literals = np.empty(window + RUNS_MARGIN, np.uint8)
        # each match has four bytes at least; each block one sequence more that ends it
        self._sequences = np.empty((window // LEAST_ZEROS + blocks, _FIELDS), np.uint32)
        self._ends = np.zeros((blocks, RUNS_COLUMNS), np.int64)

    def find(self, base: Bytes, tuned: Bytes, width: int) -> Runs:
        """What differs; elements of ``width`` bytes are counted.

        Raises ValueError for windows of two sizes, or too large ones.
        """
        if len(base) != len(tuned) or len(base) > self._window or width not in WIDTHS:
            raise ValueError("two windows of one size, no larger than the buffers, are compared")
        c_function("runs", str(width)).ctypes(
            place(base, U8), place(tuned, U8), len(base), self._block,
            room(self._literals, U8, len(base) + RUNS_MARGIN), room(self._sequences, U32),
            room(self._ends, I64),
        )  # fmt: skip
        ends = self._ends[: -(-len(base) // self._block)].copy()
        ends[:, 1] //= SEQUENCE_BYTES
        literals, sequences = ends[-1, :2].tolist() if len(ends) else (0, 0)
        return Runs(self._literals[:literals], self._sequences[:sequences], ends)
