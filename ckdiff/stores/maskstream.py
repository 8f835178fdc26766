"""Masks of several stores, decoded side by side a window at a time.

Compressed frames go from the file into one buffer and from there, in one native call for all
stores, into the window's buffers. Every frame has a checksum that the decoder verifies; where an
object is read from its beginning to its end, its digest is verified on the way as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.places.openfile import read_into
from ckdiff.errors import CkdiffError, StoreCorrupt
from ckdiff.kernels import zstd
from ckdiff.kernels.abi import DECODE_COLUMNS
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.maskframes import sound
from ckdiff.stores.objects import (
    ABSENT,
    INDEX_BYTES,
    INNER,
    INNERS,
    LARGEST_FRAME,
    read_index,
)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MaskSource:
    """The mask of one rule in one store, as another process can be told of it."""

    folder: str  #: that holds the objects
    shown: str  #: how messages name it
    objects: tuple[tuple[int, str], ...]  #: (size in bytes, digest) of each chunk's object


class MaskWindows:
    """Windows of the masks of some sources. For one thread; a context manager.

    ``room`` is how many inner chunks (64 KiB of mask) of each source a window may need.
    """

    def __init__(self, sources: Sequence[MaskSource], room: int) -> None:
        self.room = room
        # costs nothing until it is used
        self._compressed = np.empty((len(sources), room * LARGEST_FRAME), np.uint8)
        self._streams = [
            _Stream(source, buffer)
            for source, buffer in zip(sources, self._compressed, strict=True)
        ]
        self._masks = np.empty((len(sources), room, INNER), np.uint8)
        #: everything that is loaded: what ``places`` gives is in here
        self.memory = self._masks.reshape(-1)
        self._held: list[IntArray] = [np.empty(0, np.int64) for _ in sources]
        self._frames = np.empty((len(sources) * room, DECODE_COLUMNS), np.int64)
        self._closing = ExitStack()

    def __enter__(self) -> MaskWindows:
        for stream in self._streams:
            self._closing.callback(stream.close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def load(self, inners: Sequence[IntArray]) -> None:
        """Decode inner chunks: for each source sorted positions, at most ``room``.

        What was loaded before is gone. Raises StoreCorrupt.
        """
        count = 0
        owners: list[tuple[_Stream, IntArray, int]] = []
        for k, (stream, wanted) in enumerate(zip(self._streams, inners, strict=True)):
            if len(wanted) > self.room:  # machine code would write past the end
                raise CkdiffError(
                    f"{len(wanted)} pieces of a mask, and room for {self.room}",
                    hint="please report it",
                )
            # Where stores differ in layout, the end of one window is the beginning of the next.
            kept = self._reuse(k, wanted)
            rest = wanted[kept:]
            if not len(rest):
                continue
            frames = self._frames[count : count + len(rest)]
            frames[:, 0] = INNER * (k * self.room + kept + np.arange(len(rest)))
            stream.read(rest, frames)
            frames[:, 1] += k * self._compressed.shape[1]
            owners.append((stream, rest, count))
            count += len(rest)
        done = zstd.decode(self._frames[:count], self._compressed.reshape(-1), self.memory, INNER)
        if done < count:
            stream, wanted, start = next(o for o in reversed(owners) if o[2] <= done)
            self._held = [wanted[:0]] * len(inners)
            raise stream.damaged(int(wanted[done - start]))
        self._held = list(inners)

    def places(self, source: int, first: IntArray) -> IntArray:
        """Where in ``memory`` the mask bytes at positions ``first`` of the flat mask are, until the
        next load.
        """
        inner = first // INNER
        slots = np.searchsorted(self._held[source], inner)
        return INNER * (source * self.room + slots) + (first - INNER * inner)

    def _reuse(self, source: int, wanted: IntArray) -> int:
        held = self._held[source]
        if not (len(held) and len(wanted)) or held[-1] != wanted[0]:
            return 0
        if len(held) > 1:
            self._masks[source, 0] = self._masks[source, len(held) - 1]
        return 1


@cache
def _zero_frame() -> npt.NDArray[np.uint8]:
    """What the encoder makes of an inner chunk without a changed element."""
    return np.frombuffer(MaskEncoder().encode(np.zeros(INNER, np.uint8)), np.uint8)


class _Stream:
    """Reads frames of one source; remembers the object it is in."""

    def __init__(self, source: MaskSource, buffer: npt.NDArray[np.uint8]) -> None:
        self._source = source
        self._chunk = -1
        self._fd = -1
        self._index: IntArray = np.empty((0, 2), np.int64)
        self._present = 0  # frames of the object
        self._buffer = buffer
        self._digest: Any = None  # of the object's bytes up to frame _next, while read in order
        self._next = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._chunk = -1

    def damaged(self, inner: int) -> StoreCorrupt:
        chunk, position = divmod(inner, INNERS)
        return StoreCorrupt(f"inner chunk {position} of {self._where(chunk)} is damaged")

    def read(self, inners: IntArray, frames: IntArray) -> None:
        """Read the frames of ``inners``; columns 1 and 2 of ``frames`` say where and how long."""
        chunks = inners // INNERS
        breaks = np.flatnonzero((np.diff(inners) != 1) | (np.diff(chunks) != 0)) + 1
        at = row = 0
        for run in np.split(inners, breaks):
            chunk = int(run[0]) // INNERS
            if chunk != self._chunk:
                self._open(chunk)
            positions = run - chunk * INNERS
            entries = self._index[positions]
            bad = np.flatnonzero(entries[:, 1] < 0)
            if bad.size:
                raise self.damaged(int(run[bad[0]]))
            sizes = entries[:, 1]
            places = at + np.cumsum(sizes) - sizes
            piece = self._buffer[at : at + int(sizes.sum())]
            self._fill(chunk, piece, entries)
            self._follow(chunk, positions, entries, piece)
            ours = self._empty(places, sizes)
            others = np.flatnonzero(~ours)
            if not (fine := sound(self._buffer, places[others], sizes[others])).all():
                raise self.damaged(int(run[others[int(np.argmin(fine))]]))
            frames[row : row + len(run), 1] = places
            frames[row : row + len(run), 2] = np.where(ours, 0, sizes)
            at += len(piece)
            row += len(run)

    def _empty(self, places: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
        """Which frames are the one that holds nothing but zeros: most of a sparse mask.

        Decoding it takes ten times as long as writing zeros.
        """
        known = _zero_frame()
        found: npt.NDArray[np.bool_] = sizes == len(known)
        candidates = places[found]
        same = self._buffer[candidates[:, None] + np.arange(len(known))] == known
        found[found] = same.all(1)
        return found

    def _open(self, chunk: int) -> None:
        self.close()
        where = self._where(chunk)
        size = self._source.objects[chunk][0]
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(f"{self._source.folder}/{chunk}", flags)
            if os.fstat(self._fd).st_size != size:
                raise StoreCorrupt(f"{where} does not have its {size} bytes any more")
            raw = read_index(self._fd, size, where)
        except OSError as error:
            raise StoreCorrupt(f"cannot read {where}: {error.strerror}") from error
        offset, length = raw[:, 0], raw[:, 1]
        sound = (length > 4) & (length <= LARGEST_FRAME) & (offset <= size - INDEX_BYTES - length)
        self._index = np.where(sound[:, None], raw.astype(np.int64), -1)
        self._present = int((offset != ABSENT).sum())
        self._chunk, self._next, self._digest = chunk, 0, xxhash.xxh3_128()

    def _fill(self, chunk: int, piece: npt.NDArray[np.uint8], entries: IntArray) -> None:
        """Read frames; neighbours in the file, as all are in what ckdiff writes, in one call."""
        at = 0
        breaks = np.flatnonzero(entries[1:, 0] != entries[:-1].sum(1)) + 1
        try:
            for group in np.split(entries, breaks):
                size = int(group[:, 1].sum())
                got = read_into(self._fd, piece[at : at + size].data, int(group[0, 0]))
                if got < size:
                    raise StoreCorrupt(f"{self._where(chunk)} was cut while it was read")
                at += size
        except OSError as error:
            raise StoreCorrupt(f"cannot read {self._where(chunk)}: {error.strerror}") from error

    def _follow(
        self, chunk: int, positions: IntArray, entries: IntArray, piece: npt.NDArray[np.uint8]
    ) -> None:
        """Carry the object's digest along, as long as its frames come in order."""
        if self._digest is None:
            return
        end = int(self._index[self._next - 1].sum()) if self._next else 0
        if int(positions[0]) != self._next or int(entries[0, 0]) != end:
            self._digest = None
            return
        self._digest.update(piece)
        self._next = int(positions[-1]) + 1
        if self._next < self._present:
            return
        size, digest = self._source.objects[chunk]
        tail = np.empty(size - int(entries[-1].sum()), np.uint8)
        read_into(self._fd, tail.data, size - len(tail))
        self._digest.update(tail)
        if self._digest.hexdigest() != digest:
            raise StoreCorrupt(f"{self._where(chunk)} is damaged: its digest differs")
        self._digest = None

    def _where(self, chunk: int) -> str:
        return f"{self._source.shown}/c/{chunk}"
