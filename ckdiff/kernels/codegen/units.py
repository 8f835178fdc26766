"""Whole units of both sides, compared and hashed in one pass: values that were made just now, and
short rows.

XXH3 of a unit takes 64 bytes at a time, a *stripe*, into eight sums. The library's is called for
what memory delivers (:mod:`ckdiff.kernels.codegen.hashing`); for what is in the first-level cache
two sides that take turns, and no calls, are nearly twice as fast. F4 of both sides are made in
registers, stripe by stripe, and are never written anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import (
    LANES,
    RECIPE_MAKER,
    RECIPE_SCALES,
    RECIPE_SOURCE,
    WALK_COLUMN,
    WALK_ROW,
    WALK_SCALE,
    WALK_WIDTH,
)
from ckdiff.kernels.codegen.drive import call_maker
from ckdiff.kernels.codegen.hashing import weight
from ckdiff.kernels.codegen.lanes import F32, I8, I32, I64, Value, int_type, spread
from ckdiff.kernels.codegen.scaling import (
    NUMBERS,
    WORD,
    four_bits,
    look_up,
    pairs_of,
    powers_of_two,
    vector_at,
)
from ckdiff.kernels.codegen.vectors import VECTOR, constant
from ckdiff.kernels.codegen.words import fetch_lines, load_word, ones, store_word
from ckdiff.kernels.hashing import SECRET, START, UNIT, secret_words, starts

_BYTES = 4 * UNIT
_STRIPE = 64  # bytes
_SOME = _STRIPE // 4  # elements of a stripe
_BLOCK = 16  # stripes, after which the sums are scrambled
_I128 = ir.IntType(128)
_AHEAD = 1 << 10  # bytes that are asked of memory before their turn

Stripe = Callable[[int], Value]


def _secret(first: int) -> Value:
    """Eight words of the secret."""
    return ir.Constant(VECTOR, list(secret_words(first, 8)))


class _Side:
    """The sums of one side: of products, and of stripes as they are, whose words are exchanged in
    pairs only at the end.
    """

    def __init__(self, b: Any, stripe: Stripe, size: int) -> None:
        self._b, self._stripe, self._size = b, stripe, size
        self._products = ir.Constant(VECTOR, list(START))
        self._plain: Value = constant(0)

    def take(self, number: int, secret: Value) -> Value:
        """Add a stripe, and give it."""
        b, stripe = self._b, self._stripe(number)
        mixed = b.xor(stripe, secret)
        low, high = b.and_(mixed, constant(0xFFFFFFFF)), b.lshr(mixed, constant(32))
        self._products = b.add(self._products, b.mul(low, high))
        self._plain = b.add(self._plain, stripe)
        return stripe

    def fold(self) -> Value:
        """The sums."""
        b, plain = self._b, self._plain
        exchange = ir.Constant(ir.VectorType(I32, 8), [i ^ 1 for i in range(8)])
        self._products = b.add(self._products, b.shuffle_vector(plain, plain, exchange))
        self._plain = constant(0)
        return self._products

    def scramble(self) -> None:
        """After a block."""
        b, sums = self._b, self.fold()
        mixed = b.xor(b.xor(sums, b.lshr(sums, constant(47))), _secret(len(SECRET) - _STRIPE))
        factor = constant(START[7])
        low = b.mul(b.and_(mixed, constant(0xFFFFFFFF)), factor)
        high = b.mul(b.lshr(mixed, constant(32)), factor)
        self._products = b.add(low, b.shl(high, constant(32)))

    def digest(self) -> list[Value]:
        """(low, high)."""
        sums = self.fold()
        places = 11, len(SECRET) - _STRIPE - 11
        return [self._half(sums, *half) for half in zip(places, starts(self._size), strict=True)]

    def _half(self, sums: Value, first: int, start: int) -> Value:
        b = self._b
        mixed, total = b.xor(sums, _secret(first)), I64(start)
        for i in range(0, 8, 2):
            pair = [b.zext(b.extract_element(mixed, I32(i + k)), _I128) for k in range(2)]
            product = b.mul(*pair)
            high = b.trunc(b.lshr(product, _I128(64)), I64)
            total = b.add(total, b.xor(b.trunc(product, I64), high))
        total = b.xor(total, b.lshr(total, I64(37)))
        total = b.mul(total, I64(0x165667919E3779F9))
        return b.xor(total, b.lshr(total, I64(32)))


def _plain(b: Any, place: list[Value]) -> Stripe:
    """Stripes that are there."""
    return lambda i: b.load(vector_at(b, b.add(place[0], I64(_STRIPE * i)), I64, 8), align=1)


def _groups(b: Any, place: list[Value]) -> Stripe:
    """Stripes of pairs of F4, with an E8M0 for each 32: their 16 numbers are multiplied by it."""
    powers = powers_of_two(b, b.load(vector_at(b, place[1], I8, UNIT // WORD), align=1))
    numbers = ir.Constant(ir.VectorType(F32, _SOME), list(NUMBERS))
    found: list[Value] = []

    def stripe(i: int) -> Value:
        if i % (WORD // _SOME) == 0:
            factor = spread(b, b.extract_element(powers, I32(i * _SOME // WORD)), _SOME)
            found.append(b.fmul(numbers, factor))
        pairs = pairs_of(b, b.add(place[0], I64(_SOME // 2 * i)), _SOME)
        return b.bitcast(look_up(b, found[-1], pairs), VECTOR)

    return stripe


def _halves(b: Any, place: list[Value]) -> Stripe:
    """Stripes of F4 that are one half of as many bytes: from some bit on; a float32 for each."""
    source, scales, shift = place
    shifts = spread(b, b.trunc(shift, I32), _SOME)

    def stripe(i: int) -> Value:
        pairs = b.load(vector_at(b, b.add(source, I64(_SOME * i)), I8, _SOME), align=1)
        powers = b.load(vector_at(b, b.add(scales, I64(_STRIPE * i)), F32, _SOME), align=1)
        numbers = four_bits(b, b.lshr(b.zext(pairs, ir.VectorType(I32, _SOME)), shifts))
        return b.bitcast(b.fmul(numbers, powers), VECTOR)

    return stripe


_STRIPES = {"groups": _groups, "halves": _halves}  # of others they are there
_WIDTHS = {"1": 1, "2": 2}  # bytes of an element, by the kind, where they are not four
_Place = tuple[int, int, int]  # addresses of elements and of scales, and what else there is


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _unit(typing: Any, kind: Any, base: Any, tuned: Any, mask: Any) -> Any:
    """Compare a unit, write its bits to ``mask``, and give both digests: low, high, low, high."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        places = [[b.extract_value(place, i) for i in range(3)] for place in args[1:3]]
        width = _WIDTHS.get(kind.literal_value, 4)
        stripe, size = _STRIPES.get(kind.literal_value, _plain), UNIT * width
        sides = [_Side(b, stripe(b, place), size) for place in places]
        count, word = size // _STRIPE, int_type(_STRIPE // width)
        elements = ir.VectorType(int_type(8 * width), _STRIPE // width)
        for i in range(count):
            # the last stripe of all has a place in the secret of its own
            first = 8 * (i % _BLOCK) if i < count - 1 else len(SECRET) - _STRIPE - 7
            secret, to = _secret(first), b.add(args[3], I64(i * 8 // width))
            x, y = (b.bitcast(side.take(i, secret), elements) for side in sides)
            bits = b.bitcast(b.icmp_unsigned("!=", x, y), word)
            b.store(bits, b.inttoptr(to, word.as_pointer()), align=1)
            if i % _BLOCK == _BLOCK - 1 and i < count - 1:
                for side in sides:
                    side.scramble()
        halves = [half for side in sides for half in side.digest()]
        return context.make_tuple(b, signature.return_type, halves)

    four = types.UniTuple(types.uint64, 4)  # type: ignore[attr-defined]
    place = types.UniTuple(types.int64, 3)  # type: ignore[attr-defined]
    return four(kind, place, place, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _rooms(typing: Any) -> Any:
    """The addresses of room for a unit of each side, which are this call's own."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        with b.goto_entry_block():  # cgutils would fill it with zeros
            room = b.alloca(ir.ArrayType(I8, 2 * _BYTES))
        room.align = _STRIPE
        first = b.ptrtoint(room, I64)
        return context.make_tuple(b, signature.return_type, [first, b.add(first, I64(_BYTES))])

    pair = types.UniTuple(types.int64, 2)  # type: ignore[attr-defined]
    return pair(), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _add(sums: int, digests: tuple[int, int, int, int], unit: int) -> None:
    factor = weight(types.uint64(unit))
    for i in range(4):
        total = load_word(sums + 8 * i) + types.int64(digests[i] * factor)
        store_word(sums + 8 * i, total)


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _ones_in(mask: int, units: int) -> int:
    found = 0
    for i in range(units * (UNIT // LANES)):
        found += ones(types.uint64(load_word(mask + 8 * i)))
    return found


def _of_elements(kind: str) -> Callable[..., int]:
    size = UNIT * _WIDTHS.get(kind, 4)

    def of_elements(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
        for i in range(count):
            x, y = (base + i * size, 0, 0), (tuned + i * size, 0, 0)
            _add(sums, _unit(kind, x, y, mask + i * (UNIT // 8)), first + i)
        return _ones_in(mask, count)  # type: ignore[no-any-return]

    return of_elements


def _of_groups(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
    x, y = load_word(base + 8 * RECIPE_SOURCE), load_word(tuned + 8 * RECIPE_SOURCE)
    a, b = load_word(base + 8 * WALK_SCALE), load_word(tuned + 8 * WALK_SCALE)
    store_word(base + 8 * RECIPE_SOURCE, x + count * (UNIT // 2))
    store_word(tuned + 8 * RECIPE_SOURCE, y + count * (UNIT // 2))
    store_word(base + 8 * WALK_SCALE, a + count * (UNIT // WORD))
    store_word(tuned + 8 * WALK_SCALE, b + count * (UNIT // WORD))
    a += load_word(base + 8 * RECIPE_SCALES)
    b += load_word(tuned + 8 * RECIPE_SCALES)
    for i in range(count):
        fetch_lines(x + _AHEAD, UNIT // 2)
        fetch_lines(y + _AHEAD, UNIT // 2)
        fetch_lines(a + _AHEAD // 8, 1)
        fetch_lines(b + _AHEAD // 8, 1)
        _add(sums, _unit("groups", (x, a, 0), (y, b, 0), mask + i * (UNIT // 8)), first + i)
        x += UNIT // 2
        y += UNIT // 2
        a += UNIT // WORD
        b += UNIT // WORD
    return _ones_in(mask, count)  # type: ignore[no-any-return]


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _in_row(recipe: int) -> bool:
    """Whether the next unit of a side is all in one row."""
    return load_word(recipe + 8 * WALK_COLUMN) + UNIT <= load_word(recipe + 8 * WALK_WIDTH)  # type: ignore[no-any-return]


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _half(recipe: int) -> _Place:
    """Where the next unit of a side is, which is moved on."""
    columns, column = load_word(recipe + 8 * WALK_WIDTH), load_word(recipe + 8 * WALK_COLUMN)
    row = load_word(recipe + 8 * WALK_ROW)
    done = types.int64(column + UNIT == columns)  # a row
    store_word(recipe + 8 * WALK_COLUMN, column + UNIT - done * columns)
    store_word(recipe + 8 * WALK_ROW, row + done)
    return (
        load_word(recipe + 8 * RECIPE_SOURCE) + (row >> 1) * columns + column,
        load_word(recipe + 8 * RECIPE_SCALES) + 4 * ((row >> 5) * columns + column),
        (row & 1) * 4,
    )


def _of_halves(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
    rooms = _rooms()
    for i in range(count):
        to = mask + i * (UNIT // 8)
        if _in_row(base) and _in_row(tuned):
            _add(sums, _unit("halves", _half(base), _half(tuned), to), first + i)
        else:
            call_maker(load_word(base + 8 * RECIPE_MAKER), base, rooms[0], UNIT)
            call_maker(load_word(tuned + 8 * RECIPE_MAKER), tuned, rooms[1], UNIT)
            _add(sums, _unit("", (rooms[0], 0, 0), (rooms[1], 0, 0), to), first + i)
    return _ones_in(mask, count)  # type: ignore[no-any-return]


def units_kernel(kind: str = "") -> Callable[..., int]:
    """Compares and hashes whole units: of float32 or, of a kind, of what is narrower or made; see
    the ABI.
    """
    made = {"groups": _of_groups, "halves": _of_halves}
    return made[kind] if kind in made else _of_elements(kind)
