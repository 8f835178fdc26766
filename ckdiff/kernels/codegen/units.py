"""Whole units of both sides, compared and hashed in one pass: values that were made just now, and
short rows.

F4 of both sides are made in registers, stripe by stripe, and are never written anywhere; nor are
floats that are widened to those of the other side (:mod:`ckdiff.kernels.codegen.stripes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import (
    RECIPE_MAKER,
    RECIPE_SCALES,
    RECIPE_SOURCE,
    RECIPE_STORED,
    WALK_COLUMN,
    WALK_ROW,
    WALK_SCALE,
    WALK_WIDTH,
)
from ckdiff.kernels.codegen.drive import call_maker
from ckdiff.kernels.codegen.hashing import weight
from ckdiff.kernels.codegen.lanes import I8, I64, Value
from ckdiff.kernels.codegen.scaling import WORD
from ckdiff.kernels.codegen.stripes import (
    LEFT,
    STRIPE,
    WIDTHS,
    Place,
    compare_units,
    digests_of,
    pair_of,
)
from ckdiff.kernels.codegen.words import fetch_lines, load_word, store_word
from ckdiff.kernels.hashing import UNIT

_BYTES = 4 * UNIT
_BATCH = 8  # units
_ROOM = LEFT + STRIPE  # bytes: what is left of a unit, and its number
_AHEAD = 1 << 10  # bytes that are asked of memory before their turn
_FURTHER = 2  # units of floats that are


@intrinsic  # type: ignore[untyped-decorator]
def _rooms(typing: Any) -> Any:
    """The addresses of room for a unit of each side, which are this call's own."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        with b.goto_entry_block():  # cgutils would fill it with zeros
            room = b.alloca(ir.ArrayType(I8, 2 * _BYTES + _BATCH * _ROOM))
        room.align = STRIPE
        first = b.ptrtoint(room, I64)
        rooms = [first, b.add(first, I64(_BYTES)), b.add(first, I64(2 * _BYTES))]
        return context.make_tuple(b, signature.return_type, rooms)

    three = types.UniTuple(types.int64, 3)  # type: ignore[attr-defined]
    return three(), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _add_digest(sums: int, digests: tuple[int, int, int, int], unit: int, turned: int = 0) -> None:
    """``turned`` is 2 where the first side is the tuned one, or 0."""
    factor = weight(types.uint64(unit))
    for i in range(4):
        at = sums + 8 * (i ^ turned)
        store_word(at, load_word(at) + types.int64(digests[i] * factor))


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _add(sums: int, left: int, units: int) -> None:
    """Add the digests of some units of float32, whose numbers are written with what is left."""
    for u in range(units):
        here = left + u * _ROOM
        _add_digest(sums, digests_of("", here), load_word(here + LEFT))


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _least(a: int, b: int) -> int:
    return a if a < b else b


