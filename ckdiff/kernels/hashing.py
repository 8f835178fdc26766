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

#: what XXH3 mixes into the data, the eight numbers that its sums begin with
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip


def secret_words(first: int, count: int) -> tuple[int, ...]:
    """So many words of the secret, from a byte on."""
    cut = SECRET[first : first + 8 * count]
    return tuple(int.from_bytes(cut[i : i + 8], "little") for i in range(0, 8 * count, 8))


def starts(size: int) -> tuple[int, int]:
    """What both halves of the digest of so many bytes begin with."""
    return size * START[1] & _MASK, ~(size * START[2]) & _MASK


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
