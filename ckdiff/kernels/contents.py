"""Content hashes of bytes in memory, as the driver computes them while it compares."""

from __future__ import annotations

import numpy as np

from ckdiff.kernels import hashing
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import U8, U64, Bytes, UInt64, place, room


class ContentHasher:
    """Adds up windows of a tensor; immutable, shared by all workers."""

    def __init__(self) -> None:
        self._xxh3 = hashing.xxh3_128_address()
        self._add = c_function("hash").ctypes if self._xxh3 else None

    def add(self, sums: UInt64, data: Bytes, start: int, bits: int) -> None:
        """Add bytes to ``sums`` (low, high).

        They lie ``start`` bytes into the tensor, a multiple of a unit of its elements, which have
        ``bits`` bits.
        """
        unit_bytes = hashing.UNIT * bits // 8
        first = start // unit_bytes
        if self._add is not None:
            at = place(data, U8)
            self._add(at, len(data), first, unit_bytes, room(sums, U64, 2), self._xxh3)
        else:
            sums += np.array(hashing.add_units(data.data, first, unit_bytes), np.uint64)
