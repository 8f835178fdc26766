"""What a tensor of a weight version holds, made from both sides a window at a time.

``xor`` is the exclusive or of all bytes. ``overwrite`` is how many bytes differ, where they are,
and what they are now, 32 bits for a number. Either is exactly one zstd frame that says how much it
holds. It depends on the bytes of both sides and on the level, and on nothing else: windows have one
size, and each becomes blocks of its own.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zstandard

from ckdiff.deltas.versions.form import XOR
from ckdiff.deltas.versions.spool import Spool
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import Bytes
from ckdiff.kernels.runs import RunFinder, Runs
from ckdiff.kernels.zstdframes import (
    BLOCK,
    MAGIC,
    SequenceEncoder,
    encodes_sequences,
    ended,
    frame_header,
    raw_block,
    zero_blocks,
)

WINDOW = 4 << 20  #: bytes that are encoded at a time, at most
#: bytes of the buffers of a thread, when all of them are used
TOOLS_MEMORY = 4 * WINDOW + 2 * WINDOW + (12 << 20)

_SIX_BITS = 3 << 20  # the same for elements of which a window would not have a whole number
_SMALL = 1 << 20  # bytes of a payload that is compressed in one go
_PIECE = 3 << 18  # bytes that numpy looks at in one go; whole elements of any dtype


def window_of(dtype: str) -> int:
    """Bytes of a window of tensors of a dtype."""
    return _SIX_BITS if DTYPES[dtype].bits == 6 else WINDOW


class Tools:
    """Buffers and the state of an encoder, for one thread."""

    def __init__(self) -> None:
        self.finder = RunFinder(WINDOW, BLOCK)
        self.encoder = SequenceEncoder(WINDOW) if encodes_sequences() else None


class Encoder(Protocol):
    """Makes the frame of one tensor, in a spool."""

    def add(self, base: Bytes, tuned: Bytes) -> tuple[int, int]:
        """Take the next window; gives how many elements and how many bytes differ."""

    def finish(self) -> bool:
        """Write what is left; whether there is a frame at all: there is none without a change."""


def encoder(
    encoding: str, dtype: str, nbytes: int, spool: Spool, tools: Tools, *, level: int
) -> Encoder:
    """What makes the frame of a tensor of ``nbytes`` bytes."""
    if encoding != XOR:
        return _OverwriteEncoder(dtype, spool, level)
    if level == 1 and tools.encoder is not None:
        return _XorEncoder(dtype, nbytes, spool, tools, tools.encoder)
    return _LibraryXorEncoder(dtype, nbytes, spool, tools, level)


class _XorEncoder:
    """By our own sequences: smaller than level 1 of the library makes them, and several times as
    fast.
    """

    def __init__(
        self, dtype: str, nbytes: int, spool: Spool, tools: Tools, blocks: SequenceEncoder
    ) -> None:
        self._dtype, self._nbytes, self._spool = dtype, nbytes, spool
        self._finder, self._encoder = tools.finder, blocks
        self._equal = 0  # bytes that were the same, of which nothing is written yet
        self._last = b""  # blocks that are written when it is known whether more come

    def add(self, base: Bytes, tuned: Bytes) -> tuple[int, int]:
        """See Encoder."""
        runs = self._finder.find(base, tuned, _width(self._dtype))
        if not runs.changed:
            self._equal += len(base)
            return 0, 0
        found = _elements(self._dtype, runs, base, tuned), runs.changed
        if self._equal:
            # their blocks are made with the same buffers
            self._write(self._of_zeros())
            runs = self._finder.find(base, tuned, _width(self._dtype))
        self._write(self._encoder.blocks(runs, base, tuned, first=not self._last))
        return found

    def finish(self) -> bool:
        """See Encoder."""
        if not self._last:
            return False
        if self._equal:
            self._write(self._of_zeros())
        self._spool.write(ended(self._last))
        return True

    def _of_zeros(self) -> bytes:
        size, self._equal = self._equal, 0
        if self._last:
            return zero_blocks(size)
        zeros = np.zeros(min(size, BLOCK), np.uint8)
        runs = self._finder.find(zeros, zeros, 1)
        first = self._encoder.blocks(runs, zeros, zeros, first=True)
        return first + zero_blocks(size - len(zeros))

    def _write(self, blocks: bytes) -> None:
        self._spool.write(self._last or frame_header(self._nbytes))
        self._last = blocks


class _LibraryXorEncoder:
    """By the library, at any level."""

    def __init__(self, dtype: str, nbytes: int, spool: Spool, tools: Tools, level: int) -> None:
        self._dtype, self._nbytes, self._spool = dtype, nbytes, spool
        self._finder, self._level = tools.finder, level
        self._equal = 0
        self._stream: Any = None

    def add(self, base: Bytes, tuned: Bytes) -> tuple[int, int]:
        """See Encoder."""
        runs = self._finder.find(base, tuned, _width(self._dtype))
        if not runs.changed and self._stream is None:
            self._equal += len(base)
            return 0, 0
        if self._stream is None:
            tool = zstandard.ZstdCompressor(level=self._level)
            self._stream = tool.compressobj(size=self._nbytes)
            zeros = np.zeros(min(self._equal, _PIECE), np.uint8)
            for at in range(0, self._equal, _PIECE):
                self._spool.write(self._stream.compress(zeros[: self._equal - at].data))
        self._spool.write(self._stream.compress((base ^ tuned).data))
        return _elements(self._dtype, runs, base, tuned), runs.changed

    def finish(self) -> bool:
        """See Encoder."""
        if self._stream is None:
            return False
        self._spool.write(self._stream.flush())
        return True


class _OverwriteEncoder:
    """Positions and values are collected apart: values follow when all positions are known.

    What is large is a stream of the library's with a header of ours before it, as nobody knows how
    much it holds before its end: the number of bytes is a block by itself.
    """

    def __init__(self, dtype: str, spool: Spool, level: int) -> None:
        self._dtype, self._spool, self._level = dtype, spool, level
        self._at = self._count = 0
        self._positions, self._values = Spool(spool.folder), Spool(spool.folder)
        self._held: list[bytes] = []  # positions, while there are few
        self._stream: Any = None

    def add(self, base: Bytes, tuned: Bytes) -> tuple[int, int]:
        """See Encoder."""
        elements = changed = 0
        for low in range(0, len(base), _PIECE):
            one, other = base[low : low + _PIECE], tuned[low : low + _PIECE]
            places = np.flatnonzero(one != other)
            if len(places):
                changed += len(places)
                elements += _elements_at(self._dtype, places, one, other)
                self._take((places + (self._at + low)).astype("<u4").tobytes(), len(places))
                self._values.write(other[places].tobytes())
        self._at += len(base)
        return elements, changed

    def finish(self) -> bool:
        """See Encoder."""
        if not self._count:
            return False
        count = self._count.to_bytes(4, "little")
        if self._stream is None:
            payload = b"".join([count, *self._held, *self._values.parts()])
            self._spool.write(zstandard.ZstdCompressor(level=self._level).compress(payload))
        else:
            blocks = self._positions.parts()
            self._write_head(next(blocks), count)
            for part in blocks:
                self._spool.write(part)
            for part in self._values.parts():
                self._spool.write(self._stream.compress(part))
            self._spool.write(self._stream.flush())
        self._positions.close()
        self._values.close()
        return True

    def _take(self, positions: bytes, count: int) -> None:
        self._count += count
        if self._stream is None:
            self._held.append(positions)
            if 5 * self._count <= _SMALL:
                return
            tool = zstandard.ZstdCompressor(level=self._level, write_content_size=False)
            self._stream = tool.compressobj()
            positions, self._held = b"".join(self._held), []
        self._positions.write(self._stream.compress(positions))

    def _write_head(self, part: bytes, count: bytes) -> None:
        """Write what the stream begins with, under a header that says how much the frame holds."""
        if part[:5] != MAGIC + b"\0":
            raise ValueError("the zstd library begins a stream of unknown size with another header")
        content = 4 + 5 * self._count
        wide = content >= 1 << 32
        size = content.to_bytes(8 if wide else 4, "little")
        head = MAGIC + (b"\xc0" if wide else b"\x80") + part[5:6] + size
        self._spool.write(head + raw_block(count) + part[6:])


def _width(dtype: str) -> int:
    """Bytes of what is counted as an element by a kernel."""
    return max(DTYPES[dtype].bits // 8, 1)


def _elements(dtype: str, runs: Runs, base: Bytes, tuned: Bytes) -> int:
    """How many elements of two windows differ."""
    return runs.elements if DTYPES[dtype].bits >= 8 else _packed_elements(dtype, base, tuned)


def _elements_at(dtype: str, places: npt.NDArray[np.int64], base: Bytes, tuned: Bytes) -> int:
    """The same where it is known which bytes do, and there are some."""
    if DTYPES[dtype].bits < 8:
        return _packed_elements(dtype, base, tuned)
    return int(np.count_nonzero(np.diff(places // _width(dtype)))) + 1


def _packed_elements(dtype: str, base: Bytes, tuned: Bytes) -> int:
    """The same of elements that share bytes."""
    found, bits = 0, DTYPES[dtype].bits
    for low in range(0, len(base), _PIECE):
        exclusive = base[low : low + _PIECE] ^ tuned[low : low + _PIECE]
        differing = np.unpackbits(exclusive, bitorder="little")
        found += int(differing.reshape(-1, bits).any(axis=1).sum())
    return found
