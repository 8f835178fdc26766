"""Set algebra on masks: several masks in, one mask and its counts out, a vector at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import SEGMENT_COLUMNS
from ckdiff.kernels.codegen.lanes import I64, Value
from ckdiff.kernels.codegen.vectors import (
    BYTES,
    VECTOR,
    add_ballots,
    add_up,
    constant,
    count_ones,
    listed_mask,
)
from ckdiff.kernels.codegen.words import load_word, store_word


def _at_least(
    b: Any, planes: int, table: Value, masks: Value, threshold: Value, at: Value
) -> Value:
    """Lanes with at least ``threshold`` votes; ``masks`` are fewer than 2**planes."""
    digits = [cgutils.alloca_once(b, VECTOR) for _ in range(planes)]
    add_ballots(b, digits, table, masks, at)
    more, same = constant(0), constant(-1)  # than the threshold, in the digits looked at so far
    for p in reversed(range(planes)):
        digit = b.load(digits[p])
        bit = b.trunc(b.lshr(threshold, I64(p)), ir.IntType(1))
        more = b.select(bit, more, b.or_(more, b.and_(same, digit)))
        same = b.and_(same, b.select(bit, digit, b.xor(digit, constant(-1))))
    return b.or_(more, same)


def _fold(b: Any, operation: str, table: Value, masks: Value, at: Value) -> Value:
    """``difference``: the first mask without all others; ``odd``: an odd number of votes."""
    rest = cgutils.alloca_once_value(b, constant(0))
    b.store(constant(0), rest)
    with cgutils.for_range(b, b.sub(masks, I64(1))) as loop:
        mask = listed_mask(b, table, b.add(loop.index, I64(1)), at)
        join = b.xor if operation == "odd" else b.or_
        b.store(join(b.load(rest), mask), rest)
    first, others = listed_mask(b, table, I64(0), at), b.load(rest)
    if operation == "odd":
        return b.xor(first, others)
    return b.and_(first, b.xor(others, constant(-1)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _combine(
    typing: Any, kind: Any, table: Any, masks: Any, threshold: Any, size: Any, to: Any
) -> Any:
    """Write the combination of ``size`` bytes to ``to``; gives its population count."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, table, masks, threshold, size, to = args
        operation, _, planes = kind.literal_value.partition(":")
        counts = cgutils.alloca_once_value(b, constant(0))
        b.store(constant(0), counts)
        with cgutils.for_range(b, b.udiv(size, I64(BYTES))) as loop:
            at = b.mul(loop.index, I64(BYTES))
            if operation == "at-least":
                found = _at_least(b, int(planes), table, masks, threshold, at)
            else:
                found = _fold(b, operation, table, masks, at)
            b.store(found, b.inttoptr(b.add(to, at), VECTOR.as_pointer()), align=1)
            b.store(b.add(b.load(counts), count_ones(b, found)), counts)
        return add_up(b, b.load(counts))

    sig = types.int64(kind, types.int64, types.int64, types.int64, types.int64, types.int64)
    return sig, generate


def combine_kernel(kind: str) -> Callable[..., None]:
    """One operation over segments. Kinds: ``difference``, ``odd``, ``at-least:PLANES``."""

    def combine(segments: int, count: int, stores: int, threshold: int, counts: int) -> None:
        for s in range(count):
            at = segments + s * 8 * (SEGMENT_COLUMNS + stores)
            size, row, to = load_word(at), load_word(at + 8), load_word(at + 16)
            table = at + 8 * SEGMENT_COLUMNS
            slot = counts + 8 * row
            found = _combine(kind, table, stores, threshold, size, to)
            store_word(slot, load_word(slot) + found)

    return combine
