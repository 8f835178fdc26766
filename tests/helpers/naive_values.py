"""What ckdiff makes of numbers of other dtypes, again: tables, sorted numbers and obvious loops.

Shares no code with the package. Every number of at most 32 bits is exact in float64, which is what
is computed with here.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import ml_dtypes
import naive
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Wide = npt.NDArray[Any]

#: the same dtypes in a library of others
LIBRARY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I8": np.int8,
}
#: the numbers of F4, E2M1
F4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def holds(wide: str, narrow: str) -> bool:
    """Whether all numbers of a float of 8 or 16 bits are in another dtype: by trying them."""
    every = np.arange(1 << naive.FORMATS[narrow].bits, dtype=f"u{naive.FORMATS[narrow].bits // 8}")
    known = numbers(narrow, every)
    with np.errstate(all="ignore"):
        back = known.astype(LIBRARY[wide]).astype(np.float64)
    return bool(np.array_equal(known, back, equal_nan=True))


def numbers(dtype: str, bits: Wide) -> Floats:
    """What bit patterns stand for."""
    with np.errstate(all="ignore"):
        return np.asarray(bits.view(LIBRARY[dtype]).astype(np.float64))


def wider(source: str, target: str, bits: Wide) -> Wide:
    """The bits in a dtype that holds them: numbers by the library, NaNs by their bits."""
    f, g = naive.FORMATS[source], naive.FORMATS[target]
    kind = np.dtype(f"u{g.bits // 8}")
    with np.errstate(all="ignore"):
        found = np.array(numbers(source, bits).astype(LIBRARY[target])).view(kind)
    nan = np.isnan(numbers(source, bits))
    payload = bits.astype(np.uint64) & np.uint64((1 << f.mantissa) - 1)
    moved = payload << np.uint64(g.mantissa - f.mantissa)
    if f.family == "fnuz":
        moved = np.full_like(payload, 1 << g.mantissa - 1)
    sign = (bits.astype(np.uint64) >> np.uint64(f.bits - 1)) << np.uint64(g.bits - 1)
    exponent = np.uint64((1 << g.exponent) - 1 << g.mantissa)
    return np.where(nan, (sign | exponent | moved).astype(kind), found)


@cache
def _grid(dtype: str) -> Floats:
    """The finite magnitudes of a dtype, by pattern, and what would be the next one."""
    f = naive.FORMATS[dtype]
    patterns = {"ieee": (1 << f.exponent) - 1 << f.mantissa, "fn": (1 << f.bits - 1) - 1}
    count = patterns.get(f.family, 1 << f.bits - 1)
    every = numbers(dtype, np.arange(count, dtype=f"u{f.bits // 8}"))
    return np.append(every, 2 * every[-1] - every[-2])


def nearest(source: str, target: str, bits: Wide) -> Wide:
    """The bits of the nearest number of a dtype of at most 16 bits, ties to even."""
    f, g = naive.FORMATS[source], naive.FORMATS[target]
    grid, x = _grid(target), numbers(source, bits)
    middles = (grid[:-1] + grid[1:]) / 2  # exact: one bit more than the dtype has
    low = np.searchsorted(middles, abs(x), "left")
    high = np.searchsorted(middles, abs(x), "right")  # one more on a middle
    size = np.where(low % 2 == 0, low, high).astype(np.uint64)
    top = np.uint64(1 << g.bits - 1)
    negative = bits.astype(np.uint64) >> np.uint64(f.bits - 1) != 0
    beyond = size >= len(grid) - 1
    most = {"ieee": len(grid) - 1, "fn": len(grid) - 2, "fnuz": int(top)}
    size[beyond] = most[g.family]
    nan = np.isnan(x)
    size[nan] = _nan(source, target, bits[nan])
    if g.family == "fnuz":
        negative &= size != 0
    return (size | np.where(negative, top, np.uint64(0))).astype(f"u{g.bits // 8}")


def single(bits: Wide) -> Wide:
    """The bits of the nearest float32 to float64s."""
    with np.errstate(all="ignore"):
        found = bits.view(np.float64).astype(np.float32).view(np.uint32)
    nan = np.isnan(bits.view(np.float64))
    negative = (bits[nan] >> np.uint64(63) << np.uint64(31)).astype(np.uint32)
    found[nan] = negative | _nan("F64", "F32", bits[nan]).astype(np.uint32)
    return found


def _nan(source: str, target: str, bits: Wide) -> Wide:
    """The magnitude of a NaN: the upper bits of its payload, the lowest of which is never lost."""
    f, g = naive.FORMATS[source], naive.FORMATS[target]
    if g.family != "ieee":
        return np.full(bits.shape, (1 << g.bits - 1) - (g.family == "fn"), np.uint64)
    payload = bits.astype(np.uint64) & np.uint64((1 << f.mantissa) - 1)
    if f.mantissa > g.mantissa:
        kept = payload >> np.uint64(f.mantissa - g.mantissa)
    else:
        kept = payload << np.uint64(g.mantissa - f.mantissa)
    infinity = np.uint64((1 << g.exponent) - 1 << g.mantissa)
    return np.asarray(np.maximum(kept, np.uint64(1)) | infinity)


def scale_position(at: int, shape: tuple[int, int, int], block: tuple[int, int]) -> int:
    """Which scale the element at a flat position of a stack (matrices, rows, columns) takes."""
    _, rows, columns = shape
    matrix, row, column = np.unravel_index(at, shape)
    down, across = -(-rows // block[0]), -(-columns // block[1])
    return int((matrix * down + row // block[0]) * across + column // block[1])


def values(dtype: str, data: bytes, scales: npt.NDArray[np.float32], which: list[int]) -> bytes:
    """float32(q) * float32(scale) for each element, as bytes; one NaN for all."""
    if dtype == "F4":
        halves = itertools.chain.from_iterable((byte & 15, byte >> 4) for byte in data)
        quantised = F4[list(halves)][: len(which)]
    else:
        quantised = np.frombuffer(data, LIBRARY[dtype]).astype(np.float32)
    with np.errstate(all="ignore"):
        found = quantised * scales[which]
    found[np.isnan(found)] = np.array(0x7FC00000, np.uint32).view(np.float32)
    return found.tobytes()
