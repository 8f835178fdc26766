"""Random keys of elements: marking those up to a limit, and collecting those near one."""

from __future__ import annotations

import numpy as np

from ckdiff.kernels.abi import DRAW_SCRATCH, LANES
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import U8, U64, Bytes, UInt64, room

Stream = tuple[int, int]  # key and high half of the counter of Philox4x32-10


def draw(stream: Stream, word: int, elements: int, limit: int, mask: Bytes) -> int:
    """Set the bits of elements, from the stream's word ``word`` on, with keys up to ``limit``.

    Gives how many those are. ``mask`` begins with their words.
    """
    scratch = np.empty(DRAW_SCRATCH, np.uint8)
    to = room(mask, U8, -(-elements // LANES) * (LANES // 8))
    return int(c_function("draw").ctypes(*stream, word, elements, limit, to, room(scratch, U8)))


def near(
    stream: Stream, word: int, elements: int, low: int, high: int, most: int
) -> tuple[int, int, UInt64]:
    """How many keys are at most ``low``; how many are above it and at most ``high``; these.

    Of the last no more than ``most`` are given.
    """
    scratch, out = np.empty(DRAW_SCRATCH, np.uint8), np.empty(1 + most, np.uint64)
    found = c_function("near").ctypes(
        *stream, word, elements, low, high, room(out, U64), most, room(scratch, U8)
    )
    return int(out[0]), int(found), out[1 : 1 + found]
