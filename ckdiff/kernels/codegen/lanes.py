"""Building blocks in LLVM IR for 64 elements at a time.

numba does not pack bits by itself, but an intrinsic can emit IR for a whole mask word: vectors of
64 lanes are loaded, compared, and the 64 one-bit results are the word. LLVM lowers that to the
machine's own compare-to-mask instructions on AVX-512, AVX2, SSE2 and NEON.

Everything here takes a builder and a DType, so that a new float format is a row in
:mod:`ckdiff.dtypes` and not a new kernel. Floats are taken apart with integer operations wherever
that is exact: results then do not depend on the CPU's denormal or rounding mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llvmlite import ir

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import LANES

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
VOID = ir.VoidType()

Value = Any  # llvmlite has no types of its own to lean on


def int_type(bits: int) -> Any:
    return ir.IntType(bits)


def vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def splat(element: Any, value: Any) -> Value:
    """A vector constant with the same value in every lane."""
    return ir.Constant(vector(element), [value] * LANES)


def as_many(lanes: Value, element: Any) -> Any:
    """The type of a vector of as many lanes as another."""
    return ir.VectorType(element, lanes.type.count)


def in_each(lanes: Value, element: Any, value: Any) -> Value:
    """A constant of as many lanes as a vector, with the same value in every lane."""
    return ir.Constant(as_many(lanes, element), [value] * lanes.type.count)


def spread(b: Any, value: Value, count: int = LANES) -> Value:
    """A vector of so many lanes with the same value, which is not known yet, in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = b.insert_element(undefined, value, I32(0))
    return b.shuffle_vector(first, undefined, in_each(first, I32, 0))


def call_at(b: Any, result: Any, address: Value, args: Sequence[Value]) -> Value:
    """Call a C function that is at an address: the type of its result, its arguments."""
    kind = ir.FunctionType(result, [value.type for value in args])
    return b.call(b.inttoptr(address, kind.as_pointer()), args)


def lane_bits(dtype: DType) -> int:
    """Width of the integer lanes that hold one element: its own, 8 for sub-byte types."""
    return max(dtype.bits, 8)


def word_bytes(dtype: DType) -> int:
    """Bytes of the 64 elements behind one mask word."""
    return LANES * dtype.bits // 8


