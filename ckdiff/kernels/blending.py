"""Two arrays and a mask in, one array out: the second's elements where the mask has ones."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.compiled import c_function

_PIECE = 1 << 16  # elements that are unpacked to a byte for each bit; a multiple of eight


class Blend:
    """Blends elements of ``bits`` bits, any width there is. Shared by threads."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        # elements that share bytes are rare: they do without a kernel
        self._kernel = c_function("blend", str(bits)).ctypes if bits % 8 == 0 else None
        flags = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        #: for each byte of mask the bits of its eight elements
        self._spread = np.packbits(np.repeat(flags, bits, axis=1), axis=1, bitorder="little")

    def __call__(
        self, base: int, tuned: int, mask: int, out: int, elements: int
    ) -> tuple[int, int]:
        """Write ``elements`` elements to ``out``: tuned where the mask is 1, base where it is 0.

        All are addresses, of any alignment; ``elements`` of less than a byte fill whole bytes. The
        mask is packed little-endian, ceil(elements / 8) bytes of it are read, and bits past the
        end are ignored. ``out`` may be ``base`` or ``tuned`` itself. Gives (elements taken from
        tuned, those of them whose bits differ from the base's). Releases the GIL.
        """
        counts = np.zeros(2, np.int64)
        if self._kernel is not None:
            self._kernel(base, tuned, mask, out, elements, counts.ctypes.data)
        else:
            for first in range(0, elements, _PIECE):
                at = first * self._bits // 8
                counts += self._bits_of_bytes(
                    base + at,
                    tuned + at,
                    mask + first // 8,
                    out + at,
                    min(_PIECE, elements - first),
                )
        return int(counts[0]), int(counts[1])

    def _bits_of_bytes(
        self, base: int, tuned: int, mask: int, out: int, elements: int
    ) -> tuple[int, int]:
        size = elements * self._bits // 8
        x, y = _bytes(base, size), _bytes(tuned, size)
        chosen = _bytes(mask, -(-elements // 8)).copy()
        if elements % 8:
            chosen[-1] &= (1 << elements % 8) - 1
        changed = (x ^ y) & self._spread[chosen].reshape(-1)[:size]
        result = x ^ changed
        ctypes.memmove(out, result.ctypes.data, size)
        single = np.unpackbits(changed, bitorder="little")
        differ = single[:: self._bits].copy()
        for bit in range(1, self._bits):
            differ |= single[bit :: self._bits]
        return int(np.bitwise_count(chosen).sum()), int(np.count_nonzero(differ))


def _bytes(address: int, size: int) -> npt.NDArray[np.uint8]:
    """A copy of memory."""
    return np.frombuffer(ctypes.string_at(address, size), np.uint8)
