"""Where two windows differ, byte by byte, what both have there, and putting that there again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import LANES, PAGE_BITS
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import U8, U64, Bytes, UInt64, place, room

BLOCK = LANES  #: bytes that have one bit
PAGE = 1 << PAGE_BITS  #: bytes
#: bytes of a buffer behind what is put into it, and behind bytes of changes that are put
MARGIN = LANES
_GROUP = LANES * BLOCK  # bytes whose blocks have one word


class Changes(NamedTuple):
    """What differs between two windows."""

    blocks: Bytes  #: a bit for each BLOCK bytes, the lowest first: whether any of them differs
    masks: UInt64  #: of each block that has one, which bytes
    old: Bytes
    new: Bytes


class ChangeFinder:
    """Buffers for windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._blocks = np.empty(8 * -(-window // _GROUP), np.uint8)
        self._masks = np.empty(-(-window // BLOCK), U64)
        self._old, self._new = np.empty((2, window + MARGIN), np.uint8)
        self._rooms = [
            room(self._blocks, U8), room(self._masks, U64),
            room(self._old, U8), room(self._new, U8),
        ]  # fmt: skip

    def find(self, old: Bytes, new: Bytes, kind: str = "") -> Changes:
        """What differs; it lies in the buffers until the next call.

        Raises ValueError for windows of two sizes, or too large ones.
        """
        if len(old) != len(new) or len(old) > self._window:
            raise ValueError("two windows of one size, no larger than the buffers, are compared")
        count = c_function("changes", kind).ctypes(
            place(old, U8), place(new, U8), len(old), *self._rooms
        )
        blocks = self._blocks[: -(-len(old) // (8 * BLOCK))]
        masks = self._masks[: _ones(blocks)]
        return Changes(blocks, masks, self._old[:count], self._new[:count])


class Put:
    """Buffers to put changes into windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._blocks = np.empty(-(-window // _GROUP), U64)
        self._pages = np.empty(window // PAGE + 2, np.bool_)
        self._sides = np.empty((2, window + MARGIN), np.uint8)
        self._scratch = np.empty(2 * LANES, np.uint8)
        self._begin = room(self._blocks, U64)
        self._rooms = [room(array, U8) for array in (*self._sides, self._pages.view(U8))]
        self._end = room(self._scratch, U8)

    def __call__(
        self, changes: Changes, data: Bytes, skew: int, *, undo: bool = False, kind: str = ""
    ) -> npt.NDArray[np.bool_] | None:
        """Put what is new, or with ``undo`` what was old, into the bytes that ``changes`` are of.

        ``data`` are these, MARGIN more come after them, and the first is ``skew`` bytes after where
        a page begins. Gives the pages in which something was not there yet, until the next call;
        None, and no matter what is in ``data``, where there was neither the old nor the new. Raises
        ValueError for changes that are not of so many bytes.
        """
        size = len(data) - MARGIN
        if size > self._window or not 0 <= skew < PAGE:
            raise ValueError("a window no larger than the buffers is changed")
        _check(changes, size)
        groups, count = -(-size // _GROUP), len(changes.new)
        self._blocks[groups - 1 :] = 0
        self._blocks.view(U8)[: len(changes.blocks)] = changes.blocks
        for side, held in zip(self._sides, changes[2:] if undo else changes[:1:-1], strict=True):
            side[:count] = held
        pages = self._pages[: -(-(skew + size) // PAGE)]
        pages[:] = False
        wanted, other, touched = self._rooms
        strange = c_function("put", kind).ctypes(
            room(data, U8), groups, self._begin, place(changes.masks, U64), wanted, other, skew,
            touched, self._end,
        )  # fmt: skip
        return None if strange else pages


def _check(changes: Changes, size: int) -> None:
    """Raise ValueError unless changes are of ``size`` bytes, as the finder makes them."""
    blocks, masks, old, new = changes
    at_end = -(-size // BLOCK) % 8  # blocks of the last byte of bits, 0 for all
    fits = len(blocks) == -(-size // (8 * BLOCK)) and len(masks) == _ones(blocks)
    fits = fits and not (at_end and int(blocks[-1]) >> at_end)
    fits = fits and len(old) == len(new) == _ones(masks)
    if size % BLOCK and fits and len(masks) and int(blocks[-1]) >> (at_end - 1) % 8:
        fits = not int(masks[-1]) >> size % BLOCK
    if not fits:
        raise ValueError("changes that are not of these bytes")


def _ones(words: npt.NDArray[np.unsignedinteger]) -> int:
    return int(np.bitwise_count(words).sum())
