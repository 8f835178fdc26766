"""What a frame of a mask object is, seen for many at once: one zstd frame, with the content size of
an inner chunk and a checksum, and nothing behind it.

The decoder would take others too, such as two frames of half the size. But readers decode in two
ways, and what one of them refuses the other must.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.stores.objects import INNER

IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_MAGIC = np.frombuffer(b"\x28\xb5\x2f\xfd", np.uint8)
#: how the frames of our encoder begin: a single segment of 64 KiB with a checksum
_OURS = np.frombuffer(b"\x28\xb5\x2f\xfd\x64\x00\xff", np.uint8)
_CHECKSUM = 4  # bytes at the end, and the bit in the descriptor that says so
_descriptors = np.arange(256)
_single = _descriptors >> 5 & 1  # without a window descriptor
_HAS_CHECKSUM = (_descriptors >> 2 & 1).astype(bool)
_DICTIONARY = np.array([0, 1, 2, 4])[_descriptors & 3]
_SIZE_BYTES = np.where((_descriptors >> 6 == 0) & (_single == 0), 0, 1 << (_descriptors >> 6))
_SIZE_AT = 5 + (1 - _single) + _DICTIONARY
_HEAD = _SIZE_AT + _SIZE_BYTES


def sound(buffer: Bytes, places: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the frames at ``places`` in ``buffer``, of ``sizes`` bytes, are of a mask.

    That their content is sound as well is found by decoding them.
    """
    if len(sizes) and int(sizes.min()) >= len(_OURS) + 3:
        # what our encoder writes, and next to nobody else: one block behind one known head
        heads = buffer[places[:, None] + np.arange(len(_OURS) + 3)]
        block = heads[:, -3:].astype(np.int64) @ (1, 1 << 8, 1 << 16)
        good: npt.NDArray[np.bool_] = (heads[:, :-3] == _OURS).all(1)
        good &= (block & 1 == 1) & (block >> 1 & 3 != 1)
        good &= len(_OURS) + 3 + (block >> 3) + _CHECKSUM == sizes
        if good.all():
            return good
    return _looked_through(buffer, places, sizes)


def _looked_through(buffer: Bytes, places: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
    """``sound``, of any frames."""
    descriptor = buffer[np.minimum(places + 4, len(buffer) - 1)]
    ends = places + sizes
    good: npt.NDArray[np.bool_] = (sizes > 4) & _HAS_CHECKSUM[descriptor]
    good &= sizes >= _HEAD[descriptor] + 3 + _CHECKSUM
    good &= _content_size(buffer, places, descriptor) == INNER
    for i, byte in enumerate(_MAGIC):
        good &= buffer[np.minimum(places + i, len(buffer) - 1)] == byte
    at = places + _HEAD[descriptor]
    going = np.flatnonzero(good)
    while len(going):  # a block each; ours have one
        here = at[going]
        inside = here + 3 + _CHECKSUM <= ends[going]
        good[going[~inside]] = False
        going, here = going[inside], here[inside]
        head = buffer[here].astype(np.int64) | buffer[here + 1].astype(np.int64) << 8
        head |= buffer[here + 2].astype(np.int64) << 16
        stored = np.where(head >> 1 & 3 == 1, 1, head >> 3)  # type 1: one byte that is repeated
        at[going] = here + 3 + stored
        going = going[head & 1 == 0]
    good &= at + _CHECKSUM == ends
    return good


def _content_size(buffer: Bytes, places: IntArray, descriptor: Bytes) -> IntArray:
    """What the frames' heads say; -1 where they do not."""
    first, count = places + _SIZE_AT[descriptor], _SIZE_BYTES[descriptor]
    size = np.where(count == 2, 256, 0).astype(np.int64)
    for i in range(8):
        byte = buffer[np.minimum(first + i, len(buffer) - 1)].astype(np.int64)
        size += np.where(i < count, byte << 8 * i, 0)
    return np.where(count > 0, size, -1)
