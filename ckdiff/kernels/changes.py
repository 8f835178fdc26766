"""Where two windows differ, byte by byte, what both have there, and putting that there again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ckdiff.kernels.abi import GROUP, LANES, PAGE_BITS, PUT_SCRATCH
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, U64, Bytes, UInt64, place, room

PAGE = 1 << PAGE_BITS  #: bytes
#: bytes of a buffer behind what is put, and behind where it is put
MARGIN = LANES


class Changes(NamedTuple):
    """What differs between two windows."""

    blocks: UInt64  #: a bit for each 64 bytes, the lowest first: whether any of them differs
    masks: UInt64  #: of each block that has one, which bytes
    old: Bytes
    new: Bytes


class Kept(NamedTuple):
    """The same, as it is put again."""

    blocks: UInt64
    masks: UInt64
    values: Bytes  #: the old, the new, and a MARGIN of any


class ChangeFinder:
    """Buffers for windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        self._window = window
        groups = -(-window // GROUP)
        self._blocks, self._masks = np.empty(groups, U64), np.empty(groups * LANES, U64)
        self._old, self._new = np.empty((2, window + MARGIN), np.uint8)
        self._counts = np.empty(2, np.int64)
        self._rooms = [
            room(self._blocks, U64), room(self._masks, U64),
            room(self._old, U8), room(self._new, U8), room(self._counts, I64),
        ]  # fmt: skip

    def find(self, old: Bytes, new: Bytes, kind: str = "") -> Changes:
        """What differs; it lies in the buffers until the next call.

        Raises ValueError for windows of two sizes, or too large ones.
        """
        if len(old) != len(new) or len(old) > self._window:
            raise ValueError("two windows of one size, no larger than the buffers, are compared")
        find = c_function("changes", kind).ctypes
        find(place(old, U8), place(new, U8), len(old), *self._rooms)
        blocks, count = self._counts.tolist()
        groups = self._blocks[: -(-len(old) // GROUP)]
        return Changes(groups, self._masks[:blocks], self._old[:count], self._new[:count])


class Put:
    """Buffers to put changes into windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._pages = np.zeros(window // PAGE + 4, np.bool_)  # between two that are not touched
        self._scratch = np.empty(PUT_SCRATCH, np.uint8)
        self._rooms = [room(array, U8) for array in (self._pages.view(U8)[1:], self._scratch)]

    def __call__(
        self, changes: Kept, data: Bytes, skew: int, *, undo: bool = False, kind: str = ""
    ) -> list[tuple[int, int]] | None:
        """Put what is new, or with ``undo`` what was old, into the bytes that ``changes`` are of.

        ``data`` are these and MARGIN more, and begin ``skew`` bytes after where a page does. Gives
        what is to be written, runs of pages in which something was not there yet, as bytes of the
        data; None, and no matter what is in ``data``, where there was neither the old nor the new.
        Raises ValueError for changes that are not of so many bytes.
        """
        size, (blocks, masks, values) = len(data) - MARGIN, changes
        count, odd = divmod(len(values) - MARGIN, 2)
        if not 0 <= size <= self._window or not 0 <= skew < PAGE or count < 0 or odd:
            raise ValueError("a window no larger than the buffers is changed, with a margin")
        pages = self._pages[: -(-(skew + size) // PAGE) + 2]
        pages[:] = False
        old, new = place(values, U8), place(values, U8) + count
        found = c_function("put", kind).ctypes(
            room(data, U8), size, place(blocks, U64, -(-size // GROUP)), place(masks, U64),
            len(masks), *((old, new) if undo else (new, old)), count, skew, *self._rooms,
        )  # fmt: skip
        if found < 0:
            raise ValueError("changes that are not of these bytes")
        if found:
            return None
        edges = np.flatnonzero(pages[1:] != pages[:-1]) * PAGE - skew
        runs = edges.clip(0, size).tolist()
        return list(zip(runs[::2], runs[1::2], strict=True))
