"""``madvise`` of several ranges at a time.

Each call from Python gives the interpreter to other threads, and has to wait until they give it
back: eight calls for a window took longer than what they did.
"""

from __future__ import annotations

import ctypes

from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, Int64, place

_madvise = ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value or 0


def advise(ranges: Int64, advice: int) -> int:
    """Advise the system about ranges, in order, until it refuses one; gives how many it took.

    ``ranges`` is C-contiguous, (n, 2) int64: addresses, which lie at pages, and bytes. They are a
    mapping's, of which the system keeps what there is. Releases the GIL. Raises ValueError for
    ranges of another kind.
    """
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ValueError("a range has an address and a size")
    taken = c_function("advise").ctypes(place(ranges, I64), len(ranges), advice, _madvise)
    return int(taken)
