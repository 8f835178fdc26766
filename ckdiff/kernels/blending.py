"""Two arrays and a mask in, one array out: the second's elements where the mask has ones."""

from __future__ import annotations

import numpy as np

from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, place, room

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
        self, base: Bytes, tuned: Bytes, mask: Bytes, out: Bytes, elements: int
    ) -> tuple[int, int]:
        """Write ``elements`` elements to ``out``: tuned where the mask is 1, base where it is 0.

        ``elements`` of less than a byte fill whole bytes. The mask is packed little-endian,
        ceil(elements / 8) bytes of it are read, and bits past the end are ignored. ``out`` may be
        ``base`` or ``tuned`` itself. Gives (elements taken from tuned, those of them whose bits
        differ from the base's). Releases the GIL.
        """
        size, marks = elements * self._bits // 8, -(-elements // 8)
        sides = place(base, U8, size), place(tuned, U8, size)
        where, to = place(mask, U8, marks), room(out, U8, size)
        counts = np.zeros(2, np.int64)
        if self._kernel is not None:
            self._kernel(*sides, where, to, elements, room(counts, I64))
        else:
            for first in range(0, elements, _PIECE):
                here = slice(first * self._bits // 8, min(size, (first + _PIECE) * self._bits // 8))
                some = min(_PIECE, elements - first)
                chosen = mask[first // 8 : first // 8 + -(-some // 8)].copy()
                if some % 8:
                    chosen[-1] &= (1 << some % 8) - 1
                counts += self._bits_of_bytes(base[here], tuned[here], chosen, out[here])
        return int(counts[0]), int(counts[1])

    def _bits_of_bytes(self, x: Bytes, y: Bytes, chosen: Bytes, out: Bytes) -> tuple[int, int]:
        changed = (x ^ y) & self._spread[chosen].reshape(-1)[: len(x)]
        out[:] = x ^ changed
        single = np.unpackbits(changed, bitorder="little")
        differ = single[:: self._bits].copy()
        for bit in range(1, self._bits):
            differ |= single[bit :: self._bits]
        return int(np.bitwise_count(chosen).sum()), int(np.count_nonzero(differ))
