"""Counting what is in bytes, and Huffman-coding them; see :mod:`ckdiff.stores.maskcodec`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import OUTPUT, PIECE, ROOM
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, U32, Bytes, place, room


def survey(data: Bytes) -> tuple[int, int]:
    """(bits that are set, bytes that are zero) in whole words of 8 bytes."""
    found = np.zeros(2, np.int64)
    c_function("survey").ctypes(place(data, U8), len(data) // 8, room(found, I64))
    bits, zeros = found.tolist()
    return bits, zeros


class Coder:
    """Surveys and encodes pieces of PIECE bytes. For one thread: it has buffers of its own."""

    def __init__(self, width: int = 2) -> None:
        """``width`` is how many bytes an entry of a table is for, 1 or 2."""
        self._survey = c_function("survey").ctypes
        self._encode, self._entries = c_function("encode", str(width)).ctypes, 1 << (8 * width)
        self._found, self._out = np.zeros(2, np.int64), np.empty(OUTPUT, np.uint8)
        self._sizes, self._view = self._out[:32].view(np.int64), self._out.data
        self._found_at, self._out_at = room(self._found, I64), room(self._out, U8)

    def survey(self, piece: Bytes) -> tuple[int, int]:
        """(bits that are set, bytes that are zero)."""
        self._survey(place(piece, U8, PIECE), PIECE // 8, self._found_at)
        bits, zeros = self._found.tolist()
        return bits, zeros

    def encode(self, piece: Bytes, codes: npt.NDArray[np.uint32]) -> list[memoryview]:
        """The four streams; they hold until the next piece. ``codes`` is the table."""
        self._encode(place(piece, U8, PIECE), place(codes, U32, self._entries), self._out_at, ROOM)
        sizes = self._sizes.tolist()
        return [self._view[32 + i * ROOM : 32 + i * ROOM + size] for i, size in enumerate(sizes)]
