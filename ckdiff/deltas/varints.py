"""Numbers of a frame: seven bits to a byte, the lowest first, the highest bit where more follow."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 10  # bytes of a number below 2**64


class Damaged(ValueError):
    """Bytes of a delta that are not what was written, or not for this base."""


def varints(numbers: Iterable[int]) -> bytes:
    """The bytes of numbers that are not negative."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


class FrameReader:
    """Takes numbers and then streams from a frame; raises Damaged where it does not hold them."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def number(self, limit: int) -> int:
        """The next number, which must not exceed ``limit``."""
        value = 0
        for i, byte in enumerate(self._data[self._at : self._at + _LONGEST]):
            value |= (byte & 127) << 7 * i
            if byte < 128:
                if value > limit or (i and not byte):  # too large, or longer than it need be
                    break
                self._at += i + 1
                return value
        raise Damaged("a number of a frame is out of range")

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes."""
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise Damaged("a frame is too short")
        self._at += size
        return found

    def finish(self) -> None:
        """Raise Damaged where something is left over."""
        if self._at != len(self._data):
            raise Damaged("a frame is too long")