def load_bits(b: Any, dtype: DType, address: Value) -> Value:
    """The 64 elements at ``address`` (an i64, any alignment) as integer lanes."""
    if dtype.bits >= 8:
        pointer = b.inttoptr(address, vector(int_type(dtype.bits)).as_pointer())
        return b.load(pointer, align=1)
    # Sub-byte: element i starts at bit i*bits. Fetch its byte and the next one, shift, mask.
    size = word_bytes(dtype)
    packed = b.load(b.inttoptr(address, ir.VectorType(I8, size).as_pointer()), align=1)
    index = [i * dtype.bits // 8 for i in range(LANES)]
    undefined = ir.Constant(ir.VectorType(I8, size), ir.Undefined)

    def gather(positions: list[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, LANES), positions)
        return b.zext(b.shuffle_vector(packed, undefined, mask), vector(I16))

    high = b.shl(gather([min(i + 1, size - 1) for i in index]), splat(I16, 8))
    pair = b.or_(gather(index), high)
    shifts = ir.Constant(vector(I16), [i * dtype.bits % 8 for i in range(LANES)])
    element = b.and_(b.lshr(pair, shifts), splat(I16, (1 << dtype.bits) - 1))
    return b.trunc(element, vector(I8))


def sign_mask(dtype: DType) -> int:
    return 1 << (dtype.bits - 1)


def infinity(dtype: DType) -> int:
    """The bits of +inf, or what would be +inf's place, in an IEEE-like format."""
    return ((1 << dtype.exponent) - 1) << dtype.mantissa


def magnitude(b: Any, dtype: DType, bits: Value) -> Value:
    """The bits without the sign: ordered like the absolute values."""
    return b.and_(bits, in_each(bits, int_type(dtype.bits), sign_mask(dtype) - 1))


def nonfinite(b: Any, dtype: DType, bits: Value) -> Value:
    """i1 lanes: infinity or NaN."""
    lane = int_type(dtype.bits)
    if dtype.special == "fnuz":
        return b.icmp_unsigned("==", bits, in_each(bits, lane, sign_mask(dtype)))
    limit = infinity(dtype) if dtype.special == "ieee" else sign_mask(dtype) - 1
    return b.icmp_unsigned(">=", magnitude(b, dtype, bits), in_each(bits, lane, limit))


def compute_type(dtype: DType) -> Any:
    """float32 for 8- and 16-bit floats and F32, float64 for F64."""
    return F64 if dtype.bits == 64 else F32


def to_float(b: Any, dtype: DType, bits: Value) -> Value:
    """The value of each lane in the compute type; exact for every format. Any number of lanes."""
    if dtype.name in ("F32", "F64"):
        return b.bitcast(bits, as_many(bits, compute_type(dtype)))
    const, single = partial(in_each, bits, I32), as_many(bits, F32)
    wide = b.zext(bits, as_many(bits, I32))
    if dtype.name == "BF16":
        return b.bitcast(b.shl(wide, const(16)), single)
    mag = b.and_(wide, const(sign_mask(dtype) - 1))
    sign = b.shl(b.lshr(wide, const(dtype.bits - 1)), const(31))
    drop = 23 - dtype.mantissa
    normal = b.add(b.shl(mag, const(drop)), const((127 - dtype.bias) << 23))
    # A subnormal is its mantissa times a power of two: both steps are exact in float32.
    scale = in_each(bits, F32, 2.0 ** (1 - dtype.bias - dtype.mantissa))
    tiny = b.bitcast(b.fmul(b.uitofp(mag, single), scale), wide.type)
    is_tiny = b.icmp_unsigned("<", mag, const(1 << dtype.mantissa))
    out = b.select(is_tiny, tiny, normal)
    if dtype.special == "ieee":
        special = b.or_(b.shl(mag, const(drop)), const(0x7F800000))
    else:
        special = const(0x7FC00000)
    out = b.select(nonfinite(b, dtype, bits), special, out)
    return b.bitcast(b.or_(out, sign), single)


def distance(b: Any, dtype: DType, x: Value, y: Value) -> Value:
    """How many representable values apart, as unsigned lanes of the same width.

    Floats: sign and magnitude as one ordered line on which both zeros are 0. Integers: |x - y|,
    which always fits the unsigned type.
    """
    if dtype.kind == "float":
        mx, my = magnitude(b, dtype, x), magnitude(b, dtype, y)
        apart = b.select(b.icmp_unsigned(">", mx, my), b.sub(mx, my), b.sub(my, mx))
        zero = splat(int_type(dtype.bits), 0)
        opposite = b.icmp_signed("<", b.xor(x, y), zero)
        return b.select(opposite, b.add(mx, my), apart)
    compare = b.icmp_signed if dtype.kind == "int" else b.icmp_unsigned
    return b.select(compare(">", x, y), b.sub(x, y), b.sub(y, x))


def round_to(b: Any, source: DType, target: DType, bits: Value) -> Value:
    """Round each lane to ``target``: nearest-even, overflow to inf, every NaN to one NaN.

    In one step, with integers: rounding F64 through F32 to BF16 would round twice.
    """
    if source.mantissa < target.mantissa or source.exponent < target.exponent:
        # F16 and BF16 to each other: exact in F32 first, then one rounding.
        wide = b.bitcast(to_float(b, source, bits), vector(I32))
        return round_to(b, DTYPES["F32"], target, wide)
    lane = int_type(source.bits)

    def const(value: int) -> Value:
        return splat(lane, value)

    cut = source.mantissa - target.mantissa
    mag = magnitude(b, source, bits)
    rounded = round_magnitude(b, source, target, mag, infinity(target))
    sign = b.lshr(b.and_(bits, const(sign_mask(source))), const(source.bits - target.bits))
    rounded = b.or_(rounded, sign)
    nan = const(infinity(target) | 1 << (target.mantissa - 1))
    is_nan = b.icmp_unsigned(">", mag, const(infinity(source)))
    rounded = b.select(is_nan, nan, rounded)
    return b.trunc(rounded, vector(int_type(target.bits))) if cut else rounded


def round_magnitude(b: Any, source: DType, target: DType, mag: Value, top: int) -> Value:
    """The magnitudes of ``target`` nearest to those of ``source``, ties to even, at most ``top``.

    In the source's lanes. ``source`` has no fewer bits of mantissa and exponent and no smaller
    bias. What is infinite or no number becomes ``top``.
    """
    lane = int_type(source.bits)

    def const(value: int) -> Value:
        return splat(lane, value)

    cut = source.mantissa - target.mantissa
    rebias = source.bias - target.bias
    shifted = b.sub(mag, const(rebias << source.mantissa))
    odd = b.and_(b.lshr(shifted, const(cut)), const(1))
    rounded = b.lshr(b.add(b.add(shifted, const((1 << (cut - 1)) - 1)), odd), const(cut))
    rounded = b.select(b.icmp_unsigned(">", rounded, const(top)), const(top), rounded)
    if not rebias:
        return rounded
    # Too small to be normal in the target: shift the whole significand, further the smaller.
    exponent = b.lshr(mag, const(source.mantissa))
    zero, one = const(0), const(1)
    is_subnormal = b.icmp_unsigned("==", exponent, zero)
    implicit = b.select(is_subnormal, zero, const(1 << source.mantissa))
    significand = b.or_(b.and_(mag, const((1 << source.mantissa) - 1)), implicit)
    shift = b.sub(const(cut + rebias + 1), b.select(is_subnormal, one, exponent))
    # one bit above the significand: everything there rounds to zero
    most = const(source.mantissa + 2)
    small = b.icmp_unsigned("<=", exponent, const(rebias))
    shift = b.select(b.icmp_unsigned("<", shift, most), shift, most)
    shift = b.select(small, shift, one)  # keeps unused lanes away from undefined shifts
    half = b.sub(b.shl(one, b.sub(shift, one)), one)
    odd = b.and_(b.lshr(significand, shift), one)
    tiny = b.lshr(b.add(b.add(significand, half), odd), shift)
    return b.select(small, tiny, rounded)
