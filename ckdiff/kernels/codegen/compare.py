"""The comparing kernels: 64 elements of both sides in, one word of mask bits out.

The kind of a kernel (:mod:`ckdiff.kernels.binding`) says what is compared and how;
:func:`compare_kernel` is the loop that all kinds share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DType
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.binding import parse_kind
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.lanes import F64, I1, I64, Value, int_type, splat, vector
from ckdiff.kernels.codegen.words import ones, store_word


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
        limit = lanes.spread(b, b.trunc(parameter, lane) if dtype.bits < 64 else parameter)
        far = b.icmp_unsigned(">", lanes.distance(b, dtype, x, y), limit)
        if dtype.kind == "float":
            far = b.or_(far, _either_nonfinite(b, dtype, x, y))
        return b.and_(differ, far)
    compute = lanes.compute_type(dtype)
    bound = b.bitcast(parameter, F64)
    if compute is not F64:
        bound = b.fptrunc(bound, compute)
    bound = lanes.spread(b, bound)
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
    out = cgutils.alloca_once_value(b, ir.Constant(vector(I1), [0] * LANES))
    with cgutils.for_range(b, I64(LANES)) as loop:
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


def compare_kernel(kind: str) -> Callable[..., int]:
    """The loop over whole words for one kind; compiled by :mod:`ckdiff.kernels.codegen`."""
    stride = lanes.word_bytes(parse_kind(kind)[0])

    def compare(base: int, tuned: int, words: int, parameter: int, mask: int) -> int:
        changed = 0
        for i in range(words):
            word = changed_word(kind, base + i * stride, tuned + i * stride, parameter)
            store_word(mask + 8 * i, word)
            changed += ones(word)
        return changed

    return compare
