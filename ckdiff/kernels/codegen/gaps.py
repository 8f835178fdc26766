"""Strings of mostly equal bits as the gaps between the others, and back."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.codegen.words import load_byte, load_word, lowest_one, store_byte, store_word

_MORE = 255  # goes on in the next byte


def gaps_kernel() -> Callable[..., None]:
    """Writes the zeros before each one, the high part as bytes and the low bits packed."""

    def gaps(
        bits: int, count: int, flip: int, low: int, out: int, low_out: int, result: int
    ) -> None:
        one = types.uint64(1)
        low_mask = (one << types.uint64(low)) - one
        to = types.int64(out)
        low_to = types.int64(low_out)
        pending = types.uint64(0)
        filled = 0
        last = -1
        for i in range(0, count, 64):
            word = types.uint64(load_word(bits + (i >> 3))) ^ types.uint64(flip)
            if count - i < 64:
                word &= (one << types.uint64(count - i)) - one
            while word:
                place = i + lowest_one(word)
                word &= word - one
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
                if filled >= 32:
                    store_word(low_to, pending)
                    low_to += 4
                    pending >>= types.uint64(32)
                    filled -= 32
        store_word(low_to, pending)
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
        for i in range(0, count, 64):
            word = types.uint64(flip)
            if count - i < 64:
                word &= (one << types.uint64(count - i)) - one
            store_word(out + (i >> 3), word)
        at = types.int64(data)
        end = at + size
        place = -1
        read = 0
        found = 0
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
            slot = out + (place >> 3)
            store_byte(slot, load_byte(slot) ^ (1 << (place & 7)))
            found += 1
        return found

    return ungaps
