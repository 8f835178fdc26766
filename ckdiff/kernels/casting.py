"""Floats of one dtype as floats of another: without loss, or rounded to the nearest.

Widening moves the bits of a NaN and makes nothing of them: the sign stays, the payload stands at
the upper end of the wider one, and a NaN that signals still does. The only NaN of E4M3 has all bits
of its mantissa set, and so has the upper end of what it becomes. That of E4M3FNUZ and E5M2FNUZ is
the pattern of a negative zero, without a payload: it becomes the negative quiet NaN.

Rounding is to the nearest, ties to even, in one step from any dtype, and what is too large becomes
an infinity. Where there is none, it is what torch makes of it: the largest finite number in E4M3
(448, for infinities too), and the NaN in the FNUZ dtypes, in which a zero has no sign. A NaN stays
one: it keeps its sign and the upper bits of its payload, and where those are zero the lowest is
set, so that it is no infinity and signals as before. E4M3 and the FNUZ dtypes know one payload.
"""

from __future__ import annotations

import numpy as np

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi
from ckdiff.kernels.abi import CAST_SCRATCH
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, enough, place, room

#: pairs of which whole units are compared and hashed while the first is widened to the second
FUSED = ("BF16>F32", "F16>F32")
_HEAD = abi.RECIPE_MAKER, abi.RECIPE_UNITS, abi.RECIPE_STORED


def widen(source: Bytes, dtype_from: str, dtype_to: str, out: Bytes) -> None:
    """Write the floats in ``source`` to ``out`` as those of a dtype that holds all of them.

    Both are bytes of contiguous elements, of safetensors names such as ``BF16``; ``out`` has room
    for as many and must not overlap. The same dtype is copied. Releases the GIL. Raises ValueError
    where ``dtype_to`` does not hold the numbers of ``dtype_from``, where bytes are no whole
    elements and where there is no room, and TypeError for arrays of something else.
    """
    if dtype_from == dtype_to:
        place(source, U8)
        room(out, U8, len(source))
        out[: len(source)] = source
        return
    if not DTYPES[dtype_to].holds(DTYPES[dtype_from]):
        raise ValueError(f"{dtype_to} does not hold all of {dtype_from}")
    elements, scratch = _whole(source, dtype_from), np.empty(CAST_SCRATCH, np.uint8)
    written = room(out, U8, elements * DTYPES[dtype_to].bits // 8)
    recipe = np.zeros(abi.RECIPE_FIELDS, np.int64)
    recipe[abi.RECIPE_SOURCE], recipe[abi.RECIPE_SCALES] = place(source, U8), room(scratch, U8)
    kernel = c_function("widen", f"{dtype_from}>{dtype_to}")
    kernel.ctypes(room(recipe, I64), written, elements)


def head(dtypes: tuple[str, str], values: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What the recipes of both sides of a pair begin with, which is compared as floats of a dtype
    that holds both. Raises ValueError where it does not.
    """
    for dtype in dtypes:
        if dtype != values and not DTYPES[values].holds(DTYPES[dtype]):
            raise ValueError(f"{values} does not hold all of {dtype}")
    fused = next((f"{dtype}>{values}" for dtype in dtypes if dtype != values), "")
    units = c_function("units", fused).address if values in dtypes and fused in FUSED else 0
    base, tuned = (
        (
            0 if dtype == values else c_function("widen", f"{dtype}>{values}").address,
            units,
            DTYPES[dtype].bits,
        )
        for dtype in dtypes
    )
    return base, tuned


class Rooms:
    """What a driver has values of both sides widened into, a block at a time; of one thread."""

    def __init__(self) -> None:
        self._scratch = np.empty(CAST_SCRATCH, np.uint8)
        self._rooms = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def recipes(self, side: int, heads: Int64, elements: Int64, sources: Int64, bits: int) -> Int64:
        """Recipes for spans of a side (0 or 1), one each: what they begin with, as ``head`` gives
        it, how many elements they have and where a reader has put them. ``bits`` are those of the
        widest value. Good for one walk, while this is there.
        """
        self._rooms[side] = enough(self._rooms[side], room_bytes(bits))
        table: Int64 = np.zeros((len(heads), abi.RECIPE_FIELDS), np.int64)
        table[:, _HEAD] = heads
        table[:, abi.RECIPE_LEFT], table[:, abi.RECIPE_SOURCE] = elements, sources
        table[:, abi.RECIPE_ROOM] = room(self._rooms[side], U8)
        table[:, abi.RECIPE_SCALES] = room(self._scratch, U8)
        return table


def room_bytes(bits: int) -> int:
    """Bytes that a driver has widened values of so many bits written to."""
    return abi.BLOCK * bits // 8


def narrow(source: Bytes, dtype_from: str, dtype_to: str, out: Bytes) -> int:
    """Write the floats in ``source`` to ``out`` as the nearest ones of another dtype.

    Takes what :func:`widen` takes, and any two floats of 16 bits or more, or an 8-bit one to write:
    where the other dtype holds all of them this is widening. Gives how many elements were rounded:
    those that, widened again, would have other bits. Releases the GIL. Raises ValueError and
    TypeError as :func:`widen` does.
    """
    pair = DTYPES[dtype_from], DTYPES[dtype_to]
    if dtype_from == dtype_to or pair[1].holds(pair[0]):
        widen(source, dtype_from, dtype_to, out)
        return 0
    if pair[0].kind != "float" or pair[1].kind != "float" or pair[0].bits < 16:
        raise ValueError(f"{dtype_from} is not rounded to {dtype_to}")
    elements, scratch = _whole(source, dtype_from), np.zeros(CAST_SCRATCH, np.uint8)
    return int(
        c_function("narrow", f"{dtype_from}>{dtype_to}").ctypes(
            place(source, U8), room(out, U8, elements * pair[1].bits // 8), elements,
            room(scratch, U8),
        )
    )  # fmt: skip


def _whole(source: Bytes, dtype: str) -> int:
    """How many elements there are."""
    elements, rest = divmod(len(source), DTYPES[dtype].bits // 8)
    if rest:
        raise ValueError(f"{len(source)} bytes are no whole elements of {dtype}")
    return elements
