"""What kernels are handed: arrays in, and in here, nowhere else, they become addresses.

Checking an array takes less than a microsecond. What is wrong is a mistake of ours that no user can
make; it must not become a wrong count or a crash all the same, so it is an error that stays under
``python -O``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

U8, U32, I64, U64 = (np.dtype(kind) for kind in (np.uint8, np.uint32, np.int64, np.uint64))
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

LINE = 64  #: bytes of a line of the caches


def enough(buffer: Bytes, size: int) -> Bytes:
    """A buffer of that size or more, which begins where a line of the caches does: the same one if
    it is large enough. It is one that was made here, or empty.
    """
    if len(buffer) >= size:
        return buffer
    fresh = np.empty(size + LINE, np.uint8)
    return fresh[-fresh.ctypes.data % LINE :]


def place(array: Array, dtype: np.dtype[Any], least: int = 0) -> int:
    """Where an array begins that is read: contiguous, of this dtype, ``least`` items or more.

    Raises TypeError and ValueError.
    """
    if array.dtype != dtype:
        raise TypeError(f"a kernel takes {dtype} here, not {array.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError("a kernel takes contiguous arrays")
    if array.size < least:
        raise ValueError(f"a kernel needs {least} items here, and got {array.size}")
    if array.flags.writeable and array.size:  # what numpy says of its memory takes longer
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return int(array.ctypes.data)


def room(array: Array, dtype: np.dtype[Any], least: int = 0) -> int:
    """The same of an array that is written to."""
    if not array.flags.writeable:
        raise ValueError("a kernel writes to this array, which may only be read")
    return place(array, dtype, least)


def within(low: int, high: int, size: int) -> None:
    """Raise ValueError unless [low, high) lies in something of this size."""
    if low < 0 or high > size:
        raise ValueError(f"a kernel would reach from {low} to {high} in {size}")


class _Memory:
    """What numpy makes an array of without a copy."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, size: int, writable: bool) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (address, not writable),
        }


def bytes_at(address: int, size: int, *, writable: bool = False) -> Bytes:
    """Memory that a reader, or torch, has handed out, as an array of bytes.

    The only way from an address to something that a kernel takes: from here on the size is known.
    Whoever has the address sees to it that the memory stays.
    """
    return np.asarray(_Memory(address, size, writable)) if size else np.empty(0, np.uint8)


def views(addresses: Int64, nbytes: Int64) -> list[Bytes]:
    """What a reader has made addressable, span by span; it may be read until the release."""
    pairs = zip(addresses.tolist(), nbytes.tolist(), strict=True)
    return [bytes_at(address, size) for address, size in pairs]
