"""Comparing and hashing the rows of a table under all rules in one launch, with Triton.

Both sides are read once to be compared, and right after it, from the caches, to be hashed. Nothing
but masks, counts and digests is written: no intermediate result goes through device memory.
Importing this imports Triton.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ckdiff.dtypes import DType
from ckdiff.kernels.binding import Bound, parse_kind
from ckdiff.kernels.gpu.compactcode import compact
from ckdiff.kernels.gpu.fusedcode import MOST_RULES, RULE_COLUMNS, compare
from ckdiff.kernels.gpu.hashcode import words_of
from ckdiff.kernels.gpu.tables import Table

__all__ = ["MOST_RULES", "Fused", "describe", "needs_table"]

#: how the code is compiled: a product that is contracted with a sum is rounded once, not twice
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

Tensor = torch.Tensor
Described = tuple[tuple[str | int, ...], int, int]


class Fused:
    """At most MOST_RULES rules on the elements of one dtype.

    ``table`` holds a bit for each rule and pair of 8-bit elements, on the device, where there are
    rules that need one.
    """

    def __init__(
        self, dtype: DType, bounds: Sequence[Bound], device: torch.device, table: Tensor | None
    ) -> None:
        described = [describe(bound, dtype) for bound in bounds]
        self.rules = len(bounds)
        columns = tuple(column for rule, _, _ in described for column in rule)
        numbers = np.array([two for _, *two in described], np.uint64).view(np.int64)
        self._parameters = torch.from_numpy(numbers).to(device)
        words = np.array(words_of(dtype.bits), np.uint64).view(np.int64)
        self._words = torch.from_numpy(words).to(device)
        self._table = torch.zeros(1, dtype=torch.int32, device=device) if table is None else table
        sign = "u" if dtype.kind == "uint" or dtype.bits <= 8 else ""
        self._constants: dict[str, Any] = {
            "ELEMENT": getattr(tl, f"{sign}int{max(dtype.bits, 8)}"),  # what it is read as
            "BITS": dtype.bits,
            "RULES": columns,
            "LOOKUP": "table" in columns,
        }

    def __call__(
        self, table: Table, masks: Tensor | None, counts: Tensor, sums: Tensor | None
    ) -> None:
        """Compare what ``table``, on the device, says.

        ``masks`` is uint8 (rules, bytes), ``counts`` int32 (rules, programs), ``sums`` int64 (4,
        programs), all contiguous. Of masks whole units are written. ``sums`` are those of digests
        of whole units with their weights: low and high halves of base and tuned, modulo 2**64;
        for them, addresses are multiples of 8. Raises whatever Triton raises.
        """
        compare[(table.programs,)](
            **table.arguments(),
            masks=counts if masks is None else masks,
            counts=counts,
            sums=counts if sums is None else sums,
            table=self._table,
            parameters=self._parameters,
            words=self._words,
            programs=table.programs,
            width=0 if masks is None else masks.shape[1],
            MASKS=masks is not None,
            HASHES=sums is not None,
            ALIGNED=table.aligned,
            **self._constants,
            **_OPTIONS,
        )

    def move(self, table: Table, mask: Tensor, ends: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Write where a mask of the table's only row has ones, and what elements are there.

        ``ends`` is int64 (programs,), the ones of each program and of all before it; ``out`` int64
        and raw bits, as many as there are ones. Of elements of 8 bits or more.
        """
        compact[(table.programs,)](
            **table.arguments(), masks=mask.view(torch.int32), ends=ends, positions=out[0],
            values=out[1], ELEMENT=self._constants["ELEMENT"], num_warps=1,
        )  # fmt: skip


def needs_table(bound: Bound, dtype: DType) -> bool:
    """Whether pairs are looked up: the numeric rules of 8-bit types."""
    return dtype.bits == 8 and not bound.kind.endswith(":exact")


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
            m, s = _rational(bound.parameter)
            if seen.kind == "uint" and m >> s:  # as far apart as two unsigned numbers can be
                name, numbers = "ulp", ((1 << seen.bits) - 1, 0)
            else:
                numbers = m, min(s, 127)  # nothing is left of the product from there on
        elif seen.bits < 64:
            (value,) = struct.unpack("<d", bound.parameter.to_bytes(8, "little"))
            numbers = int(np.float32(value).view(np.uint32)), 0
    return (name, *formats), *numbers


def _rational(parameter: int) -> tuple[int, int]:
    """(m, s) of the float64 with these bits, m * 2**-s; of R < 2, m < 2**53 and s >= 52."""
    exponent = parameter >> 52 & 0x7FF
    mantissa = parameter & (1 << 52) - 1
    return mantissa | (1 << 52 if exponent else 0), 1075 - max(exponent, 1)
