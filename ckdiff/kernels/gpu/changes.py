"""Which elements changed under a rule, and bools packed into bits, in torch operations.

Rules reach this module as the kernels know them (:mod:`ckdiff.kernels.binding`). For 8-bit types a
numeric rule is a table of all 65,536 pairs, which the CPU's kernels fill.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from ckdiff.dtypes import DType
from ckdiff.kernels.binding import Bound, parse_kind
from ckdiff.kernels.gpu import bits

__all__ = [
    "PAIRS",
    "changed",
    "needs_table",
    "number",
    "rational",
    "scratch_bytes",
    "write_bits",
]

Tensor = torch.Tensor

PAIRS = 1 << 16  #: pairs of 8-bit elements; a pair's number is ``base * 256 + tuned``

#: A product that moves the lowest bits of 8 bytes, first byte lowest, into the highest byte.
_GATHER = 0x0102040810204080


def changed(
    bound: Bound,
    dtype: DType,
    base: Tensor,
    tuned: Tensor,
    *,
    exact: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """bool, one an element: changed under a rule bound to ``dtype``.

    ``base`` and ``tuned`` are uint8, the stored bytes of the elements. ``exact`` is the result
    under ``exact`` where it is known; it is not written to. ``table``, bool (PAIRS,), is needed
    where :func:`needs_table` says so.
    """
    of, target, rule = parse_kind(bound.kind)
    if rule == "exact" and target is None:
        if exact is not None:
            return exact
        if dtype.bits < 8:
            return _differing_parts(dtype, base, tuned)
    if table is not None:
        pair = base.to(torch.int32).mul_(256).add_(tuned)
        return table.index_select(0, pair)
    x, y = base.view(bits.RAW[dtype.bits]), tuned.view(bits.RAW[dtype.bits])
    if target is not None:
        x, y = bits.round_to(dtype, target, x), bits.round_to(dtype, target, y)
        of, exact = target, None
    differ = exact if exact is not None else x != y
    if rule == "exact":
        return differ
    return _far(rule, of, x, y, bound.parameter).logical_and_(differ)


def needs_table(bound: Bound, dtype: DType) -> bool:
    """Whether ``changed`` looks pairs up."""
    return dtype.bits == 8 and not bound.kind.endswith(":exact")


def _far(rule: str, dtype: DType, x: Tensor, y: Tensor, parameter: int) -> Tensor:
    """Further apart than the rule allows, of elements whose bits differ."""
    if rule == "ulp":
        far = bits.above(bits.distance(dtype, x, y), parameter, dtype.bits)
        if dtype.kind == "float":
            far |= bits.is_nonfinite(dtype, x)
            far |= bits.is_nonfinite(dtype, y)
        return far
    if dtype.kind != "float":
        return _integer_rtol(dtype, x, y, parameter)
    # rounded to the compute type once; binding sees to it that it does not overflow
    bound = number(parameter, dtype)
    p, q = bits.to_float(dtype, x), bits.to_float(dtype, y)
    delta = (p - q).abs_()
    if rule == "atol":
        return (delta <= bound).logical_not_()  # a NaN is further than any T
    largest = torch.maximum(p.abs(), q.abs())  # NaN where either is
    finite = torch.isfinite(largest)
    # inf > R*inf is false, yet an infinity differs from everything but itself
    return (delta > largest.mul_(bound)).logical_or_(finite.logical_not_())


def _integer_rtol(dtype: DType, x: Tensor, y: Tensor, parameter: int) -> Tensor:
    """|x - y| > R * max(|x|, |y|); for a whole left side the right side may be rounded down."""
    m, s = rational(parameter)
    if dtype.kind == "uint" and m >> s:  # R >= 1, and two unsigned numbers are no further apart
        return torch.zeros_like(x, dtype=torch.bool)
    apart = bits.distance(dtype, x, y).to(torch.int64)
    flip = -(1 << 63)
    limit = bits.scaled(bits.larger(dtype, x, y), m, s)
    return apart.bitwise_xor(flip) > limit.bitwise_xor_(flip)


def _differing_parts(dtype: DType, base: Tensor, tuned: Tensor) -> Tensor:
    """For elements of 4 or 6 bits: which differ. 4 bits are two a byte, 6 bits four in 3 bytes."""
    differ = base ^ tuned
    if dtype.bits == 4:
        return torch.stack([(differ & 15) != 0, differ > 15], dim=1).view(-1)
    triples = differ.view(-1, 3).to(torch.int32)
    whole = triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16
    return torch.stack([(whole & 63 << 6 * k) != 0 for k in range(4)], dim=1).view(-1)


def write_bits(flags: Tensor, out: Tensor, counts: Tensor) -> None:
    """Pack bools, a multiple of 512, and count them.

    ``out`` is uint8 (flags / 8,), little-endian bit order; ``counts`` is int32 (flags / 512,).
    """
    words = flags.view(torch.int64)
    # eight counts of at most 64 in the bytes of each sum
    sums = torch.sum(words.view(-1, 64), dim=1).view(torch.uint8)
    torch.sum(sums.view(-1, 8), dim=1, dtype=torch.int32, out=counts)
    out.copy_((words * _GATHER).view(torch.uint8)[7::8])


def scratch_bytes(bound: Bound, dtype: DType) -> int:
    """Bytes of intermediate results for each element, at most."""
    of, target, rule = parse_kind(bound.kind)
    if rule == "exact" and target is None:
        return 3 if dtype.bits >= 8 else 8
    if dtype.bits == 8:
        return 6
    if target is not None:
        return 90
    if rule == "rtol" and of.kind != "float":
        return 92
    return 26 if of.bits == 16 else 44


def number(parameter: int, dtype: DType) -> float:
    """The float64 with these bits, rounded to the compute type of ``dtype``."""
    (value,) = struct.unpack("<d", parameter.to_bytes(8, "little"))
    return float(np.float32(value)) if dtype.bits < 64 else float(value)


def rational(parameter: int) -> tuple[int, int]:
    """(m, s) of the float64 with these bits, m * 2**-s; of R < 2, m < 2**53 and s >= 52."""
    exponent = parameter >> 52 & 0x7FF
    mantissa = parameter & (1 << 52) - 1
    return mantissa | (1 << 52 if exponent else 0), 1075 - max(exponent, 1)
