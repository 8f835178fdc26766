"""The driver: one call walks all segments of a window, block by block, with the GIL released.

A block is small enough to stay in the core's cache, so that hashing, several rules and the
statistics each read it from there and the memory is read once. Values that are made are more than
what they are made of: of these a block is small enough for the first-level cache, and whole units
are compared and hashed in one pass (:mod:`ckdiff.kernels.codegen.units`); so are short rows
that follow each other in memory. Floats that are widened are made values too, but what is hashed of
such a pair is what is stored, of both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import (
    BLOCK,
    LANES,
    MADE,
    RECIPE_FIELDS,
    RECIPE_LEFT,
    RECIPE_MAKER,
    RECIPE_ROOM,
    RECIPE_SOURCE,
    RECIPE_STORED,
    RECIPE_UNITS,
    SCRATCH_BYTES,
    SEG_BASE,
    SEG_COLUMNS,
    SEG_ELEMENTS,
    SEG_POSITION,
    SEG_ROW,
    SEG_SLOT,
    SEG_TUNED,
    SEG_UNIT,
    SLOT_BITS,
    SLOT_RULES,
    SLOT_STATISTICS,
    SLOT_UNITS,
    WALK_IN_COLUMN,
)  # fmt: skip
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.hashing import add_units, call_xxh3, weight
from ckdiff.kernels.codegen.lanes import I64, VOID, Value, call_at
from ckdiff.kernels.codegen.words import copy_byte, fetch_lines, load_word, store_word
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.statistics import COLUMNS


@intrinsic  # type: ignore[untyped-decorator]
def call_compare(
    typing: Any, function: Any, base: Any, tuned: Any, words: Any, parameter: Any, mask: Any
) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return call_at(b, I64, args[0], args[1:])

    return types.int64(*[types.int64] * 4, types.uint64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_statistics(typing: Any, function: Any, base: Any, tuned: Any, words: Any, row: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_maker(typing: Any, function: Any, recipe: Any, out: Any, elements: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_units(typing: Any, function: Any, sides: Any, units: Any, mask: Any, sums: Any) -> Any:
    """``sides`` are two addresses, and ``units`` how many and the first of them."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pairs = [b.extract_value(pair, i) for pair in args[1:3] for i in range(2)]
        return call_at(b, I64, args[0], [*pairs, *args[3:]])

    pair = types.UniTuple(types.int64, 2)  # type: ignore[attr-defined]
    return types.int64(types.int64, pair, pair, types.int64, types.int64), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def make(recipe: int, out: int, elements: int) -> int:
    """Have the next values of a span written, unless they are there; gives the recipe of those that
    follow.
    """
    while elements > 0:
        left = load_word(recipe + 8 * RECIPE_LEFT)
        some = left
        if some > elements:
            some = elements
        maker = load_word(recipe + 8 * RECIPE_MAKER)
        if maker != 0:
            call_maker(maker, recipe, out, some)
        store_word(recipe + 8 * RECIPE_LEFT, left - some)
        out += 4 * some
        elements -= some
        if some == left:
            recipe += 8 * RECIPE_FIELDS
    return recipe


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def comparable(base: int, tuned: int, elements: int) -> int:
    """How many of the next elements, whole units, something compares without making them."""
    found = load_word(base + 8 * RECIPE_UNITS)
    if (
        found == 0
        or load_word(tuned + 8 * RECIPE_UNITS) != found
        or load_word(base + 8 * WALK_IN_COLUMN) != 0
        or load_word(tuned + 8 * WALK_IN_COLUMN) != 0
    ):
        elements = 0
    for recipe in (base, tuned):
        left = load_word(recipe + 8 * RECIPE_LEFT)
        if left < elements:
            elements = left
    return elements // UNIT * UNIT


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def compared(recipe: int, elements: int) -> int:
    """Of a recipe's values so many are done; gives the recipe of those that follow."""
    left = load_word(recipe + 8 * RECIPE_LEFT) - elements
    store_word(recipe + 8 * RECIPE_LEFT, left)
    if left == 0:
        recipe += 8 * RECIPE_FIELDS
    return recipe


#: segments of a few elements are over before memory has delivered the next: it is asked for what
#: so many further on need
_FEW, _AHEAD = 1 << 13, 8
_GAP = 1 << 8  # bytes between rows that memory delivers in one go


