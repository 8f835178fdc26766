"""Binades: cells of similar magnitude. A rounding step is as large as the binade says."""

from __future__ import annotations

from ckdiff.dtypes import DType

WAYS = 4  #: histograms that the kernel fills side by side


def bins(dtype: DType) -> int:
    """How many cells the elements of a dtype fall into.

    Floats: 0 holds the zeros, 1 the subnormals, then one for each exponent, the last with
    infinities and NaN. Integers: 0 holds the zeros, k the values with 2**(k-1) <= |x| < 2**k. What
    has no magnitude (bool, complex, sub-byte, E8M0) has one cell.
    """
    if dtype.kind == "float":
        return (1 << dtype.exponent) + 1
    return dtype.bits + 1 if dtype.kind in ("int", "uint") else 1
