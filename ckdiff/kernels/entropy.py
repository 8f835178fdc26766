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


def encode(piece: Bytes, codes: npt.NDArray[np.uint32], out: Bytes) -> list[memoryview]:
    """The four streams of a piece of PIECE bytes, which lie in ``out``, of OUTPUT bytes.

    ``codes`` has an entry for each pair of bytes.
    """
    c_function("encode").ctypes(
        place(piece, U8, PIECE), place(codes, U32, 1 << 16), room(out, U8, OUTPUT), ROOM
    )
    sizes = out[:32].view(np.int64).tolist()
    return [out.data[32 + i * ROOM : 32 + i * ROOM + size] for i, size in enumerate(sizes)]
