"""The comparing kernels: 64 elements of both sides in, one word of mask bits out.

A kernel is named by its *kind*, ``DTYPE[>TARGET]:RULE``: ``W16:exact`` (any 16-bit element),
``F32:atol``, ``F32>BF16:ulp``. :func:`bind` turns a rule and a dtype into a kind and one 64-bit
parameter; :func:`compare_kernel` is the loop that all kinds share.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels import lanes
from ckdiff.kernels.lanes import F64, I1, I64, Value, int_type, splat, vector
from ckdiff.rules import Rule

#: from here on a float64 rounds to infinity in float32
_FLOAT32_OVERFLOW = 2.0**128 - 2.0**103


class Bound(NamedTuple):
    """A rule applied to a dtype: which kernel, and its parameter as 64 raw bits."""

    kind: str
    parameter: int


def bind(rule: Rule, dtype: DType) -> Bound:
    """The kernel and parameter with which ``rule`` is evaluated on ``dtype``."""
    target = rule.rounds(dtype)
    seen = target or dtype  # what the elements are once they have been rounded
    name = dtype.name if target is None else f"{dtype.name}>{target.name}"
    never = (1 << seen.bits) - 1 if seen.bits >= 8 else 0
    if rule.kind == "exact" or rule.falls_back(dtype):
        return Bound(f"{name}:exact" if target or dtype.bits < 8 else f"W{dtype.bits}:exact", 0)
    if rule.kind == "ulp":
        return Bound(f"{name}:ulp", min(rule.ulps, never))
    if seen.kind == "float":
        # T and R are rounded to the compute type once, by the kernel. Where that overflows, no
        # finite pair is further apart, which is what an unreachable ulp distance says.
        if seen.bits < 64 and rule.value >= _FLOAT32_OVERFLOW:
            return Bound(f"{name}:ulp", never)
        return Bound(f"{name}:{rule.kind}", _float_bits(rule.value))
    if rule.kind == "atol":
        return Bound(f"{name}:ulp", min(math.floor(rule.value), never))
    # |x - y| <= 2 max(|x|, |y|) always
    if rule.value >= 2:
        return Bound(f"{name}:ulp", never)
    return Bound(f"{name}:rtol", _float_bits(rule.value))


def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


def parse_kind(kind: str) -> tuple[DType, DType | None, str]:
    """``F32>BF16:ulp`` -> (F32, BF16, "ulp"); ``W16`` stands for any type of that width."""
    types_, _, rule = kind.partition(":")
    source, _, target = types_.partition(">")
    if source[0] == "W":
        return DType(source, int(source[1:]), "raw"), None, rule
    return DTYPES[source], DTYPES[target] if target else None, rule


def _changed(b: Any, kind: str, x: Value, y: Value, parameter: Value) -> Value:
    """i1 lanes: changed under the kind's rule. ``x`` and ``y`` are stored bits."""
    dtype, target, rule = parse_kind(kind)
    if target is not None:
        x, y = lanes.round_to(b, dtype, target, x), lanes.round_to(b, dtype, target, y)
        dtype = target
    differ = b.icmp_unsigned("!=", x, y)
    if rule == "exact":
        return differ
    lane = int_type(dtype.bits)
    if rule == "rtol" and dtype.kind != "float":
        return b.and_(differ, _integer_rtol(b, dtype, x, y, parameter))
    if rule == "ulp":
        limit = _broadcast(b, b.trunc(parameter, lane) if dtype.bits < 64 else parameter, lane)
        far = b.icmp_unsigned(">", lanes.distance(b, dtype, x, y), limit)
        if dtype.kind == "float":
            far = b.or_(far, _either_nonfinite(b, dtype, x, y))
        return b.and_(differ, far)
    compute = lanes.compute_type(dtype)
    bound = b.bitcast(parameter, F64)
    if compute is not F64:
        bound = b.fptrunc(bound, compute)
    bound = _broadcast(b, bound, compute)
    delta = b.fsub(lanes.to_float(b, dtype, x), lanes.to_float(b, dtype, y))
    delta = _absolute(b, delta, compute)
    if rule == "atol":
        # Unordered or greater: a NaN is further than any T, and so is an infinity. The same NaN
        # or infinity on both sides is taken out again by `differ`.
        return b.and_(differ, b.fcmp_unordered(">", delta, bound))
    mx, my = lanes.magnitude(b, dtype, x), lanes.magnitude(b, dtype, y)
    larger = b.select(b.icmp_unsigned(">", mx, my), mx, my)
    product = b.fmul(bound, lanes.to_float(b, dtype, larger))
    far = b.fcmp_ordered(">", delta, product)
    # inf > R*inf is false, yet an infinity differs from everything but itself
    return b.and_(differ, b.or_(far, _either_nonfinite(b, dtype, x, y)))


