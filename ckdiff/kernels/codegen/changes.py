"""Where two runs of bytes differ and what both have there; and putting one of them there again."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import LANES, PAGE_BITS
from ckdiff.kernels.codegen.runs import differing
from ckdiff.kernels.codegen.scatter import moves
from ckdiff.kernels.codegen.words import (
    copy_byte,
    load_byte,
    load_word,
    lowest_one,
    ones,
    store_byte,
    store_word,
)


def changes_kernel(kind: str = "") -> Callable[..., int]:
    """Finds the changes of one window."""
    gather_bytes = moves(portable=kind == "portable").gather_bytes

    def changes(
        old: int, new: int, size: int, blocks: int, masks: int, before: int, after: int
    ) -> int:
        one = types.uint64(1)
        count = found = 0
        for first in range(0, size, LANES * LANES):
            bits = types.uint64(0)
            for i in range(LANES):
                at = first + i * LANES
                if at >= size:
                    break
                word = types.uint64(0)
                if size - at >= LANES:
                    word = differing(old + at, new + at)
                    if word:
                        gather_bytes(old + at, word, before + count)
                        gather_bytes(new + at, word, after + count)
                        count += ones(word)
                else:
                    for k in range(size - at):
                        if load_byte(old + at + k) != load_byte(new + at + k):
                            word |= one << types.uint64(k)
                            copy_byte(before + count, old + at + k)
                            copy_byte(after + count, new + at + k)
                            count += 1
                if word:
                    bits |= one << types.uint64(i)
                    store_word(masks + 8 * found, word)
                    found += 1
            store_word(blocks + first // (LANES * 8), bits)
        return count

    return changes


def put_kernel(kind: str = "") -> Callable[..., int]:
    """Puts one side's bytes into a window that has either side's at each place."""
    spread_bytes = moves(portable=kind == "portable").spread_bytes

    def put(
        data: int, groups: int, blocks: int, masks: int, wanted: int, other: int, skew: int,
        pages: int, scratch: int,
    ) -> int:  # fmt: skip
        one = types.uint64(1)
        strange = types.uint64(0)
        for group in range(groups):
            bits = types.uint64(load_word(blocks + 8 * group))
            while bits:
                at = (group * LANES + lowest_one(bits)) * LANES
                bits &= bits - one
                word = types.uint64(load_word(masks))
                masks += 8
                spread_bytes(wanted, word, scratch)
                spread_bytes(other, word, scratch + LANES)
                differs = differing(data + at, scratch) & word
                strange |= differs & differing(data + at, scratch + LANES)
                if differs:
                    spread_bytes(wanted, word, data + at)
                    page = (skew + at) >> PAGE_BITS
                    left = ((page + 1) << PAGE_BITS) - skew - at  # bytes of the block in this page
                    if left < LANES:
                        if differs >> types.uint64(left):
                            store_byte(pages + page + 1, 1)
                        differs &= (one << types.uint64(left)) - one
                    if differs:
                        store_byte(pages + page, 1)
                wanted += ones(word)
                other += ones(word)
        return 1 if strange else 0

    return put
