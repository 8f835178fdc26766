"""Kernels: addresses of both sides in; packed mask words, counts, hash sums and statistics out.

Knows no files and no stores. :class:`Kernels` holds the compiled code for a set of dtypes and
rules; :meth:`Kernels.run` compares the segments of one window with the GIL released.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DType
from ckdiff.kernels import abi, hashing, statistics
from ckdiff.kernels.binding import bind
from ckdiff.kernels.compiled import c_function
from ckdiff.rules import Rule

__all__ = ["BLOCK", "HASH_COLUMNS", "Comparing", "Kernels", "Results"]

BLOCK = abi.BLOCK
HASH_COLUMNS = 4  #: base low, base high, tuned low, tuned high

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


class Results:
    """What a chunk's tensors add up to, one row a tensor; windows of the chunk add to it."""

    def __init__(self, rows: int, rules: int, *, with_statistics: bool) -> None:
        self.changed: Int64 = np.zeros((rows, rules), np.int64)
        self.hashes: UInt64 = np.zeros((rows, HASH_COLUMNS), np.uint64)
        #: columns as in :mod:`ckdiff.kernels.statistics`; counts are int64 in the same bytes
        self.statistics: npt.NDArray[np.float64] | None = (
            np.zeros((rows, statistics.COLUMNS), np.float64) if with_statistics else None
        )


class Comparing(Protocol):
    """What compares windows: :class:`Kernels`, or the same on a device."""

    slot_of: dict[str, int]  #: dtype name -> what SEG_SLOT is for its tensors

    def run(self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """See :meth:`Kernels.run`."""


class Kernels:
    """Compiled kernels for some dtypes and rules; immutable, shared by all workers."""

    def __init__(
        self, dtypes: Sequence[DType], rules: Sequence[Rule], *, with_statistics: bool = False
    ) -> None:
        self._rules = len(rules)
        self._columns = abi.SLOT_RULES + 2 * len(rules)
        slots: Int64 = np.zeros((len(dtypes), self._columns), np.int64)
        self.slot_of = {dtype.name: i for i, dtype in enumerate(dtypes)}
        for i, dtype in enumerate(dtypes):
            slots[i, abi.SLOT_BITS] = dtype.bits
            if with_statistics and dtype.numeric:
                slots[i, abi.SLOT_STATISTICS] = c_function("statistics", dtype.name).address
            for r, rule in enumerate(rules):
                kind, parameter = bind(rule, dtype)
                at = abi.SLOT_RULES + 2 * r
                slots[i, at] = c_function("compare", kind).address
                slots[i, at + 1] = np.uint64(parameter).view(np.int64)
        self._slots = slots
        self._drive = c_function("drive").ctypes
        self._xxh3 = hashing.xxh3_128_address()

    def run(self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """Compare the segments of one window.

        ``segments`` is C-contiguous, (n, SEG_COLUMNS) int64 as in :mod:`ckdiff.kernels.abi`.
        ``masks`` holds one zeroed uint8 buffer per rule, into which a segment's bits go at byte
        SEG_POSITION / 8. Counts, hash sums and statistics are added to ``into``.
        """
        self._run(self._rules, segments, masks, into)

    def measure(self, segments: Int64, exact: npt.NDArray[np.uint8], into: Results) -> None:
        """Add hash sums and statistics of segments that were compared elsewhere.

        ``exact`` holds the bits of the rule ``exact``, as ``run`` puts them there.
        """
        self._run(0, segments, [exact], into)

    def _run(
        self,
        rules: int,
        segments: Int64,
        masks: Sequence[npt.NDArray[np.uint8]],
        into: Results,
    ) -> None:
        assert segments.dtype == np.int64
        assert segments.flags.c_contiguous
        addresses = np.array([mask.ctypes.data for mask in masks] or [0], np.int64)
        scratch = np.zeros(abi.SCRATCH_BYTES, np.uint8)
        rows = into.statistics
        self._drive(
            segments.ctypes.data,
            len(segments),
            self._slots.ctypes.data,
            self._columns,
            rules,
            addresses.ctypes.data,
            into.changed.ctypes.data,
            into.hashes.ctypes.data if self._xxh3 else 0,
            self._xxh3,
            0 if rows is None else rows.ctypes.data,
            scratch.ctypes.data,
        )
        if not self._xxh3:
            self._hash_slowly(segments, into)

    def _hash_slowly(self, segments: Int64, into: Results) -> None:
        for segment in segments:
            bits = int(self._slots[segment[abi.SEG_SLOT], abi.SLOT_BITS])
            size = int(segment[abi.SEG_ELEMENTS]) * bits // 8
            row = into.hashes[segment[abi.SEG_ROW]]
            for side, column in enumerate((abi.SEG_BASE, abi.SEG_TUNED)):
                address, unit = int(segment[column]), int(segment[abi.SEG_UNIT])
                sums = hashing.add_units_at(address, size, unit, bits)
                row[2 * side : 2 * side + 2] += np.array(sums, np.uint64)
