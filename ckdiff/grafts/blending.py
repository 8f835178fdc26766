"""Spans of both sides and of a mask -> what is written, in the base's dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.dtypes import DTYPES, common
from ckdiff.kernels.blending import Blend
from ckdiff.kernels.casting import narrow, widen
from ckdiff.kernels.memory import Bytes
from ckdiff.layout import ALIGNMENT

BUFFER = 4 << 20  #: bytes that are blended, and written, at a time
MEMORY = 4 * BUFFER  #: bytes that a Blender takes at most
Kinds = tuple[str, str]  #: the dtypes of base and tuned


def can_take(kinds: Kinds) -> bool:
    """Whether a base of one dtype can take elements of another."""
    base, tuned = (DTYPES[kind] for kind in kinds)
    if base == tuned:
        return True
    return common(*kinds) is not None and (base.holds(tuned) or tuned.bits >= 16)


def rounds(kinds: Kinds) -> bool:
    """Whether tuned elements may have to be rounded."""
    base, tuned = (DTYPES[kind] for kind in kinds)
    return base != tuned and not base.holds(tuned)


class Blends:
    """The kernels for pairs of dtypes. Shared by threads."""

    def __init__(self, kinds: Iterable[Kinds]) -> None:
        #: for each pair the dtype in which it is told whether an element was rounded
        self.wide = {pair: common(*pair) or pair[0] for pair in kinds}
        held = {dtype for pair, wide in self.wide.items() for dtype in (pair[0], wide)}
        self.of = {bits: Blend(bits) for bits in {DTYPES[dtype].bits for dtype in held}}


class Blender:
    """Blends spans, a buffer at a time. For one thread."""

    def __init__(self, blends: Blends) -> None:
        self._blends = blends
        self._out = np.empty(BUFFER, np.uint8)
        self._cast: list[Bytes] = []

    def __call__(
        self, kinds: Kinds, sides: tuple[Bytes, Bytes, Bytes], elements: int
    ) -> Iterator[tuple[Bytes, IntArray]]:
        """Blend base, tuned and mask: gives bytes to write, which hold until the next, and counts
        of elements: taken, of these those that differ from the base's, and those rounded.
        """
        base, tuned, mask = sides
        bits, other = (DTYPES[kind].bits for kind in kinds)
        widest = max(bits, other, DTYPES[self._blends.wide[kinds]].bits)
        # whole bytes of mask, and whole bytes of elements that share them
        most = BUFFER * 8 // widest // ALIGNMENT * ALIGNMENT
        blend = self._blends.of[bits]
        for first in range(0, elements, most):
            count = min(most, elements - first)
            at, size = first * bits // 8, count * bits // 8
            taken = tuned[first * other // 8 :][: count * other // 8]
            marks, rounded = mask[first // 8 :], 0
            if kinds[0] != kinds[1]:
                taken, rounded = self._taken(kinds, taken, marks, size)
            found = blend(base[at : at + size], taken, marks, self._out, count)
            yield self._out[:size], np.array([*found, rounded], np.int64)

    def _taken(self, kinds: Kinds, tuned: Bytes, mask: Bytes, size: int) -> tuple[Bytes, int]:
        """Tuned elements in the base's dtype, and how many of the marked ones were rounded."""
        if not self._cast:
            self._cast = [np.empty(BUFFER, np.uint8) for _ in range(3)]
        taken, wide = self._cast[0][:size], self._blends.wide[kinds]
        if not narrow(tuned, kinds[1], kinds[0], taken):
            return taken, 0
        count = len(tuned) * 8 // DTYPES[kinds[1]].bits
        size = count * DTYPES[wide].bits // 8
        exact, written = (buffer[:size] for buffer in self._cast[1:])
        widen(tuned, kinds[1], wide, exact)
        widen(taken, kinds[0], wide, written)
        # what is written over is not looked at again
        _, rounded = self._blends.of[DTYPES[wide].bits](exact, written, mask, written, count)
        return taken, rounded
