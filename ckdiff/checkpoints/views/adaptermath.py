"""The arithmetic of merging a LoRA adapter, as PEFT does it on a CPU, without torch.

Every element is computed by itself and in one order, so that no result depends on the window it was
asked for in, on the number of workers or on the machine. The order is the one that torch's matrix
product has been seen to take (MKL, x86 with FMA): ``W + scaling * (B @ A)`` in float32 is then

    d = +0;  d = fma(B[i, k], A[k, j], d) for each k;  d = d * scaling;  w = round(w + d)

and for ranks above 192 the sums of runs of k, added up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.casting import narrow, widen
from ckdiff.kernels.lowrank import multiply, padded
from ckdiff.kernels.memory import Bytes

Floats = npt.NDArray[Any]

#: dtypes that weights and the matrices of adapters have here
FLOATS = ("BF16", "F16", "F32", "F64")
_ONE = np.ones((1, 1), np.float32)
_RUN = 192  # of the sum, above which torch's product adds runs up
_NUMPY: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype("<u2"),
}  # fmt: skip


def widened(data: Bytes, dtype: str) -> Floats:
    """Elements of one of ``FLOATS``, as float32, or float64 for F64; exact. May be a view."""
    if dtype in ("F32", "F64"):
        return data.view(_NUMPY[dtype])
    out = np.empty(2 * len(data), np.uint8)
    widen(data, dtype, "F32", out)
    return out.view(np.float32)


def rounded(values: Floats, dtype: str) -> Bytes:
    """The bytes of floats as elements of ``dtype``, to nearest, ties to even.

    From float64 to 16 bits by way of float32, as torch does.
    """
    with np.errstate(all="ignore"):
        held = values.astype(np.float64 if dtype == "F64" else np.float32, copy=False)
    stored = held.view(np.uint8)
    if dtype in ("F32", "F64"):
        return stored
    out = np.empty(len(stored) // 2, np.uint8)
    narrow(stored, "F32", dtype, out)
    return out


def runs(rank: int) -> list[tuple[int, int]]:
    """The runs of k that are summed by themselves: one up to rank 192, two halves, then 192s."""
    size = _RUN if rank > 2 * _RUN else -(-rank // 2) if rank > _RUN else rank
    return [(first, min(rank, first + size)) for first in range(0, rank, size)]


def product(left: Floats, right: Floats, scale: float) -> Floats:
    """``scale * (left @ right)`` in the order of this module.

    left: (rows, rank), right: (rank, columns), both float32; the same of (rows, columns) comes out,
    and the scale is rounded to it. Of float64 matrices, for float64 weights, the product and the
    sum are rounded each.
    """
    if left.dtype == np.float64:
        with np.errstate(all="ignore"):
            return _wide(left, right) * scale
    columns = right.shape[1]
    if columns != padded(columns):
        right = np.pad(right, ((0, 0), (0, padded(columns) - columns)))
    total = np.empty((left.shape[0], right.shape[1]), np.float32)
    parts = runs(left.shape[1])
    for first, last in parts:
        of = scale if len(parts) == 1 else 1.0  # what is scaled by one is as it was
        part = np.ascontiguousarray(left[:, first:last])
        multiply(part, right[first:last], of, total, total if first else None)
    if len(parts) > 1:
        flat = total.reshape(1, -1)
        multiply(_ONE, flat, scale, flat)
    return np.ascontiguousarray(total[:, :columns])


def _wide(left: Floats, right: Floats) -> Floats:
    total: Floats = left[:, 0, None] * right[0]
    for k in range(1, left.shape[1]):
        total += left[:, k, None] * right[k]
    return total


def merged(weight: Bytes, dtype: str, delta: Floats, *, round_first: bool) -> Bytes:
    """The bytes of ``weight + delta``, as elements of ``dtype``.

    The weight's bytes in row-major order, as many elements as ``delta`` has. PEFT adds a float32
    delta to the weight of a layer and rounds once; the delta of an embedding it rounds first.
    """
    flat = delta.reshape(-1)
    if round_first:
        flat = widened(rounded(flat, dtype), dtype)
    if dtype == "F64":
        with np.errstate(all="ignore"):
            return rounded(widened(weight, dtype) + flat, dtype)
    sides = np.zeros((2, 1, padded(len(flat))), np.float32)
    sides[0, 0, : len(flat)] = widened(weight, dtype)
    sides[1, 0, : len(flat)] = flat
    multiply(_ONE, sides[1], 1.0, sides[0], sides[0])
    return rounded(sides[0, 0, : len(flat)], dtype)
