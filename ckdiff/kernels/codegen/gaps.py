"""Strings of mostly equal bits as the gaps between the others, and back.

How many bits a word has, and whether the next one is in the same word, cannot be predicted, and a
wrong guess costs as much as several gaps do: the loops over gaps have no branch on it.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import GAPS_WORDS, LANES
from ckdiff.kernels.codegen.words import (
    load_byte,
    load_word,
    lowest_one,
    ones,
    store_byte,
    store_word,
)

_MORE = 255  # goes on in the next byte


def gaps_kernel() -> Callable[..., None]:
    """Writes the zeros before each one, the high part as bytes and the low bits packed."""

    def gaps(
        bits: int,
        count: int,
        flip: int,
        low: int,
        out: int,
        low_out: int,
        result: int,
        scratch: int,
    ) -> None:
        one = types.uint64(1)
        low_mask = (one << types.uint64(low)) - one
        to = types.int64(out)
        low_to = types.int64(low_out)
        pending = types.uint64(0)
        filled = 0
        last = -1
        for block in range(0, count, LANES * GAPS_WORDS):
            # the places of the ones of some words
            found = scratch
            end = block + LANES * GAPS_WORDS
            if end > count:
                end = count
            for i in range(block, end, LANES):
                word = types.uint64(load_word(bits + (i >> 3))) ^ types.uint64(flip)
                if count - i < LANES:
                    word &= (one << types.uint64(count - i)) - one
                after = found + 8 * ones(word)
                while word:  # four at a time: what was no one is overwritten by the next
                    for k in range(4):
                        store_word(found + 8 * k, i + lowest_one(word | (one << types.uint64(63))))
                        word &= word - one
                    found += 32
                found = after
            # their gaps
            for at in range(scratch, found, 8):
                place = load_word(at)
                gap = place - last - 1
                last = place
                high = gap >> low
                while high >= _MORE:
                    store_byte(to, _MORE)
                    to += 1
                    high -= _MORE
                store_byte(to, high)
                to += 1
                pending |= (types.uint64(gap) & low_mask) << types.uint64(filled)
                filled += low
                store_word(low_to, pending)
                low_to += filled >> 3
                pending >>= types.uint64(filled & ~7)
                filled &= 7
        store_word(result, to - out)
        store_word(result + 8, low_to + ((filled + 7) >> 3) - low_out)

    return gaps


def ungaps_kernel() -> Callable[..., int]:
    """Makes the bits again; -1 for whatever ``gaps`` does not write."""

    def ungaps(
        data: int,
        size: int,
        low_data: int,
        low_bits: int,
        low: int,
        flip: int,
        count: int,
        out: int,
    ) -> int:
        one = types.uint64(1)
        low_mask = (one << types.uint64(low)) - one
        for i in range(0, count, LANES):
            store_word(out + (i >> 3), types.uint64(flip))
        at = types.int64(data)
        end = at + size
        place = -1
        read = 0
        found = 0
        slot = -1
        word = types.uint64(0)
        while at < end:
            part = load_byte(at)
            at += 1
            gap = part
            while part == _MORE:
                if at >= end:
                    return -1
                part = load_byte(at)
                at += 1
                gap += part
            if read + low > low_bits:
                return -1
            bits = types.uint64(load_word(low_data + (read >> 3))) >> types.uint64(read & 7)
            read += low
            place += 1 + ((gap << low) | types.int64(bits & low_mask))
            if place >= count:
                return -1
            same = types.uint64(0) - types.uint64((place >> 6) == slot)
            slot = place >> 6
            word = (word & same) | (types.uint64(flip) & ~same)
            word ^= one << types.uint64(place & 63)
            store_word(out + 8 * slot, word)
            found += 1
        if count & 63:
            slot = out + ((count >> 6) << 3)
            mask = (one << types.uint64(count & 63)) - one
            store_word(slot, types.uint64(load_word(slot)) & mask)
        return found

    return ungaps