def _of_elements(kind: str) -> Callable[..., int]:
    size = UNIT * WIDTHS.get(kind, 4)

    def of_elements(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
        left, changed = _rooms()[2], 0
        for begin in range(0, count, _BATCH):
            some = _least(count - begin, _BATCH)
            for u in range(some):
                i = begin + u
                x, y = (base + i * size, 0, 0), (tuned + i * size, 0, 0)
                to, last = mask + i * (UNIT // 8), left + u * _ROOM
                changed += compare_units(kind, x, y, (to, to), (last, last))
            for u in range(some):
                _add_digest(sums, digests_of(kind, left + u * _ROOM), first + begin + u)
        return changed

    return of_elements


def _of_pair(kind: str) -> Callable[..., int]:
    pair = pair_of(kind)
    assert pair is not None
    narrow_bits = pair[0].bits
    narrow, wide = (UNIT * dtype.bits // 8 for dtype in pair)

    def of_pair(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
        left, changed, turned = _rooms()[2], 0, 0
        if load_word(base + 8 * RECIPE_STORED) != narrow_bits:
            base, tuned, turned = tuned, base, 2
        x, y = load_word(base + 8 * RECIPE_SOURCE), load_word(tuned + 8 * RECIPE_SOURCE)
        store_word(base + 8 * RECIPE_SOURCE, x + count * narrow)
        store_word(tuned + 8 * RECIPE_SOURCE, y + count * wide)
        for begin in range(0, count, _BATCH):
            some = _least(count - begin, _BATCH)
            for u in range(some):
                fetch_lines(x + _FURTHER * narrow, narrow)
                fetch_lines(y + _FURTHER * wide, wide)
                to, last = mask + (begin + u) * (UNIT // 8), left + u * _ROOM
                changed += compare_units(kind, (x, 0, 0), (y, 0, 0), (to, to), (last, last))
                x += narrow
                y += wide
            for u in range(some):
                _add_digest(sums, digests_of(kind, left + u * _ROOM), first + begin + u, turned)
        return changed

    return of_pair


def _of_groups(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
    left, changed = _rooms()[2], 0
    x, y = load_word(base + 8 * RECIPE_SOURCE), load_word(tuned + 8 * RECIPE_SOURCE)
    a, b = load_word(base + 8 * WALK_SCALE), load_word(tuned + 8 * WALK_SCALE)
    store_word(base + 8 * RECIPE_SOURCE, x + count * (UNIT // 2))
    store_word(tuned + 8 * RECIPE_SOURCE, y + count * (UNIT // 2))
    store_word(base + 8 * WALK_SCALE, a + count * (UNIT // WORD))
    store_word(tuned + 8 * WALK_SCALE, b + count * (UNIT // WORD))
    a += load_word(base + 8 * RECIPE_SCALES)
    b += load_word(tuned + 8 * RECIPE_SCALES)
    for begin in range(0, count, _BATCH):
        some = _least(count - begin, _BATCH)
        for u in range(some):
            fetch_lines(x + _AHEAD, UNIT // 2)
            fetch_lines(y + _AHEAD, UNIT // 2)
            fetch_lines(a + _AHEAD // 8, 1)
            fetch_lines(b + _AHEAD // 8, 1)
            to = mask + (begin + u) * (UNIT // 8)
            last = left + u * _ROOM
            store_word(last + LEFT, first + begin + u)
            changed += compare_units("groups", (x, a, 0), (y, b, 0), (to, to), (last, last))
            x += UNIT // 2
            y += UNIT // 2
            a += UNIT // WORD
            b += UNIT // WORD
        _add(sums, left, some)
    return changed


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _is_in_row(recipe: int) -> bool:
    """Whether the next unit of a side is all in one row."""
    return load_word(recipe + 8 * WALK_COLUMN) + UNIT <= load_word(recipe + 8 * WALK_WIDTH)  # type: ignore[no-any-return]


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _half(recipe: int) -> Place:
    """Where the next unit of a side is, which is moved on."""
    columns, column = (
        load_word(recipe + 8 * WALK_WIDTH),
        load_word(recipe + 8 * WALK_COLUMN),
    )
    row = load_word(recipe + 8 * WALK_ROW)
    done = types.int64(column + UNIT == columns)  # a row
    store_word(recipe + 8 * WALK_COLUMN, column + UNIT - done * columns)
    store_word(recipe + 8 * WALK_ROW, row + done)
    return (
        load_word(recipe + 8 * RECIPE_SOURCE) + (row >> 1) * columns + column,
        load_word(recipe + 8 * RECIPE_SCALES) + 4 * ((row >> 5) * columns + column),
        (row & 1) * 4,
    )


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _two_rows(base: int, tuned: int) -> int:
    """Units of a row, where both sides begin two of them that are halves of the same bytes."""
    columns = load_word(base + 8 * WALK_WIDTH)
    other = (load_word(tuned + 8 * WALK_WIDTH) ^ columns) | (columns & (UNIT - 1))
    for recipe in (base, tuned):
        other |= load_word(recipe + 8 * WALK_COLUMN) | (load_word(recipe + 8 * WALK_ROW) & 1)
    return 0 if other else columns // UNIT


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _begin_rows(recipe: int) -> Place:
    """Where two rows of a side begin, which is moved on."""
    columns, row = load_word(recipe + 8 * WALK_WIDTH), load_word(recipe + 8 * WALK_ROW)
    store_word(recipe + 8 * WALK_ROW, row + 2)
    return (
        load_word(recipe + 8 * RECIPE_SOURCE) + (row >> 1) * columns,
        load_word(recipe + 8 * RECIPE_SCALES) + 4 * ((row >> 5) * columns),
        0,
    )


def _of_halves(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
    rooms = _rooms()
    changed, done, row, in_row, used = 0, 0, 0, 0, 0
    x, y = (rooms[0], 0, 0), (rooms[1], 0, 0)
    while done < count:
        if in_row == row:  # else two rows are on the way
            row, in_row = _two_rows(base, tuned), 0
            if done + 2 * row > count:
                row = 0
            if row > 0:
                x, y = _begin_rows(base), _begin_rows(tuned)
        unit, left = done + in_row, rooms[2] + used * _ROOM
        to = mask + unit * (UNIT // 8)
        store_word(left + LEFT, first + unit)
        if row > 0:
            store_word(left + _ROOM + LEFT, first + unit + row)
            p = x[0] + in_row * UNIT, x[1] + in_row * _BYTES, 0
            q = y[0] + in_row * UNIT, y[1] + in_row * _BYTES, 0
            masks = to, to + row * (UNIT // 8)
            changed += compare_units("rows", p, q, masks, (left, left + _ROOM))
            in_row += 1
            used += 2
            done += 2 * row if in_row == row else 0
        else:
            if _is_in_row(base) and _is_in_row(tuned):
                p, q = _half(base), _half(tuned)
                changed += compare_units("halves", p, q, (to, to), (left, left))
            else:
                call_maker(load_word(base + 8 * RECIPE_MAKER), base, rooms[0], UNIT)
                call_maker(load_word(tuned + 8 * RECIPE_MAKER), tuned, rooms[1], UNIT)
                p, q = (rooms[0], 0, 0), (rooms[1], 0, 0)
                changed += compare_units("", p, q, (to, to), (left, left))
            used += 1
            done += 1
        if used > _BATCH - 2 or done == count:
            _add(sums, rooms[2], used)
            used = 0
    return changed


def units_kernel(kind: str = "") -> Callable[..., int]:
    """Compares and hashes whole units: of float32 or, of a kind, of what is narrower, made, or
    widened; see the ABI.
    """
    if pair_of(kind) is not None:
        return _of_pair(kind)
    made = {"groups": _of_groups, "halves": _of_halves}
    return made[kind] if kind in made else _of_elements(kind)
