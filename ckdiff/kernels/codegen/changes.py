"""Where two runs of bytes differ and what both have there; and putting one of them there again."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import GROUP, LANES, PAGE_BITS, PUT_SCRATCH
from ckdiff.kernels.codegen.runs import differing, differing_of
from ckdiff.kernels.codegen.scatter import moves
from ckdiff.kernels.codegen.words import (
    copy_byte,
    load_word,
    lowest_one,
    ones,
    store_byte,
    store_word,
)


def changes_kernel(kind: str = "") -> Callable[..., None]:
    """Finds the changes of one window."""
    gather_bytes = moves(portable=kind == "portable").gather_bytes

    def changes(
        old: int, new: int, size: int, blocks: int, masks: int, before: int, after: int, counts: int
    ) -> None:
        one = types.uint64(1)
        count = found = 0
        for first in range(0, size, GROUP):
            bits = types.uint64(0)
            words = masks + 8 * found  # of all blocks, until only those that differ are kept
            for i in range(LANES):
                at = first + i * LANES
                word = differing_of(old + at, new + at, size - at)
                store_word(words + 8 * i, word)
                bits |= types.uint64(word != 0) << types.uint64(i)
            store_word(blocks + first // (LANES * 8), bits)
            while bits:
                i = lowest_one(bits)
                at = first + i * LANES
                bits &= bits - one
                word = types.uint64(load_word(words + 8 * i))
                store_word(masks + 8 * found, word)
                found += 1
                if size - at >= LANES:
                    gather_bytes(old + at, word, before + count)
                    gather_bytes(new + at, word, after + count)
                    count += ones(word)
                else:
                    while word:
                        k = lowest_one(word)
                        word &= word - one
                        copy_byte(before + count, old + at + k)
                        copy_byte(after + count, new + at + k)
                        count += 1
        store_word(counts, found)
        store_word(counts + 8, count)

    return changes


def put_kernel(kind: str = "") -> Callable[..., int]:
    """Puts one side's bytes into a window that has either side's at each place."""
    spread_bytes = moves(portable=kind == "portable").spread_bytes

    def put(
        data: int, size: int, blocks: int, masks: int, blocks_left: int, wanted: int, other: int,
        left: int, skew: int, pages: int, scratch: int,
    ) -> int:  # fmt: skip
        one = types.uint64(1)
        strange = types.uint64(0)
        for first in range(0, size, GROUP):
            bits = types.uint64(load_word(blocks + first // (LANES * 8)))
            while bits:
                at = first + lowest_one(bits) * LANES
                bits &= bits - one
                blocks_left -= 1
                if blocks_left < 0 or at >= size:
                    return -1
                word = types.uint64(load_word(masks))
                masks += 8
                count = ones(word)
                left -= count
                if left < 0 or (size - at < LANES and word >> types.uint64(size - at)):
                    return -1
                # what is spread keeps what was there: another place does not wait for it
                spread = scratch + 2 * (at & (PUT_SCRATCH // 2 - 1))
                spread_bytes(wanted, word, spread)
                spread_bytes(other, word, spread + LANES)
                differs = differing(data + at, spread) & word
                strange |= differs & differing(data + at, spread + LANES)
                if differs:
                    spread_bytes(wanted, word, data + at)
                    page = (skew + at) >> PAGE_BITS
                    here = ((page + 1) << PAGE_BITS) - skew - at  # bytes of the block in this page
                    if here < LANES:
                        if differs >> types.uint64(here):
                            store_byte(pages + page + 1, 1)
                        differs &= (one << types.uint64(here)) - one
                    if differs:
                        store_byte(pages + page, 1)
                wanted += count
                other += count
        if blocks_left or left:
            return -1
        return 1 if strange else 0

    return put
