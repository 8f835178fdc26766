"""What differs between two runs of bytes as zstd sequences: literals, then zeros that repeat one.

A zero is written before each run of zeros, which is then a match at distance one: the offset never
changes, and costs nothing in the entropy coder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import LANES, LEAST_ZEROS, RUNS_COLUMNS, SEQUENCE_BYTES
from ckdiff.kernels.codegen.lanes import I8, I32, I64, Value, vector
from ckdiff.kernels.codegen.words import load_byte, lowest_one, ones, store_byte, store_word


@intrinsic  # type: ignore[untyped-decorator]
def differing(typing: Any, base: Any, tuned: Any) -> Any:
    """Which of the 64 bytes at two addresses differ, as a uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        one, other = (
            b.load(b.inttoptr(address, vector(I8).as_pointer()), align=1) for address in args
        )
        return b.bitcast(b.icmp_unsigned("!=", one, other), I64)

    return types.uint64(types.int64, types.int64), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def differing_of(one: int, other: int, size: int) -> Any:
    """The same of the first ``size`` bytes, where there are fewer than LANES."""
    if size >= LANES:
        return differing(one, other)
    word = types.uint64(0)
    for i in range(size):
        if load_byte(one + i) != load_byte(other + i):
            word |= types.uint64(1) << types.uint64(i)
    return word


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _elements(typing: Any, width: Any, word: Any) -> Any:
    """How many elements of ``width`` bytes have a bit in a word of a bit for each byte."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        value, size, step = args[1], int(width.literal_value), 1
        while step < size:
            value = b.or_(value, b.lshr(value, I64(step)))
            step *= 2
        firsts = sum(1 << i for i in range(0, LANES, size))
        return b.ctpop(b.and_(value, I64(firsts)))

    return types.int64(width, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _four_zeros(typing: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(I32(0), b.inttoptr(args[0], I32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def runs_kernel(kind: str) -> Callable[..., None]:
    """Blocks of sequences of one window; the kind is the bytes of an element."""
    width = int(kind)

    def runs(
        base: int, tuned: int, size: int, block: int, literals: int, sequences: int, result: int
    ) -> None:
        to, sequence = types.int64(literals), types.int64(sequences)
        elements = changed = 0
        first = types.int64(0)
        while first < size:  # range() would ask whether the step is zero
            stop = first + block
            if stop > size:
                stop = types.int64(size)
            began, done = to, first  # the first literal of a sequence; the bytes that are written
            for at in range(first, stop, LANES):
                word = differing_of(base + at, tuned + at, stop - at)
                if word == 0:
                    continue
                elements += _elements(width, word)
                changed += ones(word)
                while word:
                    place = at + lowest_one(word)
                    word &= word - types.uint64(1)
                    zeros = place - done
                    _four_zeros(to)
                    if zeros >= LEAST_ZEROS:
                        to += 1
                        store_word(sequence, ((to - began) << 32) | 1)
                        store_word(sequence + 8, zeros - 1)
                        sequence += SEQUENCE_BYTES
                        began = to
                    else:
                        to += zeros
                    store_byte(to, load_byte(base + place) ^ load_byte(tuned + place))
                    to += 1
                    done = place + 1
            zeros = stop - done
            _four_zeros(to)
            if zeros >= LEAST_ZEROS:
                to += 1
                store_word(sequence, ((to - began) << 32) | 1)
                store_word(sequence + 8, zeros - 1)
                sequence += SEQUENCE_BYTES
                began = to
            else:
                to += zeros
            store_word(sequence, (to - began) << 32)  # of no match: the block ends here
            store_word(sequence + 8, 0)
            sequence += SEQUENCE_BYTES
            store_word(result, to - literals)
            store_word(result + 8, sequence - sequences)
            store_word(result + 16, elements)
            store_word(result + 24, changed)
            result += 8 * RUNS_COLUMNS
            first = stop

    return runs
