"""Content hashes: XXH3-128 of fixed units of 512 elements, added up with a weight by position.

Chunks end at multiples of 512 elements and so do units, which lets any chunk of a tensor be
hashed alone, in any order, and the parts be added:

    H = sum over units u of  XXH3_128(unit u) * weight(u)      (both 64-bit halves, mod 2**64)
    digest = XXH3_128(H.low, H.high, number of bytes; all little-endian 64-bit)

``weight(u)`` is the splitmix64 finaliser of u, made odd. The hash detects accidents; it is not
cryptographic. The driver calls the xxhash library's C function straight from the kernel loop.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache

import numpy as np
import xxhash

from ckdiff.kernels.memory import Int64, UInt64

UNIT = 512  #: elements of one hashed unit
_MASK = (1 << 64) - 1


@cache
def xxh3_128_address() -> int:
    """Address of the library's ``XXH3_128bits(const void *, size_t)``, or 0 if not exported."""
    try:
        import xxhash._xxhash as _xxhash  # type: ignore[import-not-found]

        library = ctypes.CDLL(_xxhash.__file__)
    except (ImportError, OSError):
        return 0
    # the dispatching one uses AVX2 and AVX-512 where the CPU has them: twice as fast
    for name in ("XXH3_128bits_dispatch", "XXH3_128bits"):
        function = getattr(library, name, None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def weight(unit: int) -> int:
    """The odd 64-bit weight of the unit at position ``unit``."""
    x = (unit + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) | 1


def add_units(data: memoryview, first: int, unit_bytes: int) -> tuple[int, int]:
    """(low, high) sums over the units of ``data``, the first being unit ``first``.

    The slow twin of what the driver does, and what runs where the C function cannot be found.
    """
    low = high = 0
    for i, start in enumerate(range(0, len(data), unit_bytes)):
        digest = xxhash.xxh3_128_intdigest(data[start : start + unit_bytes])
        factor = weight(first + i)
        low += (digest & _MASK) * factor
        high += (digest >> 64) * factor
    return low & _MASK, high & _MASK


def finish_all(sums: UInt64, nbytes: Int64) -> list[str]:
    """``finish`` of n tensors: ``sums`` (n, 2) are their low and their high sums."""
    packed = np.empty((len(nbytes), 3), "<u8")
    packed[:, :2], packed[:, 2] = sums, nbytes
    data, digest = packed.tobytes(), xxhash.xxh3_128_hexdigest
    return [digest(data[at : at + 24]) for at in range(0, len(data), 24)]


def finish(low: int, high: int, nbytes: int) -> str:
    """The tensor's content hash: 32 hex digits."""
    packed = struct.pack("<3Q", low & _MASK, high & _MASK, nbytes)
    return str(xxhash.xxh3_128_hexdigest(packed))