def drive_kernel() -> Callable[..., None]:
    """The driver as a Python function; compiled by :mod:`ckdiff.kernels.codegen`."""

    def drive(
        segments: int, segment_count: int, slots: int, slot_columns: int, rules: int, masks: int,
        counts: int, hashes: int, xxh3: int, statistics: int, scratch: int,
    ) -> None:  # fmt: skip
        mode = enter_default_mode()
        last = segments + (segment_count - 1) * (8 * SEG_COLUMNS)
        for s in range(segment_count):
            at = segments + s * (8 * SEG_COLUMNS)
            base_at = load_word(at + 8 * SEG_BASE)
            tuned_at = load_word(at + 8 * SEG_TUNED)
            left = load_word(at + 8 * SEG_ELEMENTS)
            position = load_word(at + 8 * SEG_POSITION)
            slot = slots + load_word(at + 8 * SEG_SLOT) * (8 * slot_columns)
            unit = load_word(at + 8 * SEG_UNIT)
            row = load_word(at + 8 * SEG_ROW)
            bits = load_word(slot + 8 * SLOT_BITS)
            add_statistics = load_word(slot + 8 * SLOT_STATISTICS)
            step = BLOCK
            units, stored = types.int64(0), types.int64(0)
            if left <= _FEW and left % UNIT == 0 and hashes != 0 and rules > 0 and at < last:
                size, after = left * bits // 8, at + 8 * SEG_COLUMNS
                base_gap = load_word(after + 8 * SEG_BASE) - base_at - size
                tuned_gap = load_word(after + 8 * SEG_TUNED) - tuned_at - size
                # what goes on right behind it comes by itself
                if base_gap >= 0 and base_gap <= _GAP and tuned_gap >= 0 and tuned_gap <= _GAP:
                    units = load_word(slot + 8 * SLOT_UNITS)
            if base_at < 0 or tuned_at < 0:
                if statistics == 0 or add_statistics == 0:  # sums of blocks are rounded
                    step = MADE
                if hashes != 0 and rules > 0:
                    units = load_word(slot + 8 * SLOT_UNITS)
                if base_at < 0:
                    stored |= load_word(-base_at + 8 * RECIPE_STORED)
                if tuned_at < 0:
                    stored |= load_word(-tuned_at + 8 * RECIPE_STORED)
            alone = units != 0 and rules == 1 and step == MADE  # nobody else looks at the values
            while left > 0:
                elements = step - (position & (step - 1))
                if (
                    elements > left
                ):  # not min(): numba implements it with an iterator that can raise
                    elements = left
                both = types.int64(0)
                if alone and base_at < 0 and tuned_at < 0:
                    some = BLOCK - (position & (BLOCK - 1))  # nothing has to stay in a cache
                    if some > left:
                        some = left
                    some = comparable(-base_at, -tuned_at, some)
                    if some > 0:
                        both, elements = load_word(-base_at + 8 * RECIPE_UNITS), some
                block_bytes = elements * bits // 8
                base, tuned = base_at, tuned_at
                base_stored, tuned_stored, base_bits, tuned_bits = base, tuned, bits, bits
                for side in range(2):
                    recipe = -(tuned_at if side else base_at)
                    if both != 0:
                        recipe = compared(recipe, elements)
                        if side:
                            tuned_at = -recipe
                        else:
                            base_at = -recipe
                    elif recipe > 0:
                        values = load_word(recipe + 8 * RECIPE_ROOM)
                        hashed, hashed_bits = values, load_word(recipe + 8 * RECIPE_STORED)
                        if hashed_bits != 0:
                            hashed = load_word(recipe + 8 * RECIPE_SOURCE)
                        else:
                            hashed_bits = bits
                        if load_word(recipe + 8 * RECIPE_MAKER) == 0:
                            values = hashed
                            store_word(recipe + 8 * RECIPE_SOURCE, hashed + block_bytes)
                        recipe = make(recipe, values, elements)
                        if side:
                            tuned, tuned_at = values, -recipe
                            tuned_stored, tuned_bits = hashed, hashed_bits
                        else:
                            base, base_at = values, -recipe
                            base_stored, base_bits = hashed, hashed_bits
                    elif side:
                        tuned_at += block_bytes
                    else:
                        base_at += block_bytes
                words = elements // LANES
                whole = words * LANES * bits // 8
                ragged = elements - words * LANES
                if ragged:
                    for side in range(2):
                        source = (tuned if side else base) + whole
                        target = scratch + side * (SCRATCH_BYTES // 2)
                        for i in range(block_bytes - whole):
                            copy_byte(target + i, source + i)
                other = scratch + SCRATCH_BYTES // 2
                together = both != 0 or (units != 0 and stored == 0 and elements % UNIT == 0)
                if together:
                    mask = load_word(masks) + position // 8
                    units_here = elements // UNIT, unit
                    kernel, sides = units, (base, tuned)
                    if both != 0:
                        kernel, sides = both, (-base, -tuned)
                    changed = call_units(kernel, sides, units_here, mask, hashes + row * 32)
                    total = counts + row * rules * 8
                    store_word(total, load_word(total) + changed)
                for r in range(1 if together else 0, rules):
                    kernel = load_word(slot + 8 * (SLOT_RULES + 2 * r))
                    parameter = types.uint64(load_word(slot + 8 * (SLOT_RULES + 2 * r + 1)))
                    mask = load_word(masks + 8 * r) + position // 8
                    changed = call_compare(kernel, base, tuned, words, parameter, mask)
                    if ragged:
                        changed += call_compare(
                            kernel, scratch, other, 1, parameter, mask + 8 * words
                        )
                    total = counts + (row * rules + r) * 8
                    store_word(total, load_word(total) + changed)
                if hashes != 0 and stored != 0 and not together:
                    for side in range(2):
                        data = tuned_stored if side else base_stored
                        own = tuned_bits if side else base_bits
                        size, sums = elements * own // 8, hashes + row * 32 + side * 16
                        add_units(data, size, unit, UNIT * own // 8, sums, xxh3)
                elif hashes != 0 and not together:
                    unit_bytes = UNIT * bits // 8
                    sums = hashes + row * 32
                    base_low, base_high = load_word(sums), load_word(sums + 8)
                    tuned_low, tuned_high = load_word(sums + 16), load_word(sums + 24)
                    exact = load_word(masks) + position // 8
                    # While a unit is hashed from cache, memory delivers the next block, be it of
                    # another segment: rows that lie apart are as many segments.
                    next_base, next_tuned = base_at, tuned_at
                    if elements == left:
                        few = load_word(at + 8 * SEG_ELEMENTS) <= _FEW
                        later = at + (_AHEAD if few else 1) * (8 * SEG_COLUMNS)
                        if later > last:
                            later = last
                        next_base = load_word(later + 8 * SEG_BASE)
                        next_tuned = load_word(later + 8 * SEG_TUNED)
                    done = 0
                    u = unit
                    while done < block_bytes:
                        size = block_bytes - done
                        if size > unit_bytes:
                            size = unit_bytes
                        if next_base > 0:
                            fetch_lines(next_base + done, size)
                        if next_tuned > 0:
                            fetch_lines(next_tuned + done, size)
                        factor = weight(types.uint64(u))
                        digest = call_xxh3(xxh3, base + done, size)
                        base_low += types.int64(digest[0] * factor)
                        base_high += types.int64(digest[1] * factor)
                        # the exact mask of a unit is 8 words; all zero means the same bytes
                        differs = types.int64(0)
                        for i in range(UNIT // LANES):
                            differs |= load_word(exact + 8 * i)
                        if differs != 0:
                            digest = call_xxh3(xxh3, tuned + done, size)
                        tuned_low += types.int64(digest[0] * factor)
                        tuned_high += types.int64(digest[1] * factor)
                        exact += UNIT // 8
                        done += size
                        u += 1
                    store_word(sums, base_low)
                    store_word(sums + 8, base_high)
                    store_word(sums + 16, tuned_low)
                    store_word(sums + 24, tuned_high)
                if statistics != 0 and add_statistics != 0:
                    out = statistics + row * (8 * COLUMNS)
                    call_statistics(add_statistics, base, tuned, words, out)
                    if ragged:
                        call_statistics(add_statistics, scratch, other, 1, out)
                if ragged:
                    for i in range(SCRATCH_BYTES // 8):
                        store_word(scratch + 8 * i, 0)
                unit += elements // UNIT
                position += elements
                left -= elements
        leave_default_mode(mode)

    return drive
