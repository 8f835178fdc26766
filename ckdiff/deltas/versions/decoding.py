"""Putting what weight versions hold of a tensor into its bytes, a window at a time.

A frame comes from anywhere: nothing in it is believed before it is checked, and what is allocated
does not depend on what it declares, but for the window that zstd needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ckdiff.budget import format_size
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.form import XOR
from ckdiff.kernels.memory import Bytes
from ckdiff.kernels.zstdframes import (
    LONGEST_HEADER,
    FrameDecoder,
    FrameHead,
    frame_head,
)

LARGEST_WINDOW = 1 << 27  #: bytes that a decoder may have to keep; zstd's own limit
COMMON_WINDOW = 8 << 20  #: frames with a larger one are decoded one at a time

_READ = 1 << 18  # bytes of a frame that are read at a time
_CONTEXT = 1 << 19  # bytes that a decoder needs besides its window
_PART = 1 << 16  # positions that are decoded at a time
_SORTED_HERE = 1 << 18  # positions that may be in any order, as all of them fit into memory

#: gives bytes of a frame: from where on, and how many; fewer only at the frame's end
Read = Callable[[int, int], bytes]


class Patch(Protocol):
    """One version's change of one tensor, at work; for one thread. Raises Damaged."""

    def apply(self, window: Bytes) -> None:
        """Change the next bytes of the tensor in place."""

    def finish(self) -> None:
        """Check that nothing is left, after the last of them."""

    def close(self) -> None:
        """Give its memory back."""


def checked_head(encoding: str, raw: bytes, nbytes: int | None) -> FrameHead:
    """The header of the frame of a tensor of ``nbytes``, where that is known.

    ``raw`` are its first LONGEST_HEADER bytes. Raises Damaged where it holds another number of
    bytes than it should, or needs too much memory.
    """
    try:
        head = frame_head(raw)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if head.window > LARGEST_WINDOW:
        raise Damaged(f"is a zstd frame that needs {format_size(head.window)} to be decoded")
    if encoding == XOR:
        if nbytes is not None and head.content != nbytes:
            raise Damaged(f"holds {head.content:,} bytes, and the tensor has {nbytes:,}")
        return head
    count, rest = divmod(head.content - 4, 5)
    if count < 0 or rest:
        raise Damaged(f"holds {head.content:,} bytes, which are not positions and values")
    if nbytes is not None and count > nbytes:
        raise Damaged(f"changes {count:,} bytes of a tensor that has {nbytes:,}")
    return head


def memory_of(encoding: str, head: FrameHead) -> int:
    """Bytes that a patch of a frame needs, at most."""
    decoder = head.window + _CONTEXT + _READ
    if encoding == XOR:
        return decoder
    # a position takes 8 bytes and its value one, and all of few are kept from the start
    count = (head.content - 4) // 5
    return 2 * decoder + 9 * (count if count <= _SORTED_HERE else _PART)


def patch(encoding: str, read: Read, nbytes: int, scratch: Bytes) -> Patch:
    """What a version does to a tensor of ``nbytes`` bytes. Raises Damaged.

    ``scratch`` is as large as a window, and may serve all patches of a thread.
    """
    head = checked_head(encoding, read(0, LONGEST_HEADER), nbytes)
    if encoding == XOR:
        return _Xor(Decoder(read, head), scratch)
    return _Overwrite(read, head, nbytes)


class Decoder:
    """A frame being decoded: what is wrong with it is damage."""

    def __init__(self, read: Read, head: FrameHead) -> None:
        self._read, self._at = read, 0
        self._frame = FrameDecoder(self._more, max(head.window, 1 << 10))
        self.close = self._frame.close

    def fill(self, out: Bytes) -> None:
        """Decode as many bytes as ``out`` has."""
        try:
            self._frame.fill(out)
        except ValueError as error:
            raise Damaged(str(error)) from None

    def finish(self) -> None:
        """Check that the frame has ended, and that nothing follows it."""
        try:
            self._frame.finish()
        except ValueError as error:
            raise Damaged(str(error)) from None

    def numbers(self, count: int) -> npt.NDArray[np.int64]:
        """The next numbers of 32 bits."""
        raw = np.empty(4 * count, np.uint8)
        self.fill(raw)
        return raw.view("<u4").astype(np.int64)

    def _more(self) -> bytes:
        found = self._read(self._at, _READ)
        self._at += len(found)
        return found


class _Xor:
    def __init__(self, decoder: Decoder, scratch: Bytes) -> None:
        self._decoder, self._scratch = decoder, scratch

    def apply(self, window: Bytes) -> None:
        """See Patch."""
        change = self._scratch[: len(window)]
        self._decoder.fill(change)
        np.bitwise_xor(window, change, out=window)

    def finish(self) -> None:
        """See Patch."""
        self._decoder.finish()

    def close(self) -> None:
        """See Patch."""
        self._decoder.close()


class _Overwrite:
    """Positions and values are far apart in a frame: two decoders go through it."""

    def __init__(self, read: Read, head: FrameHead, nbytes: int) -> None:
        self._nbytes, self._start = nbytes, 0
        self._positions, self._values = Decoder(read, head), Decoder(read, head)
        self._left = (head.content - 4) // 5  # positions that are not decoded yet
        self._next: npt.NDArray[np.int64] = np.empty(0, np.int64)  # those that are not used yet
        self._new = np.empty(0, np.uint8)  # their values
        self._last = -1
        for decoder in (self._positions, self._values):
            if self._left != int(decoder.numbers(1)[0]):
                raise Damaged("does not hold as many values as it says")
        self._skip(4 * self._left)
        if self._left <= _SORTED_HERE:
            self._sort()

    def apply(self, window: Bytes) -> None:
        """See Patch."""
        end = self._start + len(window)
        while True:
            if not len(self._next) and not self._more():
                break
            count = int(np.searchsorted(self._next, end))
            window[self._next[:count] - self._start] = self._new[:count]
            self._next, self._new = self._next[count:], self._new[count:]
            if len(self._next):
                break
        self._start = end

    def finish(self) -> None:
        """See Patch."""
        if len(self._next) or self._left:
            raise Damaged(f"changes bytes beyond the {self._nbytes:,} of the tensor")
        self._values.finish()  # the other one has the values still before it

    def close(self) -> None:
        """See Patch."""
        self._positions.close()
        self._values.close()

    def _more(self) -> bool:
        """Decode some more; False where there are none."""
        count = min(self._left, _PART)
        if not count:
            return False
        found, new = self._positions.numbers(count), np.empty(count, np.uint8)
        self._values.fill(new)
        if found[0] <= self._last or not (found[1:] > found[:-1]).all():
            raise Damaged("has positions that are not in order, or are there twice")
        self._left -= count
        self._last, self._next, self._new = int(found[-1]), found, new
        return True

    def _sort(self) -> None:
        """Decode all, whatever their order is."""
        found, new = self._positions.numbers(self._left), np.empty(self._left, np.uint8)
        self._values.fill(new)
        if not (found[1:] > found[:-1]).all():
            order = np.argsort(found, kind="stable")
            found, new = found[order], new[order]
            if not (found[1:] > found[:-1]).all():
                raise Damaged("changes the same byte twice")
        self._left, self._next, self._new = 0, found, new

    def _skip(self, size: int) -> None:
        passing = np.empty(min(size, 4 * _PART), np.uint8)
        while size:
            self._values.fill(passing[:size])
            size -= min(size, len(passing))
