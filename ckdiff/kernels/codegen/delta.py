"""Splitting two windows into the streams of a packed delta, and merging them again.

Both walk 64 elements at a time. The classes are ranges of the base's magnitude, and each has a
string of bits, one for each of its elements in order, set where the element changed, and a symbol
for each set bit. :mod:`ckdiff.deltas.form` says what becomes of the streams.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import (
    CLASS_AT,
    CLASS_BITS,
    CLASS_COLUMNS,
    CLASS_LEAST,
    CLASS_PENDING,
    CLASS_SYMBOLS,
    CLASS_TOTAL,
    DELTA_AT,
    DELTA_EXTRA,
    DELTA_HEAD,
    DELTA_PENDING,
    LANES,
    SMALL_BITS,
    SMALL_STEPS,
)
from ckdiff.kernels.codegen.scatter import moves
from ckdiff.kernels.codegen.steps import (
    Kind,
    apply_step,
    apply_symbols,
    at_least,
    clear_bytes,
    differing,
    leading_one,
    magnitude_of,
    small_symbols,
    zigzag,
)
from ckdiff.kernels.codegen.words import (
    fetch_lines,
    load_byte,
    load_word,
    lowest_one,
    ones,
    store_byte,
    store_word,
)

#: how far ahead memory is asked for: the processor by itself stops at every page
_AHEAD = 2048
_HEAD, _ROW = 8 * DELTA_HEAD, 8 * CLASS_COLUMNS
_EXTRA, _PENDING, _AT = 8 * DELTA_EXTRA, 8 * DELTA_PENDING, 8 * DELTA_AT
_LEAST, _BITS, _SYMBOLS = 8 * CLASS_LEAST, 8 * CLASS_BITS, 8 * CLASS_SYMBOLS
_CLASS_PENDING, _CLASS_AT, _TOTAL = 8 * CLASS_PENDING, 8 * CLASS_AT, 8 * CLASS_TOTAL


def parse(kind: str) -> tuple[str, bool]:
    """``16f portable`` -> (``16f``, True)."""
    name, _, variant = kind.partition(" ")
    return name, variant == "portable"


def split_kernel(kind: str) -> Callable[..., None]:
    """Appends the streams of some words; see the ABI. What is pending stays in the state."""
    name, portable = parse(kind)
    gather_bits, gather_bytes = moves(portable=portable)[0], moves(portable=portable)[2]
    of = Kind(name)
    size, stride, fine = of.bytes, LANES * of.bytes, of.fine
    fine_mask = (1 << fine) - 1

    def split(base: int, tuned: int, words: int, classes: int, state: int, scratch: int) -> None:
        one = types.uint64(1)
        extra = load_word(state + _EXTRA)
        pending = types.uint64(load_word(state + _PENDING))
        filled = load_word(state + _AT)
        for i in range(words):
            a = base + i * stride
            t = tuned + i * stride
            fetch_lines(a + _AHEAD, stride)
            fetch_lines(t + _AHEAD, stride)
            changed = differing(name, a, t)
            if changed:
                large = small_symbols(name, a, t, scratch) & changed
                while large:
                    lane = lowest_one(large)
                    large &= large - one
                    z = zigzag(name, a + lane * size, t + lane * size)
                    power = leading_one(z)
                    low = power - fine
                    symbol = ((power - SMALL_BITS) << fine) + types.int64(
                        (z >> types.uint64(low)) & types.uint64(fine_mask)
                    )
                    store_byte(scratch + lane, symbol + SMALL_STEPS)
                    while low > 0:  # up to 32 bits at a time, so that seven pending ones fit too
                        part = low
                        if part > 32:
                            part = 32
                        bits = z & ((one << types.uint64(part)) - one)
                        z >>= types.uint64(part)
                        low -= part
                        pending |= bits << types.uint64(filled)
                        filled += part
                        store_word(extra, pending)
                        extra += filled >> 3
                        pending >>= types.uint64(filled & ~7)
                        filled &= 7
            if classes == 1:
                row = state + _HEAD
                at = load_word(row + _CLASS_AT)
                store_word(load_word(row + _BITS) + (at >> 3), changed)
                store_word(row + _CLASS_AT, at + LANES)
                if changed:
                    symbols = load_word(row + _SYMBOLS)
                    gather_bytes(scratch, changed, symbols)
                    store_word(row + _SYMBOLS, symbols + ones(changed))
                continue
            rest = ~types.uint64(0)
            for c in range(classes):
                row = state + _HEAD + c * _ROW
                above = types.uint64(0)
                if c < classes - 1:
                    above = at_least(name, a, types.uint64(load_word(row + _ROW + _LEAST)))
                members = rest & ~above
                rest = above
                mine = changed & members
                count = ones(members)
                at = load_word(row + _CLASS_AT)
                shift = types.uint64(at & 63)
                bits = gather_bits(mine, members)
                held = types.uint64(load_word(row + _CLASS_PENDING)) | (bits << shift)
                # Whether that fills the word is anyone's guess, and a wrong one costs more than all
                # of this: it is written in any case, and what goes on is chosen without a branch.
                store_word(load_word(row + _BITS) + ((at >> 6) << 3), held)
                full = types.uint64(0) - types.uint64(((at & 63) + count) >> 6)
                # in two steps: a shift by 64 is not defined
                carried = (bits >> (types.uint64(63) - shift)) >> one
                store_word(row + _CLASS_PENDING, (carried & full) | (held & ~full))
                store_word(row + _CLASS_AT, at + count)
                symbols = load_word(row + _SYMBOLS)
                gather_bytes(scratch, mine, symbols)
                store_word(row + _SYMBOLS, symbols + ones(mine))
        store_word(state + _EXTRA, extra)
        store_word(state + _PENDING, pending)
        store_word(state + _AT, filled)

    return split


def merge_kernel(kind: str) -> Callable[..., int]:
    """Makes some words of the tuned side; see the ABI. Never reads outside of the streams."""
    name, portable = parse(kind)
    spread_bits, spread_bytes = moves(portable=portable)[1], moves(portable=portable)[3]
    of = Kind(name)
    size, stride, fine, width = of.bytes, LANES * of.bytes, of.fine, of.bits
    fine_mask = (1 << fine) - 1
    no_step = (1 << width) - 1

    def merge(
        base: int, out: int, words: int, classes: int, state: int, limit: int, scratch: int
    ) -> int:
        one = types.uint64(1)
        extra = load_word(state + _EXTRA)
        read = load_word(state + _AT)
        for i in range(words):
            a = base + i * stride
            o = out + i * stride
            fetch_lines(a + _AHEAD, stride)
            changed = types.uint64(0)
            rest = ~types.uint64(0)
            clear_bytes(scratch)  # so that a word need not wait for the one before
            for c in range(classes):
                row = state + _HEAD + c * _ROW
                above = types.uint64(0)
                if c < classes - 1:
                    above = at_least(name, a, types.uint64(load_word(row + _ROW + _LEAST)))
                members = rest & ~above
                rest = above
                count = ones(members)
                at = load_word(row + _CLASS_AT)
                if at + count > load_word(row + _TOTAL):
                    return 1
                store_word(row + _CLASS_AT, at + count)
                place = load_word(row + _BITS) + (at >> 3)
                shift = types.uint64(at & 7)
                bits = types.uint64(load_word(place)) >> shift
                bits |= (types.uint64(load_byte(place + 8)) << (types.uint64(63) - shift)) << one
                mine = spread_bits(bits, members)
                symbols = load_word(row + _SYMBOLS)
                spread_bytes(symbols, mine, scratch)
                store_word(row + _SYMBOLS, symbols + ones(mine))
                changed |= mine
            large = apply_symbols(name, a, scratch, changed, o)
            while large:
                lane = lowest_one(large)
                large &= large - one
                symbol = load_byte(scratch + lane) - SMALL_STEPS
                power = SMALL_BITS + (symbol >> fine)
                low = power - fine
                if power >= width or read + low > limit:
                    return 1
                z = (one << types.uint64(fine)) | types.uint64(symbol & fine_mask)
                z <<= types.uint64(low)
                done = 0
                while done < low:
                    part = low - done
                    if part > 32:
                        part = 32
                    bits = types.uint64(load_word(extra + (read >> 3)))
                    bits >>= types.uint64(read & 7)
                    bits &= (one << types.uint64(part)) - one
                    z |= bits << types.uint64(done)
                    read += part
                    done += part
                if z == no_step:
                    return 1
                apply_step(name, a + lane * size, z, o + lane * size)
        store_word(state + _AT, read)
        return 0

    return merge


def tally_kernel(kind: str) -> Callable[..., None]:
    """Counts elements and changed ones by magnitude, in some of the words; see the ABI."""
    of = Kind(kind)
    size, stride = of.bytes, LANES * of.bytes

    def tally(base: int, tuned: int, words: int, every: int, shift: int, out: int) -> None:
        i = 0
        while i < words:
            a = base + i * stride
            changed = differing(kind, a, tuned + i * stride)
            for lane in range(LANES):
                place = magnitude_of(kind, a + lane * size) >> types.uint64(shift)
                slot = out + 16 * types.int64(place)
                store_word(slot, load_word(slot) + 1)
                flag = types.int64((changed >> types.uint64(lane)) & types.uint64(1))
                store_word(slot + 8, load_word(slot + 8) + flag)
            i += every

    return tally
