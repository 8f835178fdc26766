"""Kernels: windows of both sides in; packed mask words, counts, hash sums and statistics out.

Knows no files and no stores. :class:`Kernels` holds the compiled code for a set of dtypes and
rules; :meth:`Kernels.run` compares the segments of one window with the GIL released.

How kernels are called. Machine code takes addresses and believes them, so nobody outside of this
package gives it any: each kernel is a function, here or in the modules beside, that takes numpy
arrays, holds dtype, size and contiguity of each against what the code will touch, and raises
TypeError or ValueError (:mod:`~ckdiff.kernels.memory`). Where many spans are walked in one call
their table has, in place of addresses, positions in an array that is given with it. What readers of
checkpoints and torch give are addresses: :func:`~ckdiff.kernels.memory.views` makes arrays of them
where they arrive. There is one exception, for the sake of tensors by the thousand in a window: the
columns SEG_BASE and SEG_TUNED of what :meth:`Kernels.run` walks are what a reader gave: addresses
of elements or, negative, of the first of its recipes for a segment (:mod:`ckdiff.kernels.scaling`,
:mod:`ckdiff.kernels.casting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DType
from ckdiff.kernels import abi, hashing, panels, statistics
from ckdiff.kernels.binding import bind
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import (
    F64,
    I64,
    U8,
    U64,
    Bytes,
    Int64,
    UInt64,
    bytes_at,
    place,
    room,
    within,
)
from ckdiff.rules import Rule

__all__ = ["BLOCK", "HASH_COLUMNS", "Comparing", "Kernels", "Results"]

BLOCK = abi.BLOCK
#: what compares and hashes whole units, by what would compare them by the first rule
_UNITS = {"W8:exact": "1", "W16:exact": "2", "W32:exact": ""}
HASH_COLUMNS = 4  #: base low, base high, tuned low, tuned high


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

    def run(self, segments: Int64, masks: Sequence[Bytes], into: Results) -> None:
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
                if r == 0 and kind in _UNITS:
                    slots[i, abi.SLOT_UNITS] = c_function("units", _UNITS[kind]).address
        self._slots = slots
        self._driver = c_function("drive")
        self._drive = self._driver.ctypes
        self._xxh3 = hashing.xxh3_128_address()

    @property
    def makes(self) -> bool:
        """Whether segments may have recipes: else bytes are hashed where they lie."""
        return bool(self._xxh3)

    def run(self, segments: Int64, masks: Sequence[Bytes], into: Results) -> None:
        """Compare the segments of one window.

        ``segments`` is C-contiguous, (n, SEG_COLUMNS) int64 as in :mod:`ckdiff.kernels.abi`.
        ``masks`` holds one zeroed uint8 buffer per rule, into which a segment's bits go at byte
        SEG_POSITION / 8. Counts, hash sums and statistics are added to ``into``.
        """
        self._run(self._rules, segments, masks, into)

    def run_panels(
        self,
        segments: Int64,
        masks: Sequence[Bytes],
        into: Results,
        wanted: Sequence[panels.Panel],
    ) -> None:
        """The same where some of the bytes are copied before: panel by panel, in the order given,
        which have each segment once. What a copy is written to may be that of another. Only where
        it ``makes``.
        """
        if not self._xxh3:
            raise ValueError("what is copied is gone before it is hashed")
        self._run(self._rules, segments, masks, into, wanted)

    def measure(self, segments: Int64, exact: Bytes, into: Results) -> None:
        """Add hash sums and statistics of segments that were compared elsewhere.

        ``exact`` holds the bits of the rule ``exact``, as ``run`` puts them there.
        """
        self._run(0, segments, [exact], into)

    def count(self, segments: Int64, mask: Bytes, changed: Int64) -> None:
        """Add up the changed elements of segments, and hash nothing.

        ``mask`` is room for the bits of each rule, which are not wanted: segments may share it.
        ``changed`` is C-contiguous, (rows, rules), added to.
        """
        rows, rules = changed.shape
        if rules != self._rules:
            raise ValueError(f"there are counts of {self._rules} rules")
        self._check(segments, [mask], rows)
        addresses = np.full(max(1, rules), room(mask, U8), np.int64)
        scratch = np.zeros(abi.SCRATCH_BYTES, np.uint8)
        self._drive(
            place(segments, I64), len(segments), place(self._slots, I64), self._columns, rules,
            place(addresses, I64), room(changed, I64), 0, 0, 0, room(scratch, U8),
        )  # fmt: skip

    def _run(
        self,
        rules: int,
        segments: Int64,
        masks: Sequence[Bytes],
        into: Results,
        wanted: Sequence[panels.Panel] | None = None,
    ) -> None:
        self._check(segments, masks, len(into.changed))
        addresses = np.array([room(mask, U8) for mask in masks] or [0], np.int64)
        scratch = np.zeros(abi.SCRATCH_BYTES, np.uint8)
        rows, known = into.statistics, len(into.changed)
        given = (
            place(self._slots, I64),
            self._columns,
            rules,
            place(addresses, I64, rules),
            room(into.changed, I64, known * rules),
            room(into.hashes, U64, known * HASH_COLUMNS) if self._xxh3 else 0,
            self._xxh3,
            0 if rows is None else room(rows, F64, known * statistics.COLUMNS),
            room(scratch, U8),
        )
        if wanted is not None:
            table, aside = panels.table(wanted, len(segments)), np.empty(abi.BOX_SCRATCH, np.uint8)
            head = place(table, I64), len(table), self._driver.address, room(aside, U8)
            c_function("panels").ctypes(*head, place(segments, I64), *given)
            return
        self._drive(place(segments, I64), len(segments), *given)
        if not self._xxh3:
            self._hash_slowly(segments, into)

    def _check(self, segments: Int64, masks: Sequence[Bytes], rows: int) -> None:
        """Hold a table against what it leads to."""
        place(segments, I64)
        if segments.shape[1] != abi.SEG_COLUMNS:
            raise ValueError(f"segments have {abi.SEG_COLUMNS} columns")
        if not len(segments):
            return
        found = np.empty(abi.BOUNDS, np.int64)
        c_function("bounds").ctypes(place(segments, I64), len(segments), room(found, I64))
        row, most_row, slot, most_slot, low, high = found.tolist()
        within(row, most_row + 1, rows)
        within(slot, most_slot + 1, len(self._slots))
        within(low, high, 8 * min((len(mask) for mask in masks), default=0))

    def _hash_slowly(self, segments: Int64, into: Results) -> None:
        for segment in segments:
            bits = int(self._slots[segment[abi.SEG_SLOT], abi.SLOT_BITS])
            size = int(segment[abi.SEG_ELEMENTS]) * bits // 8
            row = into.hashes[segment[abi.SEG_ROW]]
            for side, column in enumerate((abi.SEG_BASE, abi.SEG_TUNED)):
                address, unit = int(segment[column]), int(segment[abi.SEG_UNIT])
                data = bytes_at(address, size).data
                sums = hashing.add_units(data, unit, hashing.UNIT * bits // 8)
                row[2 * side : 2 * side + 2] += np.array(sums, np.uint64)
