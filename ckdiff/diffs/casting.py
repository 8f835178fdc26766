"""Pairs of two float dtypes: they are widened before they are compared, or while they are.

The driver makes the wider floats of a few thousand elements at a time, from recipes, and hashes
what is stored. Where something else compares, or bytes are hashed where they lie, a window is
widened before: content hashes are of each side's own bits, so those of what was widened are added
up here then, and put in place of what was made of the wider copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ckdiff.diffs.sides import Side, Window
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import Results, abi
from ckdiff.kernels.casting import Rooms, head, room_bytes, widen
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import I64, U8, bytes_at, place
from ckdiff.layout import IntArray

_COLUMNS = (abi.SEG_BASE, abi.SEG_TUNED)
_APART = 64  #: bytes that the spans of a buffer are aligned to


class Buffers:
    """What one thread widens into, one buffer for each side."""

    def __init__(self) -> None:
        self._memory = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.rooms = Rooms()

    def of(self, side: int, size: int) -> npt.NDArray[np.uint8]:
        """At least ``size`` bytes for a side."""
        if len(self._memory[side]) < size:
            self._memory[side] = np.empty(size, np.uint8)
        return self._memory[side]


@dataclass(frozen=True, eq=False)
class Casting:
    """Which tensors of which side are widened; shared by the threads of a process."""

    kinds: Sequence[str]  #: for each tensor the dtype of its values
    #: for base and tuned the dtypes as stored of what is widened, by position in the layout
    narrow: tuple[dict[int, str], dict[int, str]]

    @classmethod
    def of(cls, sides: tuple[Side, Side], kinds: Sequence[str], retyped: Iterable[int]) -> Casting:
        """What has to be widened of both sides, to these dtypes: of the ``retyped`` pairs."""
        pairs = sorted(retyped)
        base, tuned = (
            {i: side.dtypes[i] for i in pairs if side.dtypes[i] != kinds[i]} for side in sides
        )
        return cls(kinds, (base, tuned))

    def begin(self, buffers: Buffers | None = None, *, late: bool = False) -> Cast:
        """For a chunk; ``buffers`` are those of an earlier one on this thread. ``late`` is whether
        a driver compares that takes recipes, each window once.
        """
        return Cast(self, buffers or Buffers(), late)

    def memory(self, window: int, *, late: bool) -> int:
        """Bytes that a worker takes for windows of so many elements; ``late`` as above."""
        if not late:
            return self._sides * window * self.widest // 8
        # no tensor of a window is smaller than its recipes but for a few elements
        spans = min(len(self._pairs), window // UNIT)
        return self._sides * room_bytes(self.widest) + spans * 2 * 8 * abi.RECIPE_FIELDS

    @property
    def _sides(self) -> int:
        return sum(map(bool, self.narrow))

    @cached_property
    def _pairs(self) -> list[int]:
        return sorted({*self.narrow[0], *self.narrow[1]})

    @cached_property
    def widest(self) -> int:
        """Bits of the widest value."""
        return max((DTYPES[self.kinds[i]].bits for i in self._pairs), default=0)

    @cached_property
    def heads(self) -> tuple[IntArray, IntArray]:
        """For each tensor a row, or -1; in each row what the recipes of both sides begin with."""
        known: dict[tuple[str, str, str], int] = {}
        rows: IntArray = np.full(len(self.kinds), -1, np.int64)
        for i in self._pairs:
            base, tuned = (narrow.get(i, self.kinds[i]) for narrow in self.narrow)
            rows[i] = known.setdefault((base, tuned, self.kinds[i]), len(known))
        found = [head((base, tuned), values) for base, tuned, values in known]
        return rows, np.array(found, np.int64).reshape(-1, 2, 3)


@dataclass(slots=True, eq=False)
class Cast:
    """The widened windows of one chunk, one after the other, and the hashes of what they were."""

    casting: Casting
    buffers: Buffers
    late: bool
    _recipes: list[IntArray] = field(default_factory=list)  # of a window
    _sums: dict[tuple[int, int], npt.NDArray[np.uint64]] = field(default_factory=dict)
    _hasher: ContentHasher | None = None

    def widen(self, segments: IntArray, window: Window) -> None:
        """Widen what has to be of a window: its segments lead to the copies then, or to recipes."""
        if self.late:
            self._say_how(segments, window)
            return
        tensors = window.spans.tensors.tolist()
        for side, narrow in enumerate(self.casting.narrow):
            if not narrow:
                continue
            places = [(at, tensor) for at, tensor in enumerate(tensors) if tensor in narrow]
            if places:
                self._widen(side, places, segments, window)

    def _say_how(self, segments: IntArray, window: Window) -> None:
        """Of both sides of such a pair: what is wide is hashed as it is stored, too."""
        if not any(self.casting.narrow):
            return
        rows, heads = self.casting.heads
        row = rows[window.spans.tensors]
        self._recipes = []
        for side, column in enumerate(_COLUMNS):
            # what has recipes of its own is wide
            at = np.flatnonzero((row >= 0) & (segments[:, column] >= 0))
            found = self.buffers.rooms.recipes(
                side, heads[row[at], side], segments[at, abi.SEG_ELEMENTS], segments[at, column],
                self.casting.widest,
            )  # fmt: skip
            self._recipes.append(found)
            segments[at, column] = -(place(found, I64) + found.strides[0] * np.arange(len(at)))

    def _widen(
        self, side: int, places: list[tuple[int, int]], segments: IntArray, window: Window
    ) -> None:
        kinds, narrow, column = self.casting.kinds, self.casting.narrow[side], _COLUMNS[side]
        _, starts, nbytes = window.wanted[side]
        sizes = [
            int(segments[at, abi.SEG_ELEMENTS]) * DTYPES[kinds[t]].bits // 8 for at, t in places
        ]
        begins = np.cumsum([0, *(-(-size // _APART) * _APART for size in sizes)]).tolist()
        buffer = self.buffers.of(side, begins[-1])
        for (at, tensor), begin, size in zip(places, begins, sizes, strict=False):
            stored = narrow[tensor]
            data = bytes_at(int(segments[at, column]), int(nbytes[at]))
            self._hash(side, int(window.rows[at]), data, int(starts[at]), DTYPES[stored].bits)
            widen(data, stored, kinds[tensor], buffer[begin : begin + size])
            segments[at, column] = place(buffer, U8) + begin

    def _hash(
        self, side: int, row: int, data: npt.NDArray[np.uint8], start: int, bits: int
    ) -> None:
        self._hasher = self._hasher or ContentHasher()
        sums = self._sums.setdefault((side, row), np.zeros(2, np.uint64))
        self._hasher.add(sums, data, start, bits)

    def finish(self, results: Results) -> None:
        """Put the hashes of the bits as they are stored in their place."""
        for (side, row), sums in self._sums.items():
            results.hashes[row, 2 * side : 2 * side + 2] = sums
