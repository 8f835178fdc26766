"""Where two windows differ, element by element, and what both have there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import U8, U32, Bytes, place, room

_MARGIN = 1  # places that are written behind the last one


class Changes(NamedTuple):
    """What differs between two windows, in units of one or two bytes."""

    places: npt.NDArray[np.uint32]  #: in units, increasing
    old: npt.NDArray[np.unsignedinteger]
    new: npt.NDArray[np.unsignedinteger]


class ChangeFinder:
    """Buffers for windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._places = np.empty(window + _MARGIN, np.uint32)
        self._old, self._new = np.empty((2, window), np.uint8)
        arrays = (
            (self._places, U32, window + _MARGIN),
            (self._old, U8, window),
            (self._new, U8, window),
        )
        self._rooms = [room(*array) for array in arrays]

    def find(self, old: Bytes, new: Bytes) -> Changes:
        """What differs, in units of two bytes where the windows have an even number; it lies in
        the buffers until the next call.

        Raises ValueError for windows of two sizes, or too large ones.
        """
        if len(old) != len(new) or len(old) > self._window:
            raise ValueError("two windows of one size, no larger than the buffers, are compared")
        width = 1 if len(old) % 2 else 2
        count = c_function("changes", str(width)).ctypes(
            place(old, U8), place(new, U8), len(old), *self._rooms
        )
        kind = f"<u{width}"
        return Changes(
            self._places[:count],
            self._old[: count * width].view(kind),
            self._new[: count * width].view(kind),
        )
