"""One frame of a packed delta: two windows of a tensor in, bytes out; and back.

    frame    0, numbers, streams; or 1, numbers, planes, for a window that has no base
    numbers  classes, shift, extra bits; then for each class
               its least magnitude >> shift (the first one's is 0 and left out)
               elements; changed ones; mode | paired << 2 | low bits << 3
               mode bits: stored size of the bits; mode gaps: gap bytes and their stored size
               symbols: stored size; if paired, the number of the rest and its stored size
    streams  extra bits; then for each class, as far as it has them: bits, or gap bytes and the low
             bits of gaps; symbols; rest

A stream is stored as it is where its stored size is its size, and is a zstd frame otherwise. What
the streams mean is said in docs/delta-format.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES, DType

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

FRAME_BYTES = 1 << 23  #: of one side, at most
FRAME_LANES = 1 << 22  #: elements, at most
CHANGES, WHOLE = 0, 1  #: kinds of frames
EMPTY, FULL, BITS, GAPS = range(4)  #: modes of positions; gaps are between the rarer bits
LONGEST_LOW = 32  #: low bits of a gap
SLACK = 72  #: kernels read and write whole words and lanes


class Form:
    """How the elements of a dtype are seen by the kernels."""

    def __init__(self, dtype: DType) -> None:
        # complex numbers are pairs of floats; sub-byte elements are compared as bytes
        bits = 32 if dtype.name == "C64" else max(dtype.bits, 8)
        ordered = dtype.kind == "float" or dtype.name == "C64"
        self.kind = f"{bits}{'f' if ordered else 'i'}"
        self.bytes = bits // 8  #: of one lane
        #: bytes of a whole frame; a multiple of what any number of hashed units takes
        self.frame = 3 << 20 if dtype.bits == 6 else min(FRAME_BYTES, FRAME_LANES * self.bytes)
        mantissa = 23 if dtype.name == "C64" else dtype.mantissa
        #: magnitudes are told apart by their highest bits: at least the exponent's
        self.shift = min(mantissa, max(0, bits - 9)) if ordered else 0
        self.bins = 1 << (bits - 1 - self.shift) if ordered else 0


_FRAME_ROOM, _LANE_ROOM = 4096, 5  # bytes of a frame besides extra bits: at all, and of each lane


def largest_frame(nbytes: Int64, lane: Int64) -> Int64:
    """The most bytes that the frames of windows of ``nbytes`` can have, their lanes so wide.

    Extra bits are fewer than the window's. Of each lane there are at most 1.5 bytes of symbols and
    rest; and of marked lanes, at most half, 4 bytes of low bits and a byte of gaps and its share.
    """
    sizes: Int64 = nbytes + _LANE_ROOM * (nbytes // lane) + _FRAME_ROOM
    return sizes


FORMS = {name: Form(dtype) for name, dtype in DTYPES.items()}
