"""Floats of one dtype from those of another: widened without loss, or rounded.

What becomes of NaNs is said in :mod:`ckdiff.kernels.casting`. Bits are moved, and no conversion
instruction sees a NaN: those make it a quiet one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import CAST_SCRATCH, LANES, RECIPE_SCALES, RECIPE_SOURCE
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.lanes import F32, F64, I32, I64, Value, int_type, splat, vector
from ckdiff.kernels.codegen.words import copy_byte, load_word, ones, store_word


def _pair(kind: str) -> tuple[DType, DType]:
    """``BF16>F32`` -> (BF16, F32)."""
    source, _, target = kind.partition(">")
    return DTYPES[source], DTYPES[target]


def widened(b: Any, source: DType, target: DType, bits: Value) -> Value:
    """The bits in ``target``, which holds every number of ``source``, of 64 lanes of ``source``."""
    if target.name == "BF16":  # the upper half of a float32
        whole = widened(b, source, DTYPES["F32"], bits)
        return b.trunc(b.lshr(whole, splat(I32, 16)), vector(int_type(16)))
    const = partial(splat, int_type(target.bits))
    wide = b.zext(bits, vector(int_type(target.bits)))
    if source.special == "ieee" and source.exponent == target.exponent:
        return b.shl(wide, const(target.bits - source.bits))
    mag = b.and_(wide, const(lanes.sign_mask(source) - 1))
    moved = b.shl(mag, const(target.mantissa - source.mantissa))
    out = b.add(moved, const((target.bias - source.bias) << target.mantissa))
    if target.bits > 16:
        out = _with_subnormals(b, source, target, bits, out)
    else:
        out = _with_smallest(b, source, target, mag, out)
    if source.special == "fnuz":  # its NaN has no payload
        special = const(lanes.infinity(target) | 1 << (target.mantissa - 1))
    else:
        special = b.or_(moved, const(lanes.infinity(target)))
    out = b.select(lanes.nonfinite(b, source, bits), special, out)
    sign = b.shl(b.lshr(wide, const(source.bits - 1)), const(target.bits - 1))
    return b.or_(out, sign)


def _with_subnormals(b: Any, source: DType, target: DType, bits: Value, out: Value) -> Value:
    """Put in the subnormal numbers of ``source``: normal ones in F32 or F64.

    Each is its mantissa times a power of two. Both steps are exact, whatever mode the CPU is in.
    """
    compute = F64 if target.bits == 64 else F32
    mag = lanes.magnitude(b, source, bits)
    whole = b.zext(mag, vector(I32)) if source.bits < 32 else mag
    step = splat(compute, 2.0 ** (1 - source.bias - source.mantissa))
    number = b.fmul(b.sitofp(whole, vector(compute)), step)
    small = b.icmp_unsigned("<", mag, splat(int_type(source.bits), 1 << source.mantissa))
    return b.select(small, b.bitcast(number, vector(int_type(target.bits))), out)


def _with_smallest(b: Any, source: DType, target: DType, mag: Value, out: Value) -> Value:
    """Put in the numbers of an 8-bit float that are subnormal in it or in F16: eight at most."""
    const = partial(splat, int_type(target.bits))
    exponents = 1 + max(0, source.bias - target.bias)
    for size in range(exponents << source.mantissa):
        exponent, mantissa = divmod(size, 1 << source.mantissa)
        if exponent:
            mantissa |= 1 << source.mantissa
        number = mantissa * 2.0 ** (max(exponent, 1) - source.bias - source.mantissa)
        (known,) = struct.unpack("<H", struct.pack("<e", number))
        out = b.select(b.icmp_unsigned("==", mag, const(size)), const(known), out)
    return out


def _narrowed(b: Any, source: DType, target: DType, bits: Value) -> tuple[Value, Value]:
    """The bits of ``target`` nearest to 64 lanes of ``source``; i1 lanes: it is something else."""
    if source.mantissa < target.mantissa or source.exponent < target.exponent or (
        source.bias < target.bias
    ):  # fmt: skip
        bits, source = widened(b, source, DTYPES["F32"], bits), DTYPES["F32"]
    const = partial(splat, int_type(source.bits))
    mag = lanes.magnitude(b, source, bits)
    sign = b.lshr(b.and_(bits, const(lanes.sign_mask(source))), const(source.bits - target.bits))
    most = lanes.infinity(target)
    if target.special != "ieee":  # the largest number, or the NaN that a negative zero would be
        most = lanes.sign_mask(target) - (2 if target.special == "fn" else 0)
    size = lanes.round_magnitude(b, source, target, mag, most)
    if target.special == "fnuz":
        sign = b.select(b.icmp_unsigned("==", size, const(0)), const(0), sign)
    size = b.select(
        b.icmp_unsigned(">", mag, const(lanes.infinity(source))),
        _nan(b, source, target, mag), size,
    )  # fmt: skip
    out = b.trunc(b.or_(size, sign), vector(int_type(target.bits)))
    return out, b.icmp_unsigned("!=", widened(b, target, source, out), bits)


def _nan(b: Any, source: DType, target: DType, mag: Value) -> Value:
    """The magnitude in ``target`` of a NaN: as much of its payload as there is room for."""
    const = partial(splat, int_type(source.bits))
    if target.special == "fn":
        return const(lanes.sign_mask(target) - 1)
    if target.special == "fnuz":
        return const(lanes.sign_mask(target))
    kept = b.lshr(mag, const(source.mantissa - target.mantissa))
    kept = b.and_(kept, const((1 << target.mantissa) - 1))
    # what is left of it may be nothing, and that would be an infinity
    lowest = b.select(b.icmp_unsigned("==", kept, const(0)), const(1), const(0))
    return b.or_(b.or_(kept, lowest), const(lanes.infinity(target)))


def _store(b: Any, dtype: DType, bits: Value, address: Value) -> None:
    kind = vector(int_type(dtype.bits)).as_pointer()
    b.store(bits, b.inttoptr(address, kind), align=1)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _widen_word(typing: Any, kind: Any, source: Any, out: Any) -> Any:
    """Widen 64 elements."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pair = _pair(kind.literal_value)
        bits = lanes.load_bits(b, pair[0], args[1])
        _store(b, pair[1], widened(b, *pair, bits), args[2])
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _narrow_word(typing: Any, kind: Any, source: Any, out: Any) -> Any:
    """Round 64 elements; uint64: the lanes that are not what they were."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pair = _pair(kind.literal_value)
        bits, differs = _narrowed(b, *pair, lanes.load_bits(b, pair[0], args[1]))
        _store(b, pair[1], bits, args[2])
        return b.bitcast(differs, I64)

    return types.uint64(kind, types.int64, types.int64), generate


def widen_kernel(kind: str) -> Callable[..., None]:
    """Widens the elements that a recipe leads to; see the ABI."""
    source_bytes, target_bytes = (dtype.bits // 8 for dtype in _pair(kind))

    def widen(recipe: int, out: int, elements: int) -> None:
        source = load_word(recipe + 8 * RECIPE_SOURCE)
        scratch = load_word(recipe + 8 * RECIPE_SCALES)
        store_word(recipe + 8 * RECIPE_SOURCE, source + elements * source_bytes)
        words = elements // LANES
        for i in range(words):
            _widen_word(kind, source + i * LANES * source_bytes, out + i * LANES * target_bytes)
        left = elements - words * LANES
        if left:
            source += words * LANES * source_bytes
            out += words * LANES * target_bytes
            aside = scratch + CAST_SCRATCH // 2
            for i in range(left * source_bytes):
                copy_byte(scratch + i, source + i)
            _widen_word(kind, scratch, aside)
            for i in range(left * target_bytes):
                copy_byte(out + i, aside + i)

    return widen


def narrow_kernel(kind: str) -> Callable[..., int]:
    """Rounds elements and counts those that are not what they were; see the ABI."""
    source_bytes, target_bytes = (dtype.bits // 8 for dtype in _pair(kind))

    def narrow(source: int, out: int, elements: int, scratch: int) -> int:
        words = elements // LANES
        rounded = 0
        for i in range(words):
            at, to = source + i * LANES * source_bytes, out + i * LANES * target_bytes
            rounded += ones(_narrow_word(kind, at, to))
        left = elements - words * LANES
        if left:
            source += words * LANES * source_bytes
            out += words * LANES * target_bytes
            aside = scratch + CAST_SCRATCH // 2
            for i in range(left * source_bytes):
                copy_byte(scratch + i, source + i)
            # the zeros after them are exact
            rounded += ones(_narrow_word(kind, scratch, aside))
            for i in range(left * target_bytes):
                copy_byte(out + i, aside + i)
        return rounded

    return narrow
