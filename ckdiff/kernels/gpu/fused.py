"""Comparing a piece under all rules in one launch, with Triton.

Both sides are read once, and nothing but masks and counts is written: no intermediate result goes
through device memory. Importing this imports Triton; what Triton cannot do is left to the caller,
who has the same in torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ckdiff.dtypes import DType
from ckdiff.kernels.binding import Bound, parse_kind
from ckdiff.kernels.gpu.bits import RAW
from ckdiff.kernels.gpu.changes import needs_table, number, rational
from ckdiff.kernels.gpu.fusedcode import BLOCK, MOST_RULES, RULE_COLUMNS, compare
from ckdiff.kernels.hashing import UNIT

__all__ = ["OPTIONS", "Fused", "describe"]

#: how the code is compiled: a product that is contracted with a sum is rounded once, not twice
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

_UNSIGNED = {16: torch.uint16, 32: torch.uint32, 64: torch.uint64}

Described = tuple[tuple[str | int, ...], int, int]


class Fused:
    """All rules on the elements of one dtype. ``supports`` says whether there is such a thing.

    ``table`` holds a bit for each rule and pair of 8-bit elements, on the device, where there are
    rules that need one.
    """

    def __init__(
        self,
        dtype: DType,
        bounds: Sequence[Bound],
        device: torch.device,
        table: torch.Tensor | None,
    ) -> None:
        described = [describe(bound, dtype) for bound in bounds]
        self._bits = dtype.bits
        self._rules = tuple(column for rule, _, _ in described for column in rule)
        raw = RAW[max(dtype.bits, 8)]
        self._raw = _UNSIGNED.get(dtype.bits, raw) if dtype.kind == "uint" else raw
        numbers = np.array([two for _, *two in described], np.uint64).view(np.int64)
        self._parameters = torch.from_numpy(numbers).to(device)
        self._table = torch.zeros(1, dtype=torch.uint8, device=device) if table is None else table

    @staticmethod
    def supports(bounds: Sequence[Bound]) -> bool:
        """Whether so many rules are evaluated at once."""
        return len(bounds) <= MOST_RULES

    def __call__(
        self, base: torch.Tensor, tuned: torch.Tensor, masks: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Compare: ``base`` and ``tuned`` are uint8, the stored bytes, a multiple of 512 elements.

        ``masks`` is uint8 (rules, elements / 8), ``counts`` int32 (rules, elements / 512), both
        contiguous. Raises whatever Triton raises.
        """
        n = counts.shape[1] * UNIT
        compare[(-(-n // BLOCK),)](
            base.view(self._raw),
            tuned.view(self._raw),
            masks,
            counts,
            self._table,
            self._parameters,
            n,
            BITS=self._bits,
            RULES=self._rules,
            LOOKUP="table" in self._rules,
            N=BLOCK,
            **OPTIONS,
        )


def describe(bound: Bound, dtype: DType) -> Described:
    """(what the code is compiled for, as in fusedcode; two parameters that are not)."""
    of, target, name = parse_kind(bound.kind)
    if needs_table(bound, dtype):
        return ("table", *[0] * (RULE_COLUMNS.value - 1)), 0, 0
    seen = target or of
    formats = [
        part
        for known in (of, seen)
        for part in (known.kind, known.bits, known.exponent, known.mantissa, known.bias)
    ]
    numbers = bound.parameter, 0
    if name in ("atol", "rtol"):
        if seen.kind != "float":
            m, s = rational(bound.parameter)
            if seen.kind == "uint" and m >> s:  # as far apart as two unsigned numbers can be
                name, numbers = "ulp", ((1 << seen.bits) - 1, 0)
            else:
                numbers = m, min(s, 127)  # nothing is left of the product from there on
        elif seen.bits < 64:
            single = np.float32(number(bound.parameter, seen))
            numbers = int(single.view(np.uint32)), 0
    return (name, *formats), *numbers
