"""Steps between two elements, as symbols and extra bits: what a packed delta stores of a change.

The bit patterns of a type are put in a row, floats in the order of their values (negative ones
first, both zeros, infinities and NaN payloads each in its place), integers as they are. A *step* is
how far the tuned pattern lies from the base's, modulo the number of patterns, so that every pair of
patterns has one and applying it is exact. Zigzag numbers the steps -1, +1, -2, +2, ... as z = 0, 1,
2, 3, ...

A small z is its own *symbol*; a large one is the symbol of its power of two and of the bits right
below the leading one, and its other bits are *extra bits*.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import SMALL_STEPS, step_bits
from ckdiff.kernels.codegen.lanes import I1, I8, I64, Value, int_type, splat, spread, vector


class Kind:
    """A kind of element: ``16f`` are 16-bit floats, ``16i`` any other 16-bit patterns."""

    def __init__(self, name: str) -> None:
        self.bits = int(name[:-1])
        self.ordered = name[-1] == "f"
        self.lane = int_type(self.bits)
        self.lanes = vector(self.lane)
        self.bytes = self.bits // 8
        self.fine = step_bits(self.bits)


def _place(b: Any, kind: Kind, bits: Value, constant: Any) -> Value:
    """Where a pattern lies in the row."""
    if not kind.ordered:
        return bits
    sign = b.ashr(bits, constant(kind.bits - 1))
    return b.xor(bits, b.or_(sign, constant(1 << (kind.bits - 1))))


def _pattern(b: Any, kind: Kind, place: Value, constant: Any) -> Value:
    """The pattern at a place."""
    if not kind.ordered:
        return place
    top = 1 << (kind.bits - 1)
    other = b.xor(b.ashr(place, constant(kind.bits - 1)), constant(-1))
    return b.xor(place, b.or_(b.and_(other, constant(top - 1)), constant(top)))


def _zigzag(b: Any, kind: Kind, base: Value, tuned: Value, constant: Any) -> Value:
    """z of the step from ``base`` to ``tuned``; that of no step at all is the largest number."""
    step = b.sub(_place(b, kind, tuned, constant), _place(b, kind, base, constant))
    folded = b.xor(b.shl(step, constant(1)), b.ashr(step, constant(kind.bits - 1)))
    return b.sub(folded, constant(1))


def _stepped(b: Any, kind: Kind, base: Value, folded: Value, constant: Any) -> Value:
    """The pattern ``folded`` (z + 1, or 0 for none) away from ``base``."""
    sign = b.sub(constant(0), b.and_(folded, constant(1)))
    step = b.xor(b.lshr(folded, constant(1)), sign)
    return _pattern(b, kind, b.add(_place(b, kind, base, constant), step), constant)


def _lanes_at(b: Any, kind: Kind, address: Value) -> Value:
    return b.load(b.inttoptr(address, kind.lanes.as_pointer()), align=1)


def _element_at(b: Any, kind: Kind, address: Value) -> Value:
    return b.load(b.inttoptr(address, kind.lane.as_pointer()), align=1)


def _resized(b: Any, value: Value, to: Any, bits: int, wanted: int) -> Value:
    if bits < wanted:
        return b.zext(value, to)
    return b.trunc(value, to) if bits > wanted else value


def _literal(argument: Any) -> Kind:
    return Kind(argument.literal_value)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def differing(typing: Any, kind: Any, base: Any, tuned: Any) -> Any:
    """uint64: the lanes in which 64 elements differ."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        return b.bitcast(
            b.icmp_unsigned("!=", _lanes_at(b, of, args[1]), _lanes_at(b, of, args[2])), I64
        )

    return types.uint64(kind, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def at_least(typing: Any, kind: Any, base: Any, threshold: Any) -> Any:
    """uint64: the lanes whose magnitude, the bits without the sign, is at least a threshold."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        size = b.and_(_lanes_at(b, of, args[1]), splat(of.lane, (1 << (of.bits - 1)) - 1))
        limit = args[2] if of.bits == 64 else b.trunc(args[2], of.lane)
        return b.bitcast(b.icmp_unsigned(">=", size, spread(b, limit)), I64)

    return types.uint64(kind, types.int64, types.uint64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def magnitude_of(typing: Any, kind: Any, address: Any) -> Any:
    """uint64: the magnitude of one element."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        size = b.and_(_element_at(b, of, args[1]), of.lane((1 << (of.bits - 1)) - 1))
        return _resized(b, size, I64, of.bits, 64)

    return types.uint64(kind, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def small_symbols(typing: Any, kind: Any, base: Any, tuned: Any, out: Any) -> Any:
    """Write z of 64 elements as bytes; uint64: the lanes in which it is too large for that."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        constant = partial(splat, of.lane)
        z = _zigzag(b, of, _lanes_at(b, of, args[1]), _lanes_at(b, of, args[2]), constant)
        large = b.icmp_unsigned(">=", z, constant(SMALL_STEPS))
        symbols = _resized(b, z, vector(I8), of.bits, 8)
        b.store(symbols, b.inttoptr(args[3], vector(I8).as_pointer()), align=1)
        return b.bitcast(large, I64)

    return types.uint64(kind, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def zigzag(typing: Any, kind: Any, base: Any, tuned: Any) -> Any:
    """uint64: z of one element."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        z = _zigzag(b, of, _element_at(b, of, args[1]), _element_at(b, of, args[2]), of.lane)
        return _resized(b, z, I64, of.bits, 64)

    return types.uint64(kind, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def apply_symbols(typing: Any, kind: Any, base: Any, symbols: Any, changed: Any, out: Any) -> Any:
    """Write 64 elements: the base's, stepped by a symbol where changed.

    uint64: the changed lanes whose symbols are too large for that; ``apply_step`` must follow.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        constant = partial(splat, of.lane)
        symbols = b.load(b.inttoptr(args[2], vector(I8).as_pointer()), align=1)
        large = b.icmp_unsigned(">=", symbols, splat(I8, SMALL_STEPS))
        wide = _resized(b, symbols, of.lanes, 8, of.bits)
        flags = b.bitcast(args[3], ir.VectorType(I1, 64))
        folded = b.select(flags, b.add(wide, constant(1)), constant(0))
        found = _stepped(b, of, _lanes_at(b, of, args[1]), folded, constant)
        b.store(found, b.inttoptr(args[4], of.lanes.as_pointer()), align=1)
        return b.and_(b.bitcast(large, I64), args[3])

    sig = types.uint64(kind, types.int64, types.int64, types.uint64, types.int64)
    return sig, generate


@intrinsic  # type: ignore[untyped-decorator]
def clear_bytes(typing: Any, address: Any) -> Any:
    """Write 64 zeros."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(splat(I8, 0), b.inttoptr(args[0], vector(I8).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def apply_step(typing: Any, kind: Any, base: Any, z: Any, out: Any) -> Any:
    """Write one element: the base's, stepped by z."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        of = _literal(kind)
        folded = _resized(b, b.add(args[2], I64(1)), of.lane, 64, of.bits)
        found = _stepped(b, of, _element_at(b, of, args[1]), folded, of.lane)
        b.store(found, b.inttoptr(args[3], of.lane.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.uint64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def leading_one(typing: Any, word: Any) -> Any:
    """Position of the highest set bit of a non-zero uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.sub(I64(63), b.ctlz(args[0], I1(1)))

    return types.int64(types.uint64), generate
