"""Counting agreement: intersections of all pairs of masks, and how many masks hold each element.

Masks are cut into pieces that stay in the first-level cache while every pair is counted. Votes are
counted without unpacking: each vector of mask words is added to a number of one bit per *plane*
(plane p holds bit p of every lane's count), and the lanes with exactly j votes are those whose
planes spell j.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import AGREE_PIECE, SEGMENT_COLUMNS
from ckdiff.kernels.codegen.lanes import I64, Value
from ckdiff.kernels.codegen.vectors import (
    BYTES,
    VECTOR,
    add_ballots,
    add_up,
    constant,
    count_ones,
    load_vector,
)
from ckdiff.kernels.codegen.words import load_word, store_word

_UNROLL = 4


@intrinsic  # type: ignore[untyped-decorator]
def ones_in_both(typing: Any, one: Any, other: Any, size: Any) -> Any:
    """Population count of the AND of ``size`` bytes, a multiple of 64, at two addresses."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        one, other, size = args
        sums = [cgutils.alloca_once_value(b, constant(0)) for _ in range(_UNROLL)]

        def add(at: Value, which: int) -> None:
            both = b.and_(load_vector(b, b.add(one, at)), load_vector(b, b.add(other, at)))
            b.store(b.add(b.load(sums[which]), count_ones(b, both)), sums[which])

        rounds = b.udiv(size, I64(BYTES * _UNROLL))
        with cgutils.for_range(b, rounds) as loop:
            at = b.mul(loop.index, I64(BYTES * _UNROLL))
            for i in range(_UNROLL):
                add(b.add(at, I64(BYTES * i)), i)
        done = b.mul(rounds, I64(BYTES * _UNROLL))
        with cgutils.for_range(b, b.udiv(b.sub(size, done), I64(BYTES))) as loop:
            add(b.add(done, b.mul(loop.index, I64(BYTES))), 0)
        total = b.load(sums[0])
        for other_sum in sums[1:]:
            total = b.add(total, b.load(other_sum))
        return add_up(b, total)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_votes(typing: Any, planes: Any, table: Any, masks: Any, size: Any, votes: Any) -> Any:
    """Add to ``votes[j]``, j >= 1, the elements that exactly j masks hold.

    ``table`` holds the addresses of ``masks`` masks of ``size`` bytes, a multiple of 64; they must
    be fewer than 2**planes.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        count = planes.literal_value
        _, table, masks, size, votes = args
        counts = [cgutils.alloca_once_value(b, constant(0)) for _ in range(1 << count)]
        digits = [cgutils.alloca_once(b, VECTOR) for _ in range(count)]
        for slot in counts:
            b.store(constant(0), slot)
        with cgutils.for_range(b, b.udiv(size, I64(BYTES))) as position:
            at = b.mul(position.index, I64(BYTES))
            add_ballots(b, digits, table, masks, at)
            # the lanes of each number of votes, by halving: digits from the highest down
            sets = {0: constant(-1)}
            for p in reversed(range(count)):
                digit = b.load(digits[p])
                absent = b.xor(digit, constant(-1))
                sets = {
                    number: b.and_(lanes, part)
                    for prefix, lanes in sets.items()
                    for number, part in ((2 * prefix, absent), (2 * prefix + 1, digit))
                }
            for number, lanes in sets.items():
                if number:
                    b.store(b.add(b.load(counts[number]), count_ones(b, lanes)), counts[number])
        for number in range(1, 1 << count):
            # slots beyond the number of masks do not exist
            with b.if_then(b.icmp_unsigned("<=", I64(number), masks)):
                slot = b.inttoptr(b.add(votes, I64(8 * number)), I64.as_pointer())
                b.store(b.add(b.load(slot), add_up(b, b.load(counts[number]))), slot)
        return context.get_dummy_value()

    sig = types.void(planes, types.int64, types.int64, types.int64, types.int64)
    return sig, generate


def agree_kernel(kind: str) -> Callable[..., None]:
    """Counts of pairs and votes for fewer than 2**kind masks; see the ABI."""
    planes = int(kind)

    def agree(segments: int, count: int, stores: int, pairs: int, votes: int, scratch: int) -> None:
        triangle = stores * (stores + 1) // 2
        for s in range(count):
            at = segments + s * 8 * (SEGMENT_COLUMNS + stores)
            size = load_word(at)
            row = load_word(at + 8)
            out = pairs + 8 * row * triangle
            tally = votes + 8 * row * (stores + 1)
            addresses = at + 8 * SEGMENT_COLUMNS
            done = 0
            while done < size:
                step = size - done
                if step > AGREE_PIECE:
                    step = AGREE_PIECE
                # masks without a bit here take no part: most of a sparse run is empty
                present = 0
                total = 0
                for i in range(stores):
                    mask = load_word(addresses + 8 * i) + done
                    ones = ones_in_both(mask, mask, step)
                    if ones:
                        store_word(scratch + 8 * present, mask)
                        store_word(scratch + 8 * (stores + present), i)
                        present += 1
                        total += ones
                        slot = out + 8 * (i * stores - i * (i - 1) // 2)
                        store_word(slot, load_word(slot) + ones)
                shared = 0
                for x in range(present):
                    mask = load_word(scratch + 8 * x)
                    i = load_word(scratch + 8 * (stores + x))
                    line = out + 8 * (i * stores - i * (i - 1) // 2 - i)
                    for y in range(x + 1, present):
                        ones = ones_in_both(mask, load_word(scratch + 8 * y), step)
                        if ones:
                            slot = line + 8 * load_word(scratch + 8 * (stores + y))
                            store_word(slot, load_word(slot) + ones)
                            shared += ones
                if shared == 0:  # no element has more than one vote
                    store_word(tally + 8, load_word(tally + 8) + total)
                elif present == 2:
                    store_word(tally + 8, load_word(tally + 8) + total - 2 * shared)
                    store_word(tally + 16, load_word(tally + 16) + shared)
                else:
                    add_votes(planes, scratch, present, step, tally)
                done += step

    return agree