def _either_nonfinite(b: Any, dtype: DType, x: Value, y: Value) -> Value:
    return b.or_(lanes.nonfinite(b, dtype, x), lanes.nonfinite(b, dtype, y))


def _broadcast(b: Any, scalar: Value, element: Any) -> Value:
    one = b.insert_element(ir.Constant(vector(element), ir.Undefined), scalar, lanes.I32(0))
    undefined = ir.Constant(vector(element), ir.Undefined)
    return b.shuffle_vector(one, undefined, ir.Constant(vector(lanes.I32), [0] * lanes.LANES))


def _absolute(b: Any, value: Value, compute: Any) -> Value:
    bits = 64 if compute is F64 else 32
    lane = int_type(bits)
    cleared = b.and_(b.bitcast(value, vector(lane)), splat(lane, (1 << (bits - 1)) - 1))
    return b.bitcast(cleared, vector(compute))


def _integer_rtol(b: Any, dtype: DType, x: Value, y: Value, parameter: Value) -> Value:
    """|x - y| > R * max(|x|, |y|), R taken as the exact rational a float64 is.

    R = m * 2**-s with m < 2**53, and for a whole left side the right side may be rounded down:
    ``|x - y| > (m * max) >> s`` in 128 bits. Lane by lane: integer tensors are rare.
    """
    wide = int_type(128)
    exponent = b.and_(b.lshr(parameter, I64(52)), I64(0x7FF))
    subnormal = b.icmp_unsigned("==", exponent, I64(0))
    implicit = b.select(subnormal, I64(0), I64(1 << 52))
    m = b.zext(b.or_(b.and_(parameter, I64((1 << 52) - 1)), implicit), wide)
    s = b.sub(I64(1075), b.select(subnormal, I64(1), exponent))
    s = b.select(b.icmp_unsigned("<", s, I64(127)), s, I64(127))
    s = b.zext(s, wide)
    apart = lanes.distance(b, dtype, x, y)
    if dtype.kind == "int":
        zero = splat(int_type(dtype.bits), 0)
        x = b.select(b.icmp_signed("<", x, zero), b.sub(zero, x), x)
        y = b.select(b.icmp_signed("<", y, zero), b.sub(zero, y), y)
    larger = b.select(b.icmp_unsigned(">", x, y), x, y)
    out = cgutils.alloca_once_value(b, ir.Constant(vector(I1), [0] * lanes.LANES))
    with cgutils.for_range(b, I64(lanes.LANES)) as loop:
        index = b.trunc(loop.index, lanes.I32)
        limit = b.lshr(b.mul(m, b.zext(b.extract_element(larger, index), wide)), s)
        far = b.icmp_unsigned(">", b.zext(b.extract_element(apart, index), wide), limit)
        b.store(b.insert_element(b.load(out), far, index), out)
    return b.load(out)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def changed_word(typing: Any, kind: Any, x: Any, y: Any, parameter: Any) -> Any:
    """uint64 mask word of the 64 elements at addresses ``x`` and ``y``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        name = kind.literal_value
        dtype, _, _ = parse_kind(name)
        left, right = (lanes.load_bits(b, dtype, address) for address in args[1:3])
        return b.bitcast(_changed(b, name, left, right, args[3]), I64)

    return types.uint64(kind, types.int64, types.int64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_word(typing: Any, address: Any) -> Any:
    """The int64 at ``address``, any alignment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.load(b.inttoptr(args[0], I64.as_pointer()), align=1)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_word(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64 or uint64 to ``address``, any alignment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(args[1], b.inttoptr(args[0], I64.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(typing: Any, word: Any) -> Any:
    """Population count of a uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.ctpop(args[0])

    return types.int64(types.uint64), generate


#: (base, tuned, words, parameter, mask) -> changed; addresses and counts
COMPARE_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.uint64, types.int64)


def compare_kernel(kind: str) -> Callable[..., int]:
    """The loop over whole words for one kind; compiled by :mod:`ckdiff.kernels.compiled`."""
    stride = lanes.word_bytes(parse_kind(kind)[0])

    def compare(base: int, tuned: int, words: int, parameter: int, mask: int) -> int:
        changed = 0
        for i in range(words):
            word = changed_word(kind, base + i * stride, tuned + i * stride, parameter)
            store_word(mask + 8 * i, word)
            changed += ones(word)
        return changed

    return compare
