"""The bytes of a pickle, piece by piece, and what may be made of them.

Every function raises ValueError with a phrase that the caller puts into its own error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NoReturn

_LEAST_MEMORY = 16 << 20  # bytes of values that any pickle may make
_MEMORY_RATE = 8  # and for each of its bytes; tensors need 5, the pieces of a sharded tensor 6
_MOST_STACKED = 1 << 21  # values that wait to be put somewhere; the members of one dict
_LINE = 1 << 16  # bytes of the longest line, where a protocol has lines


def refuse(what: str) -> NoReturn:
    """Raise ValueError with why a pickle is not followed further."""
    raise ValueError(what)


class PickleBytes:
    """Takes bytes in order. No more than a piece and what is asked for is ever in memory."""

    def __init__(self, pieces: Iterable[bytes], size: int, limit: int) -> None:
        """``size`` is of all pieces; of ``limit`` bytes those that are skipped are no part."""
        self._pieces = iter(pieces)
        self._ahead = size  # bytes that are not in ``raw`` yet
        self._limit = limit
        self._memory = _LEAST_MEMORY
        self.raw = b""  #: the bytes that are here
        self.at = 0  #: the next one

    def refill(self, size: int) -> None:
        """Have at least ``size`` bytes from ``at`` on; raises ValueError where there are fewer."""
        have = [self.raw[self.at :]]
        size -= len(have[0])
        if size > self._ahead:
            refuse("it ends early")
        while size > 0:
            have.append(self._next())
            size -= len(have[-1])
            self._limit -= len(have[-1])
            self._memory += _MEMORY_RATE * len(have[-1])
            if self._limit < 0:
                refuse("it is too long")
        self.raw, self.at = b"".join(have), 0

    def _next(self) -> bytes:
        piece = next(self._pieces, b"")
        if not piece:
            refuse("it ends early")
        self._ahead -= len(piece)
        return piece

    def take(self, size: int) -> bytes:
        """The next bytes; raises ValueError where there are fewer."""
        if size > len(self.raw) - self.at:
            self.refill(size)
        data = self.raw[self.at : self.at + size]
        self.at += size
        return data

    def skip(self, size: int) -> None:
        """Pass over bytes, which are never together in memory; raises ValueError."""
        have = len(self.raw) - self.at
        if size <= have:
            self.at += size
            return
        size -= have
        if size > self._ahead:
            refuse("it ends early")
        piece = b""
        while size > 0:
            piece = self._next()
            size -= len(piece)
        self.raw, self.at = piece, len(piece) + size

    def unpack(self, form: struct.Struct) -> Any:
        """The next number; raises ValueError."""
        return form.unpack(self.take(form.size))[0]

    def line(self) -> bytes:
        """The next line, without its end; raises ValueError."""
        end = self.raw.find(b"\n", self.at)
        while end < 0:
            have = len(self.raw) - self.at
            if have > _LINE:
                refuse("it has a line that is too long")
            self.refill(have + 1)
            end = self.raw.find(b"\n", self.at)
        line = self.raw[self.at : end]
        self.at = end + 1
        return line

    def finish(self) -> None:
        """Take what pieces are left, so that whoever gives them can check; raises ValueError."""
        after = sum(len(piece) for piece in self._pieces)
        if after or self.at != len(self.raw):
            refuse("it goes on after its end")

    def charge(self, size: int) -> None:
        """Account for ``size`` bytes of values, or fewer than none; raises ValueError."""
        self._memory -= size
        if self._memory < 0:
            refuse("it needs far more memory than its length")

    def check(self, stacked: int) -> None:
        """Raise ValueError if ``stacked`` values, which are not charged for yet, are too many."""
        if stacked > _MOST_STACKED or 8 * stacked > self._memory:
            refuse("it needs far more memory than its length")
