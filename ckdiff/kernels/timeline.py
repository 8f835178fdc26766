"""Windows of many checkpoints: each against the first and against the one before it, and what the
masks of all steps add up to.

Sides are 0, 1, ... and steps are the sides but the first. The pairs are (0, 1), (0, 2), ... and
then (1, 2), (2, 3), ...; that of (0, 1) is of neighbours as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckdiff.dtypes import DType
from ckdiff.kernels import abi, hashing
from ckdiff.kernels.binding import bind
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, U64, Bytes, Int64, UInt64, bytes_at, place, room, within
from ckdiff.kernels.paths import COLUMNS, Float64
from ckdiff.rules import Rule


class Sums:
    """What a chunk's tensors add up to, one row a tensor; windows of the chunk add to it."""

    def __init__(
        self, rows: int, sides: int, rules: int, steps: int, *, stats: bool = False
    ) -> None:
        self.firsts: Int64 = np.zeros((rows, sides - 1, rules), np.int64)  #: against the first
        self.nexts: Int64 = np.zeros((rows, sides - 2), np.int64)  #: of sides 2, 3, ...
        self.hashes: UInt64 = np.zeros((rows, sides, 2), np.uint64)
        #: for each step what is marked in it and in the last, then what is marked in any
        self.moves: Int64 = np.zeros((rows, steps + 1), np.int64)
        #: see :mod:`ckdiff.kernels.paths`; of no steps where no statistics are asked for
        self.paths: Float64 = np.zeros((rows, sides - 1 if stats else 0, COLUMNS))


def columns(sides: int) -> int:
    """Columns of a segment; see MARCH_HEAD in :mod:`ckdiff.kernels.abi`."""
    return abi.MARCH_HEAD + abi.MARCH_SIDE * sides + abi.MARCH_PAIR * (2 * sides - 3)


