"""Elements as tensors of raw bits: values, distances and rounding, in torch operations.

A tensor of raw bits has the signed integer type of the elements' width, as torch has no arithmetic
on most unsigned ones. Arithmetic is done in a wider type, and on 64 bits modulo 2**64 with the
sign bit flipped to compare without sign. It is the arithmetic of
:mod:`ckdiff.kernels.codegen.lanes`, for types of 16 bits and more.

No operation here is fused with another and none divides: each result is rounded once, and the GPU
keeps subnormal numbers, so that the bits are those of the CPU.
"""

from __future__ import annotations

import torch

from ckdiff.dtypes import DTYPES, DType

__all__ = ["RAW", "above", "distance", "is_nonfinite", "round_to", "to_float", "wide"]

Tensor = torch.Tensor

#: width -> the type of raw bits
RAW = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_FLIP = -(1 << 63)  # the sign bit of an int64


def wide(dtype: DType, raw: Tensor) -> Tensor:
    """Raw bits in a type that has room for sums: integers by value, floats without sign.

    64 bits stay as they are.
    """
    if dtype.bits == 64:
        return raw
    out = raw.to(torch.int32 if dtype.bits == 16 else torch.int64)
    return out if dtype.kind == "int" else out.bitwise_and_((1 << dtype.bits) - 1)


def _narrow(dtype: DType, values: Tensor) -> Tensor:
    """The low bits as raw bits."""
    return values.to(RAW[dtype.bits])


def above(values: Tensor, limit: int, bits: int) -> Tensor:
    """Where ``values``, as :func:`distance` gives them, exceed a whole number from 0 to 2**bits."""
    if bits < 64:
        return values > limit
    return (values ^ _FLIP) > limit + _FLIP


def infinity(dtype: DType) -> int:
    """The bits of +inf of an IEEE format."""
    return ((1 << dtype.exponent) - 1) << dtype.mantissa


def magnitude(dtype: DType, raw: Tensor) -> Tensor:
    """A float's bits without the sign, wide."""
    return wide(dtype, raw) & ((1 << dtype.bits - 1) - 1)


def is_nonfinite(dtype: DType, raw: Tensor) -> Tensor:
    """Where a float is an infinity or NaN."""
    return magnitude(dtype, raw) >= infinity(dtype)


def to_float(dtype: DType, raw: Tensor) -> Tensor:
    """The values in the compute type: float32, or float64 for F64. Exact."""
    if dtype.bits == 64:
        return raw.view(torch.float64)
    if dtype.bits == 32:
        return raw.view(torch.float32)
    if dtype.name == "F16":
        return raw.view(torch.float16).to(torch.float32)
    return (raw.to(torch.int32) << 16).view(torch.float32)


def distance(dtype: DType, x: Tensor, y: Tensor) -> Tensor:
    """How many representable values apart, wide; on 64 bits a number without sign."""
    if dtype.kind == "float":
        opposite = (x ^ y) < 0
        p, q = magnitude(dtype, x), magnitude(dtype, y)
        return torch.where(opposite, p + q, (p - q).abs_())
    p, q = wide(dtype, x), wide(dtype, y)
    if dtype.bits < 64:
        return (p - q).abs_()
    order = (p > q) if dtype.kind == "int" else ((p ^ _FLIP) > (q ^ _FLIP))
    return torch.where(order, p - q, q - p)


def larger(dtype: DType, x: Tensor, y: Tensor) -> Tensor:
    """max(|x|, |y|) of integers as int64; on 64 bits a number without sign."""
    p, q = wide(dtype, x).to(torch.int64), wide(dtype, y).to(torch.int64)
    if dtype.kind == "int":
        p, q = p.abs(), q.abs()  # of the smallest int64: itself, which is right without sign
    return torch.maximum(p ^ _FLIP, q ^ _FLIP).bitwise_xor_(_FLIP)


def scaled(values: Tensor, factor: int, shift: int) -> Tensor:
    """``values * factor >> shift`` without sign; ``factor`` < 2**53, the result < 2**64.

    In limbs of 27 bits, so that no partial sum exceeds 2**63.
    """
    low = (1 << 27) - 1
    limbs = [values & low, (values >> 27) & low, (values >> 54) & ((1 << 10) - 1)]
    by = [factor & low, factor >> 27]
    out = torch.zeros_like(values)
    carry: Tensor | None = None
    for place in range(5):
        total = torch.zeros_like(values) if carry is None else carry
        for i in range(2):
            if 0 <= place - i < 3:
                total = total + limbs[place - i] * by[i]
        carry, digit = total >> 27, total.bitwise_and_(low)
        up = 27 * place - shift
        if 0 <= up < 64:
            out |= digit << up
        elif -27 < up < 0:
            out |= digit >> -up
    return out


def round_to(source: DType, target: DType, raw: Tensor) -> Tensor:
    """Round to ``target``: nearest-even in one step, overflow to inf, every NaN to one NaN.

    Gives raw bits of ``target``.
    """
    if source.mantissa < target.mantissa or source.exponent < target.exponent:
        # F16 and BF16 to each other: exact in F32 first, then one rounding
        return round_to(DTYPES["F32"], target, to_float(source, raw).view(torch.int32))
    cut = source.mantissa - target.mantissa
    rebias = source.bias - target.bias
    mag = magnitude(source, raw)
    # what becomes negative here is too small to be normal in the target, and replaced below
    rounded = _shifted(mag - (rebias << source.mantissa), cut).clamp_(max=infinity(target))
    if rebias:
        # too small to be normal in the target: shift the whole significand, further the smaller
        exponent = mag >> source.mantissa
        implicit = 1 << source.mantissa  # not of subnormal numbers, which round to zero either way
        significand = (mag & implicit - 1).bitwise_or_(implicit)
        # one bit above the significand: everything there rounds to zero
        by = (cut + rebias + 1 - exponent).clamp_(1, source.mantissa + 2)
        tiny = _shifted(significand, by)
        rounded = torch.where(exponent <= rebias, tiny, rounded)
    rounded |= (raw < 0).to(torch.int64) << target.bits - 1
    nan = infinity(target) | 1 << (target.mantissa - 1)
    rounded.masked_fill_(mag > infinity(source), nan)
    return _narrow(target, rounded)


def _shifted(values: Tensor, by: Tensor | int) -> Tensor:
    """``values / 2**by`` to the nearest whole number, ties to even; ``by`` is at least 1."""
    odd = (values >> by).bitwise_and_(1)
    half = (torch.ones_like(by) << by - 1) - 1 if isinstance(by, Tensor) else (1 << by - 1) - 1
    return (odd + values).add_(half) >> by
