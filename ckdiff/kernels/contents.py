"""Content hashes of bytes in memory, as the driver computes them while it compares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.kernels import hashing
from ckdiff.kernels.compiled import c_function


class ContentHasher:
    """Adds up windows of a tensor; immutable, shared by all workers."""

    def __init__(self) -> None:
        self._xxh3 = hashing.xxh3_128_address()
        self._add = c_function("hash").ctypes if self._xxh3 else None

    def add(
        self, sums: npt.NDArray[np.uint64], address: int, size: int, start: int, bits: int
    ) -> None:
        """Add ``size`` bytes at ``address`` to ``sums`` (low, high).

        They lie ``start`` bytes into the tensor, a multiple of a unit of its elements, which have
        ``bits`` bits.
        """
        unit_bytes = hashing.UNIT * bits // 8
        first = start // unit_bytes
        if self._add is not None:
            self._add(address, size, first, unit_bytes, sums.ctypes.data, self._xxh3)
        else:
            sums += np.array(hashing.add_units_at(address, size, first, bits), np.uint64)
