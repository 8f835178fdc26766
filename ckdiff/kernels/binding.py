"""Naming kernels: a rule and a dtype become a *kind* and one 64-bit parameter.

A kind is ``DTYPE[>TARGET]:RULE``: ``W16:exact`` (any 16-bit element), ``F32:atol``,
``F32>BF16:ulp``.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from ckdiff.dtypes import DTYPES, DType
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
