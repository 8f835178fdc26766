"""F4 that lies turned, by value: rows of bytes are two rows of values, the low halves first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import (
    RECIPE_SCALES,
    RECIPE_SOURCE,
    WALK_COLUMN,
    WALK_ROW,
    WALK_WIDTH,
)
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.lanes import F32, I8, I32, Value, as_many, in_each
from ckdiff.kernels.codegen.scaling import (
    WORD,
    copy_bytes,
    four_bits,
    room_aside,
    store_product,
    vector_at,
    whole_words,
)
from ckdiff.kernels.codegen.words import load_word, store_word


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_half(typing: Any, high: Any, source: Any, powers: Any, out: Any) -> Any:
    """Multiply F4 that are one half of as many bytes, the high ones or the low ones."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pairs = b.load(vector_at(b, args[1], I8), align=1)
        powers = b.load(vector_at(b, args[2], F32), align=1)
        wide = b.zext(pairs, as_many(pairs, I32))
        bits = b.lshr(wide, in_each(wide, I32, 4 * int(high.literal_value)))
        store_product(b, four_bits(b, bits), powers, args[3], exact=True)
        return context.get_dummy_value()

    return types.void(high, types.int64, types.int64, types.int64), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _multiply_row(
    high: int, here: tuple[int, int], out: int, count: int, left: int, aside: int
) -> None:
    """One half of a row of pairs, or some of it. ``high`` is 0 or 1."""
    pairs, powers = here
    words = whole_words(count, left)
    for i in range(words + (words * WORD < count)):
        to = out + i * (4 * WORD)
        if i == words:
            to = aside
        if high:
            _multiply_half(1, pairs + i * WORD, powers + 4 * i * WORD, to)
        else:
            _multiply_half(0, pairs + i * WORD, powers + 4 * i * WORD, to)
    if words * WORD < count:
        copy_bytes(out + words * (4 * WORD), aside, 4 * (count - words * WORD))


def halves_kernel() -> Callable[[int, int, int], None]:
    """Multiplies F4 whose rows are halves of rows of bytes; see the ABI."""

    def halves(recipe: int, out: int, elements: int) -> None:
        mode, aside = enter_default_mode(), room_aside()
        pairs, powers = load_word(recipe + 8 * RECIPE_SOURCE), load_word(recipe + 8 * RECIPE_SCALES)
        columns = load_word(recipe + 8 * WALK_WIDTH)
        column, row = load_word(recipe + 8 * WALK_COLUMN), load_word(recipe + 8 * WALK_ROW)
        while elements > 0:
            run = columns - column
            if run > elements:
                run = elements
            at = (row >> 5) * columns + column
            here = pairs + (row >> 1) * columns + column, powers + 4 * at
            _multiply_row(row & 1, here, out, run, elements, aside)
            column += run
            if column == columns:
                column = 0
                row += 1
            out += 4 * run
            elements -= run
        store_word(recipe + 8 * WALK_COLUMN, column)
        store_word(recipe + 8 * WALK_ROW, row)
        leave_default_mode(mode)

    return halves
