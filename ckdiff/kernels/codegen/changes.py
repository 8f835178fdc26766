"""Where two runs of bytes differ, and what both have there."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.runs import differing
from ckdiff.kernels.codegen.words import copy_byte, load_byte, lowest_one, store_word

_FIRST = {1: 0xFFFFFFFFFFFFFFFF, 2: 0x5555555555555555}  # the first byte of each element


def changes_kernel(kind: str) -> Callable[..., int]:
    """Elements of one window; the kind is their bytes, 1 or 2."""
    width = int(kind)
    firsts, shift = _FIRST[width], width - 1

    def changes(old: int, new: int, size: int, places: int, before: int, after: int) -> int:
        count = 0
        for block in range((size + LANES - 1) // LANES):
            at = block * LANES
            word = types.uint64(0)
            if size - at >= LANES:
                word = differing(old + at, new + at)
            else:
                for i in range(size - at):
                    if load_byte(old + at + i) != load_byte(new + at + i):
                        word |= types.uint64(1) << types.uint64(i)
            word = (word | (word >> types.uint64(shift))) & types.uint64(firsts)
            while word:
                place = at + lowest_one(word)
                word &= word - types.uint64(1)
                store_word(places + 4 * count, place >> shift)  # the next one's is written after it
                for i in range(width):
                    copy_byte(before + width * count + i, old + place + i)
                    copy_byte(after + width * count + i, new + place + i)
                count += 1
        return count

    return changes
