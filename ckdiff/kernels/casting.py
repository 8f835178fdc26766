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
from ckdiff.kernels.abi import CAST_SCRATCH
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import U8, Bytes, place, room


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
    _run("widen", (dtype_from, dtype_to), source, out)


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
    return _run("narrow", (dtype_from, dtype_to), source, out)


def _run(name: str, pair: tuple[str, str], source: Bytes, out: Bytes) -> int:
    elements, rest = divmod(len(source), DTYPES[pair[0]].bits // 8)
    if rest:
        raise ValueError(f"{len(source)} bytes are no whole elements of {pair[0]}")
    scratch = np.zeros(CAST_SCRATCH, np.uint8)
    return int(
        c_function(name, ">".join(pair)).ctypes(
            place(source, U8), room(out, U8, elements * DTYPES[pair[1]].bits // 8), elements,
            room(scratch, U8),
        ) or 0
    )  # fmt: skip
