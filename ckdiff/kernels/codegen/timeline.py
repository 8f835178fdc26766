"""A run over time: checkpoints side by side, each against the first and against the one before.

A block of all sides stays in the core's cache, so that each checkpoint is read from memory once
however many comparisons it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import (
    LANES,
    MARCH_ELEMENTS,
    MARCH_HEAD,
    MARCH_PAIR,
    MARCH_POSITION,
    MARCH_ROW,
    MARCH_SIDE,
    MARCH_STEP,
    MARCH_UNIT,
    SCRATCH_BYTES,
    SLOT_BITS,
    SLOT_RULES,
)
from ckdiff.kernels.codegen.drive import call_compare
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.hashing import call_xxh3, weight
from ckdiff.kernels.codegen.lanes import (
    I1,
    I64,
    VOID,
    Value,
    call_at,
    int_type,
    splat,
    spread,
    vector,
)
from ckdiff.kernels.codegen.words import copy_byte, fetch_lines, load_word, store_word
from ckdiff.kernels.hashing import UNIT


def march_kernel() -> Callable[..., None]:
    """Compares and hashes the sides of a window's segments; see the ABI."""

    def march(
        segments: int, segment_count: int, columns: int, slots: int, slot_columns: int, sides: int,
        rules: int, masks: int, firsts: int, nexts: int, hashes: int, xxh3: int, scratch: int,
        sweeps: int,
    ) -> None:  # fmt: skip
        mode = enter_default_mode()
        other = scratch + SCRATCH_BYTES // 2
        aside = scratch + SCRATCH_BYTES
        walk = aside + MARCH_STEP // 8
        steps = sides - 1  # pairs of the first side and another; then those of neighbours
        for s in range(segment_count):
            at = segments + s * (8 * columns)
            left = load_word(at + 8 * MARCH_ELEMENTS)
            position = load_word(at + 8 * MARCH_POSITION)
            unit = load_word(at + 8 * MARCH_UNIT)
            row = load_word(at + 8 * MARCH_ROW)
            table = at + 8 * MARCH_HEAD
            pairs = table + 8 * MARCH_SIDE * sides
            sweep = load_word(sweeps + 8 * s)
            store_word(walk, table)
            store_word(walk + 8 * 3, steps)
            store_word(walk + 8 * 4, masks)
            store_word(walk + 8 * 6, firsts + 8 * row * steps)
            store_word(walk + 8 * 7, nexts + 8 * row * (steps - 1))
            begun = 0
            while left > 0:
                elements = MARCH_STEP - position % MARCH_STEP
                if elements > left:
                    elements = left
                words = elements // LANES
                ragged = elements - words * LANES
                if sweep != 0:
                    store_word(walk + 8, begun * load_word(table + 8) // 8)
                    store_word(walk + 8 * 2, words)
                    store_word(walk + 8 * 5, position // 8)
                    call_sweep(sweep, walk)
                pairs_left = 2 * steps - 1 if sweep == 0 or ragged else 0
                for p in range(pairs_left):
                    entry = pairs + 8 * MARCH_PAIR * p
                    slot = slots + load_word(entry + 16) * (8 * slot_columns)
                    bits = load_word(slot + 8 * SLOT_BITS)
                    x = load_word(entry) + begun * bits // 8
                    y = load_word(entry + 8) + begun * bits // 8
                    whole = words * LANES * bits // 8
                    if ragged:
                        for i in range(elements * bits // 8 - whole):
                            copy_byte(scratch + i, x + whole + i)
                            copy_byte(other + i, y + whole + i)
                    first = rules - 1 if p >= steps else 0
                    for r in range(first, rules):
                        kernel = load_word(slot + 8 * (SLOT_RULES + 2 * r))
                        parameter = types.uint64(load_word(slot + 8 * (SLOT_RULES + 2 * r + 1)))
                        if p >= steps:
                            mask = aside
                            total = nexts + 8 * (row * (steps - 1) + p - steps)
                        else:
                            mask = load_word(masks + 8 * (p * rules + r)) + position // 8
                            total = firsts + 8 * ((row * steps + p) * rules + r)
                        changed = 0
                        if sweep == 0:
                            changed = call_compare(kernel, x, y, words, parameter, mask)
                        if ragged:
                            changed += call_compare(
                                kernel, scratch, other, 1, parameter, mask + 8 * words
                            )
                        store_word(total, load_word(total) + changed)
                    if ragged:
                        for i in range(SCRATCH_BYTES // 8):
                            store_word(scratch + 8 * i, 0)
                if hashes != 0:
                    done = 0
                    while done < elements:
                        size = elements - done
                        if size > UNIT:
                            size = UNIT
                        factor = weight(types.uint64(unit))
                        digest = (types.uint64(0), types.uint64(0))
                        first_digest = digest
                        for side in range(sides):
                            entry = table + 8 * MARCH_SIDE * side
                            bits = load_word(entry + 8)
                            source = load_word(entry) + (begun + done) * bits // 8
                            nbytes = size * bits // 8
                            # while this unit is hashed, memory delivers the next block
                            fetch_lines(source + MARCH_STEP * bits // 8, nbytes)
                            differs = types.int64(1)
                            if side > 0:
                                pair = pairs + 8 * MARCH_PAIR * (side - 1)
                                as_stored = load_word(pair) == load_word(table)
                                if as_stored and load_word(pair + 8) == load_word(entry):
                                    # the exact mask of a unit is 8 words; all zero means the
                                    # same bytes
                                    exact = load_word(masks + 8 * (side - 1) * rules)
                                    exact += (position + done) // 8
                                    differs = types.int64(0)
                                    for i in range(UNIT // LANES):
                                        differs |= load_word(exact + 8 * i)
                            if differs != 0:
                                digest = call_xxh3(xxh3, source, nbytes)
                            else:
                                digest = first_digest
                            if side == 0:
                                first_digest = digest
                            sums = hashes + 16 * (row * sides + side)
                            low = load_word(sums) + types.int64(digest[0] * factor)
                            high = load_word(sums + 8) + types.int64(digest[1] * factor)
                            store_word(sums, low)
                            store_word(sums + 8, high)
                        done += size
                        unit += 1
                position += elements
                begun += elements
                left -= elements
        leave_default_mode(mode)

    return march


@intrinsic  # type: ignore[untyped-decorator]
def call_sweep(typing: Any, function: Any, walk: Any) -> Any:
    """Call a sweep that is at an address."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _moves_words(
    typing: Any, kind: Any, masks: Any, steps: Any, at: Any, words: Any, out: Any, counts: Any
) -> Any:
    """One segment of ``moves``: ``words`` mask words from byte ``at`` of each mask on."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, masks, steps, at, words, out, counts = args
        bits = int(kind.literal_value)
        lane = int_type(bits or 8)
        slot = I64.as_pointer()
        last = b.load(b.inttoptr(b.add(masks, b.mul(b.sub(steps, I64(1)), I64(8))), slot))
        ever, found = cgutils.alloca_once(b, I64), cgutils.alloca_once(b, vector(lane))

        def add(index: Value, word: Value) -> None:
            total = b.inttoptr(b.add(counts, b.mul(index, I64(8))), slot)
            b.store(b.add(b.load(total, align=8), b.ctpop(word)), total, align=8)

        with cgutils.for_range(b, words) as loop:
            here = b.add(at, b.mul(loop.index, I64(8)))
            final = b.load(b.inttoptr(b.add(last, here), slot), align=1)
            b.store(I64(0), ever)
            b.store(splat(lane, 0), found)
            with cgutils.for_range(b, steps) as step:
                mask = b.load(b.inttoptr(b.add(masks, b.mul(step.index, I64(8))), slot))
                word = b.load(b.inttoptr(b.add(mask, here), slot), align=1)
                before = b.load(ever)
                b.store(b.or_(before, word), ever)
                add(step.index, b.and_(word, final))
                if bits:
                    new = b.bitcast(b.and_(word, b.not_(before)), vector(I1))
                    number = b.trunc(b.add(step.index, I64(1)), lane)
                    b.store(b.select(new, spread(b, number), b.load(found)), found)
            add(steps, b.load(ever))
            if bits:
                to = b.add(out, b.mul(loop.index, I64(LANES * bits // 8)))
                b.store(b.load(found), b.inttoptr(to, vector(lane).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 6), generate


def moves_kernel(kind: str) -> Callable[..., None]:
    """What masks of many steps add up to. Kinds: bits of a number of a step, or 0 for none."""
    width = int(kind)

    def moves(
        segments: int, segment_count: int, columns: int, masks: int, steps: int, out: int,
        counts: int,
    ) -> None:  # fmt: skip
        for s in range(segment_count):
            at = segments + s * (8 * columns)
            elements = load_word(at + 8 * MARCH_ELEMENTS)
            position = load_word(at + 8 * MARCH_POSITION)
            row = load_word(at + 8 * MARCH_ROW)
            words = (elements + LANES - 1) // LANES
            _moves_words(
                kind, masks, steps, position // 8, words, out + position * width // 8,
                counts + 8 * row * (steps + 1),
            )  # fmt: skip

    return moves