class Marching:
    """Compiled kernels for some dtypes and rules; immutable, shared by all workers.

    The first of ``rules`` is exact. Neighbours are compared by the last only.
    """

    def __init__(self, dtypes: Sequence[DType], rules: Sequence[Rule], sides: int) -> None:
        self._rules, self._sides = len(rules), sides
        self._columns = abi.SLOT_RULES + 2 * len(rules)
        both = [(0, s) for s in range(1, sides)], [(s - 1, s) for s in range(2, sides)]
        self._pairs = np.array([*both[0], *both[1]], np.int64)
        slots: Int64 = np.zeros((len(dtypes), self._columns), np.int64)
        self.slot_of = {dtype.name: i for i, dtype in enumerate(dtypes)}
        for i, dtype in enumerate(dtypes):
            slots[i, abi.SLOT_BITS] = dtype.bits
            for r, rule in enumerate(rules):
                kind, parameter = bind(rule, dtype)
                at = abi.SLOT_RULES + 2 * r
                slots[i, at] = c_function("compare", kind).address
                slots[i, at + 1] = np.uint64(parameter).view(np.int64)
        self._slots = slots
        #: of each slot what compares all sides at once, 0 where there is none
        self._sweeps = np.array([_sweep(dtype, len(rules)) for dtype in dtypes] or [0], np.int64)
        self._march = c_function("march").ctypes
        self._xxh3 = hashing.xxh3_128_address()

    def run(self, segments: Int64, masks: Sequence[Bytes], into: Sums) -> None:
        """Compare and hash the segments of one window.

        ``segments`` is C-contiguous int64, (n, columns(sides)). ``masks`` holds a zeroed uint8
        buffer for each side but the first and each rule, rule by rule for a side, into which a
        segment's bits go at byte MARCH_POSITION / 8. Counts and hash sums are added to ``into``.
        """
        steps = self._sides - 1
        self._check(segments, masks, len(into.firsts))
        addresses = np.array([room(mask, U8) for mask in masks], np.int64)
        size = abi.SCRATCH_BYTES + abi.MARCH_STEP // 8 + 8 * abi.SWEEP_FIELDS
        scratch, sweeps = np.zeros(size, np.uint8), self._sweeping(segments)
        known = len(into.firsts)
        self._march(
            place(segments, I64), len(segments), segments.shape[1],
            place(self._slots, I64), self._columns, self._sides, self._rules,
            place(addresses, I64, steps * self._rules),
            room(into.firsts, I64, known * steps * self._rules),
            room(into.nexts, I64, known * (steps - 1)),
            room(into.hashes, U64, known * self._sides * 2) if self._xxh3 else 0,
            self._xxh3, room(scratch, U8), place(sweeps, I64, len(segments)),
        )  # fmt: skip
        if not self._xxh3:
            self._hash_slowly(segments, into)

    def _sweeping(self, segments: Int64) -> Int64:
        """For each segment what compares its sides at once: where all have one width, as stored."""
        count, rest = len(segments), segments[:, abi.MARCH_HEAD :]
        sides = rest[:, : abi.MARCH_SIDE * self._sides].reshape(count, -1, abi.MARCH_SIDE)
        pairs = rest[:, abi.MARCH_SIDE * self._sides :].reshape(count, -1, abi.MARCH_PAIR)
        alike = (sides[:, :, 1] == sides[:, :1, 1]).all(1)
        alike &= (pairs[:, :, 2] == pairs[:, :1, 2]).all(1)
        for which, column in enumerate(self._pairs.T):
            alike &= (pairs[:, :, which] == sides[:, column, 0]).all(1)
        found = np.where(alike, self._sweeps[pairs[:, 0, 2]], 0)
        return np.ascontiguousarray(found, np.int64)

    def _check(self, segments: Int64, masks: Sequence[Bytes], rows: int) -> None:
        """Hold a table against what it leads to."""
        if segments.shape[1] != columns(self._sides):
            raise ValueError(f"segments have {columns(self._sides)} columns")
        if len(masks) != (self._sides - 1) * self._rules:
            raise ValueError("there is a mask for each step and rule")
        _check_segments(segments, rows, min((len(mask) for mask in masks), default=0))
        if len(segments):
            slots = segments[:, abi.MARCH_HEAD + abi.MARCH_SIDE * self._sides + 2 :: abi.MARCH_PAIR]
            within(int(slots.min()), int(slots.max()) + 1, len(self._slots))

    def _hash_slowly(self, segments: Int64, into: Sums) -> None:
        for segment in segments.tolist():
            for side in range(self._sides):
                address, bits = segment[abi.MARCH_HEAD + abi.MARCH_SIDE * side :][:2]
                data = bytes_at(address, segment[abi.MARCH_ELEMENTS] * bits // 8).data
                unit_bytes = hashing.UNIT * bits // 8
                sums = hashing.add_units(data, segment[abi.MARCH_UNIT], unit_bytes)
                into.hashes[segment[abi.MARCH_ROW], side] += np.array(sums, np.uint64)


def _sweep(dtype: DType, rules: int) -> int:
    """The address of what compares all sides of a dtype exactly, at once."""
    if rules > 1 or dtype.bits < 8:
        return 0
    return c_function("sweep", f"W{dtype.bits}:exact").address


def moves(
    segments: Int64, masks: Sequence[Bytes], out: Bytes | None, width: int, into: Sums
) -> None:
    """Add to ``into.moves`` what the masks of all steps mark in the segments of a window.

    ``out``, if there is one, gets for each element the number of the first step that marks it, from
    1 on, 0 where none does, as an unsigned little-endian integer of ``width`` bytes: 1 or 2.
    """
    steps = len(masks)
    if into.moves.shape[1] != steps + 1:
        raise ValueError("there is a mask for each step")
    if out is not None and steps >= 1 << (8 * width):
        raise ValueError(f"{steps} steps have no numbers of {width} bytes")
    _check_segments(segments, len(into.moves), min(map(len, masks)))
    size = 0 if out is None else min(map(len, masks)) * 8 * width
    addresses = np.array([place(mask, U8) for mask in masks], np.int64)
    c_function("moves", str(0 if out is None else 8 * width)).ctypes(
        place(segments, I64), len(segments), segments.shape[1], place(addresses, I64), steps,
        0 if out is None else room(out, U8, size), room(into.moves, I64),
    )  # fmt: skip


def _check_segments(segments: Int64, rows: int, mask_bytes: int) -> None:
    place(segments, I64)
    if not len(segments):
        return
    low, high = segments[:, : abi.MARCH_HEAD].min(axis=0), segments[:, : abi.MARCH_HEAD].max(axis=0)
    within(int(low[abi.MARCH_ROW]), int(high[abi.MARCH_ROW]) + 1, rows)
    ends = segments[:, abi.MARCH_POSITION] + segments[:, abi.MARCH_ELEMENTS]
    least = min(int(low[abi.MARCH_POSITION]), int(low[abi.MARCH_ELEMENTS]))
    within(least, int(ends.max()), 8 * mask_bytes)
    if (segments[:, abi.MARCH_POSITION] % hashing.UNIT).any():
        raise ValueError("segments begin at whole units")
