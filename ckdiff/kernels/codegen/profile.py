"""Where in a matrix a mask has ones: by row, by column, by block, and by fours of a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import PROFILE_BAND, PROFILE_DIGITS, PROFILE_STRIP
from ckdiff.kernels.codegen.lanes import I1, I8, I16, I32, I64, Value, splat, spread, vector
from ckdiff.kernels.codegen.vectors import (
    BYTES,
    VECTOR,
    WORDS,
    add_up,
    constant,
    count_ones,
    load_vector,
)
from ckdiff.kernels.codegen.words import load_word

_BITS = 8 * BYTES  # of a vector
_MOST = (1 << PROFILE_DIGITS) - 1  # rows: what the binary digits of a count hold
_TOGETHER = 8  # rows that are added up before they are counted


def _bits_at(b: Any, mask: Value, bit: Value) -> Value:
    """The 512 bits from a bit of a mask on; up to 72 bytes are read from the word it is in."""
    address = b.add(mask, b.shl(b.lshr(bit, I64(6)), I64(3)))
    low, high = load_vector(b, address), load_vector(b, b.add(address, I64(8)))
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.fshr.v{WORDS}i64")
    return b.call(function, [high, low, spread(b, bit, WORDS)])  # shifts by the bit modulo 64


def _first_bits(b: Any, number: Value) -> Value:
    """A vector whose first ``number`` bits are set: none for a negative number, at most all."""
    offsets = ir.Constant(VECTOR, [64 * i for i in range(WORDS)])
    left = b.sub(spread(b, number, WORDS), offsets)
    some = b.sub(b.shl(constant(1), b.and_(left, constant(63))), constant(1))
    some = b.select(b.icmp_signed("<=", left, constant(0)), constant(0), some)
    return b.select(b.icmp_signed(">=", left, constant(64)), constant(-1), some)


def _fours(b: Any, value: Value) -> list[Value]:
    """Of every four bits whether 1, 2, 3 or all are set: vectors with a bit for each four."""
    half = b.lshr(value, constant(1))
    both, any_ = b.and_(value, half), b.or_(value, half)
    both2, any2 = b.lshr(both, constant(2)), b.lshr(any_, constant(2))
    found = [
        b.or_(any_, any2),
        b.or_(b.or_(both, both2), b.and_(any_, any2)),
        b.or_(b.and_(both, any2), b.and_(any_, both2)),
        b.and_(both, both2),
    ]
    return [b.and_(bits, constant(0x1111111111111111)) for bits in found]


def _add(b: Any, slot: Value, amount: Value) -> None:
    b.store(b.add(b.load(slot), amount), slot)


def _word_at(b: Any, address: Value) -> Value:
    return b.inttoptr(address, I64.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _scan_rows(
    typing: Any, mask: Any, bit: Any, rows: Any, width: Any, counts: Any, totals: Any
) -> Any:
    """Add the ones of each row to ``counts``, and to four totals in how many fours of a row at
    least 1, 2, 3 and 4 are set.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        mask, bit, rows, width, counts, totals = args
        fours = [cgutils.alloca_once_value(b, constant(0)) for _ in range(4)]
        for slot in fours:
            b.store(constant(0), slot)
        ones = cgutils.alloca_once_value(b, constant(0))
        whole = b.udiv(width, I64(_BITS))
        rest = b.sub(width, b.mul(whole, I64(_BITS)))
        in_row, in_fours = _first_bits(b, rest), _first_bits(b, b.and_(rest, I64(-4)))
        with cgutils.for_range(b, rows) as row:
            begin = b.add(bit, b.mul(row.index, width))
            b.store(constant(0), ones)
            with cgutils.for_range(b, whole) as loop:
                bits = _bits_at(b, mask, b.add(begin, b.mul(loop.index, I64(_BITS))))
                _add(b, ones, count_ones(b, bits))
                for slot, found in zip(fours, _fours(b, bits), strict=True):
                    _add(b, slot, count_ones(b, found))
            with b.if_then(b.icmp_signed(">", rest, I64(0))):
                bits = _bits_at(b, mask, b.add(begin, b.mul(whole, I64(_BITS))))
                _add(b, ones, count_ones(b, b.and_(bits, in_row)))
                found4 = _fours(b, b.and_(bits, in_fours))
                for slot, found in zip(fours, found4, strict=True):
                    _add(b, slot, count_ones(b, found))
            _add(b, _word_at(b, b.add(counts, b.shl(row.index, I64(3)))), add_up(b, b.load(ones)))
        for i, slot in enumerate(fours):
            _add(b, _word_at(b, b.add(totals, I64(8 * i))), add_up(b, b.load(slot)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _lanes_set(b: Any, value: Value, bits: int) -> Value:
    """How many of the pieces of 16 or of 128 bits of a vector have a bit that is set."""
    if bits == 128:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        order = ir.Constant(ir.VectorType(I32, WORDS), [i ^ 1 for i in range(WORDS)])
        either = b.or_(value, b.shuffle_vector(value, undefined, order))
        found = b.bitcast(b.icmp_unsigned("!=", either, constant(0)), I8)
        return b.zext(b.ctpop(b.and_(found, I8(0x55))), I64)
    pieces = ir.VectorType(I16, _BITS // 16)
    zero = ir.Constant(pieces, [0] * (_BITS // 16))
    found = b.bitcast(b.icmp_unsigned("!=", b.bitcast(value, pieces), zero), ir.IntType(32))
    return b.zext(b.ctpop(found), I64)


def _end_bands(b: Any, after: Value, slots: list[Value], bands: tuple[Value, Value]) -> None:
    """Before row ``after``: count the blocks of what it ends. ``slots`` hold the two totals."""
    small, large = bands
    with b.if_then(b.icmp_unsigned("==", b.and_(after, I64(15)), I64(0)), likely=False):
        _add(b, slots[0], _lanes_set(b, b.load(small), 16))
        b.store(b.or_(b.load(large), b.load(small)), large)
        b.store(constant(0), small)
        with b.if_then(b.icmp_unsigned("==", b.and_(after, I64(127)), I64(0)), likely=False):
            _add(b, slots[1], _lanes_set(b, b.load(large), 128))
            b.store(constant(0), large)


def _carry(b: Any, planes: list[Value], carry: Value) -> None:
    """Add a vector of ones to the counts of which ``planes`` hold the binary digits."""
    for plane in planes:
        digit = b.load(plane)
        b.store(b.xor(digit, carry), plane)
        carry = b.and_(digit, carry)


def _add_two(b: Any, plane: Value, one: Value, other: Value) -> Value:
    """Add two vectors of ones to a digit; gives what is carried to the next one."""
    digit = b.load(plane)
    either = b.xor(one, other)
    b.store(b.xor(digit, either), plane)
    return b.or_(b.and_(one, other), b.and_(digit, either))


def _add_rows(b: Any, planes: list[Value], rows: list[Value]) -> None:
    """Add 2, 4, 8, ... vectors of ones: two at a time, then what two of them carry, and so on."""
    for plane in planes:
        if len(rows) == 1:
            break
        rows = [_add_two(b, plane, *two) for two in zip(rows[::2], rows[1::2], strict=True)]
        planes = planes[1:]
    _carry(b, planes, rows[0])


def _by_some(b: Any, first: Value, rows: Value, add: Callable[[Value, int], None]) -> None:
    """Add rows one by one until as many as are taken together begin at a multiple of their number,
    then these, then the rest one by one.
    """
    head = b.and_(b.neg(first), I64(_TOGETHER - 1))
    head = b.select(b.icmp_unsigned("<", head, rows), head, rows)
    rounds = b.udiv(b.sub(rows, head), I64(_TOGETHER))
    done = b.add(head, b.mul(rounds, I64(_TOGETHER)))
    for begin, count, many in (
        (I64(0), head, 1), (head, rounds, _TOGETHER), (done, b.sub(rows, done), 1)
    ):  # fmt: skip
        with cgutils.for_range(b, count) as loop:
            add(b.add(begin, b.mul(loop.index, I64(many))), many)


def _spill(b: Any, planes: list[Value], columns: Value) -> None:
    """Add the counts whose binary digits are in ``planes`` to 512 uint16 at ``columns``."""
    digits = [b.load(plane) for plane in planes]
    for word in range(WORDS):
        counts = splat(I8, 0)
        for p, digit in enumerate(digits):
            lanes = b.bitcast(b.extract_element(digit, I32(word)), vector(I1))
            counts = b.or_(counts, b.select(lanes, splat(I8, 1 << p), splat(I8, 0)))
        place = b.inttoptr(b.add(columns, I64(128 * word)), vector(I16).as_pointer())
        b.store(b.add(b.load(place, align=2), b.zext(counts, vector(I16))), place, align=2)


@intrinsic  # type: ignore[untyped-decorator]
def _strip(
    typing: Any, mask: Any, bit: Any, rows: Any, walk: Any, left: Any, first: Any, full: Any,
    columns: Any, bands: Any, totals: Any,
) -> Any:  # fmt: skip
    """512 columns of some rows, of which ``left`` are in the matrix: their ones by column, and the
    blocks that have some. ``full`` says that no more rows fit in the digits.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        mask, bit, rows, width, left, first, full, columns, bands, totals = args
        places = [
            b.inttoptr(b.add(bands, I64(BYTES * i)), VECTOR.as_pointer())
            for i in range(2 + PROFILE_DIGITS)
        ]
        kept = [cgutils.alloca_once(b, VECTOR) for _ in places]
        for slot, place in zip(kept, places, strict=True):
            b.store(b.load(place, align=1), slot)
        small, large, *planes = kept
        slots = [_word_at(b, b.add(totals, I64(8 * i))) for i in range(2)]
        inside = _first_bits(b, left)

        def add(at: Value, many: int) -> None:
            begin = b.add(bit, b.mul(at, width))
            each = [b.add(begin, b.mul(I64(i), width)) for i in range(many)]
            found = [b.and_(_bits_at(b, mask, place), inside) for place in each]
            b.store(reduce(b.or_, found, b.load(small)), small)
            _add_rows(b, planes, found)
            _end_bands(b, b.add(first, b.add(at, I64(many))), slots, (small, large))

        _by_some(b, first, rows, add)
        with b.if_then(b.icmp_signed("!=", full, I64(0))):
            _spill(b, planes, columns)
            for plane in planes:
                b.store(constant(0), plane)
        for slot, place in zip(kept, places, strict=True):
            b.store(b.load(slot), place, align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def profile_kernel() -> Callable[..., None]:
    """Adds some rows of a mask to the profile of its matrix; see the ABI."""

    def profile(mask: int, walk: int, counts: int, columns: int, bands: int, totals: int) -> None:
        bit, rows = load_word(walk), load_word(walk + 8)
        width, first = load_word(walk + 16), load_word(walk + 24)
        before = load_word(walk + 32)
        _scan_rows(mask, bit, rows, width, counts, totals + 16)
        for strip in range((width + PROFILE_STRIP - 1) // PROFILE_STRIP):
            column = PROFILE_STRIP * strip
            done, room, more = 0, _MOST - before, 1
            while more != 0:
                step, full = rows - done, 0
                if rows == 0:
                    full = 1
                if step >= room:
                    step, full = room, 1
                _strip(
                    mask, bit + done * width + column, step, width, width - column, first + done,
                    full, columns + 2 * column, bands + PROFILE_BAND * strip, totals,
                )  # fmt: skip
                done += step
                room = _MOST
                more = rows - done

    return profile
