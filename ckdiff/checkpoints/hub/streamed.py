"""A checkpoint of the hub that is read as it is needed: nothing is downloaded whole.

Headers come first, by ranges. Then each worker has a spool, an unnamed file of fixed size on the
local disk: the byte ranges of the next windows are fetched into it side by side while one window is
compared, and their room is used again when that is done. What is not compared is never fetched.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.budget import format_size, parse_size
from ckdiff.checkpoints.hub.headers import HubHeaders
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import BudgetError, CheckpointError, UsageError

_CONNECTIONS = 8  # ranges that are fetched at a time, for all workers together
_JOINED = 1 << 16  # bytes between two ranges that are rather fetched than asked for twice
_ALIGNED = 64  # bytes; where each range begins in a spool


class HubStream(HubHeaders):
    """A Checkpoint whose readers fetch what they are asked for. ``close`` ends its connections."""

    #: bytes of each reader's spool; set before the first reader is made
    spool: int = 1 << 30
    #: where the spools are; the system's directory for temporary files by default
    folder: Path | None = None

    @classmethod
    def of(cls, headers: HubHeaders) -> HubStream:
        """The same checkpoint, to be read."""
        names = headers.__dataclass_fields__
        made = cls(**{name: getattr(headers, name) for name in names})
        made._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="ckdiff-fetch")
        made._fetched = 0
        made._lock = threading.Lock()
        made._closed = threading.Event()
        made.repository.wait = made._pause
        return made

    _pool: ThreadPoolExecutor
    _fetched: int
    _lock: threading.Lock
    _closed: threading.Event

    @property
    def bytes_fetched(self) -> int:
        """Bytes of tensors that were fetched so far."""
        return self._fetched

    def reader(self) -> StreamReader:
        """See Checkpoint. Raises BudgetError where the disk has no room for a spool."""
        return StreamReader(self, self.spool)

    def close(self) -> None:
        """See Checkpoint. Does not wait for a server that is slow to answer."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pause(self, seconds: float) -> None:
        """Wait before something is tried again, unless nobody wants it any more."""
        if self._closed.wait(seconds):
            raise CheckpointError(f"{self.label}: was closed")

    # for the readers

    def ranges(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> list[_Range]:
        """What to fetch for some spans: neighbours in a file together."""
        files, begins = self.file_index[tensors], self.offset[tensors] + starts
        order = np.lexsort((begins, files)).tolist()
        found: list[_Range] = []
        for i in order:
            file, begin, size = int(files[i]), int(begins[i]), int(nbytes[i])
            last = found[-1] if found else None
            if last is not None and last.file == file and begin - last.stop <= _JOINED:
                last.stop = max(last.stop, begin + size)
            else:
                last = _Range(file, begin, begin + size)
                found.append(last)
            last.spans.append((i, begin))
        return found

    def fetch(self, wanted: _Range, view: memoryview) -> None:
        """Fill ``view`` with a range of a file."""
        self.repository.read_into(self.names[wanted.file], wanted.begin, view)
        with self._lock:
            self._fetched += len(view)

    def start(self, wanted: _Range, view: memoryview) -> Future[None]:
        """``fetch`` on another thread."""
        return self._pool.submit(self.fetch, wanted, view)


@dataclass(slots=True)
class _Range:
    """Bytes [begin, stop) of a file, and the spans in them: (position, first byte in the file)."""

    file: int
    begin: int
    stop: int
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Piece:
    """A window on its way into the spool, or there."""

    begin: int  #: in the spool
    stop: int
    addresses: IntArray
    coming: list[Future[None]]

    def wait(self) -> None:
        """Until all of it is there; raises what fetching raised."""
        for future in self.coming:
            future.result()

    def drop(self) -> None:
        """Until nobody writes to it any more."""
        for future in self.coming:
            future.cancel()
        for future in self.coming:
            if not future.cancelled():
                with contextlib.suppress(Exception):  # nobody wants it now
                    future.result()


class StreamReader:
    """A SpanReader over a checkpoint of the hub; one for each worker."""

    def __init__(self, source: HubStream, size: int) -> None:
        self._source = source
        self._size = size
        self._pieces: dict[bytes, _Piece] = {}
        self._held: list[bytes] = []
        self._map = _spool(size, source.folder)
        self._view = memoryview(self._map)
        self._address = np.frombuffer(self._view, np.uint8).ctypes.data

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. Raises CheckpointError, SourceChanged, BudgetError."""
        key = _key(tensors, starts, nbytes)
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._begin(key, tensors, starts, nbytes)
        while piece is None:  # what was fetched too early is in the way
            early = next((k for k in reversed(self._pieces) if k not in self._held), None)
            if early is None:
                raise BudgetError(
                    f"a spool of {format_size(self._size)} is too small for a window of "
                    f"{format_size(int(nbytes.sum()))}",
                    hint="raise --disk, or lower --workers",
                )
            self._pieces.pop(early).drop()
            piece = self._begin(key, tensors, starts, nbytes)
        self._held.append(key)
        piece.wait()
        return piece.addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader; skipped where the spool is full."""
        key = _key(tensors, starts, nbytes)
        if key not in self._pieces:
            self._begin(key, tensors, starts, nbytes)

    def release(self) -> None:
        """See SpanReader. What was fetched was checked as it arrived."""
        held, self._held = self._held, []
        for key in held:
            self._pieces.pop(key).drop()

    def close(self) -> None:
        """See SpanReader."""
        pieces, self._pieces, self._held = self._pieces, {}, []
        for piece in pieces.values():
            for future in piece.coming:
                future.cancel()
        # what is still arriving holds the spool, which goes with the last of it
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()

    # inside

    def _begin(
        self, key: bytes, tensors: IntArray, starts: IntArray, nbytes: IntArray
    ) -> _Piece | None:
        """Start fetching a window; None where there is no room."""
        wanted = self._source.ranges(tensors, starts, nbytes)
        sizes = [-(-(one.stop - one.begin) // _ALIGNED) * _ALIGNED for one in wanted]
        begin = self._room(sum(sizes))
        if begin is None:
            return None
        addresses, coming, at = np.zeros(len(tensors), np.int64), list[Future[None]](), begin
        for one, size in zip(wanted, sizes, strict=True):
            for position, first in one.spans:
                addresses[position] = self._address + at + first - one.begin
            view = self._view[at : at + one.stop - one.begin]
            coming.append(self._source.start(one, view))
            at += size
        piece = _Piece(begin, at, addresses, coming)
        self._pieces[key] = piece
        return piece

    def _room(self, size: int) -> int | None:
        """Where ``size`` bytes are free."""
        at = 0
        for piece in sorted(self._pieces.values(), key=lambda piece: piece.begin):
            if piece.begin - at >= size:
                return at
            at = max(at, piece.stop)
        return at if self._size - at >= size else None


def _key(*columns: IntArray) -> bytes:
    return b"".join(column.tobytes() for column in columns)


def _spool(size: int, folder: Path | None) -> mmap.mmap:
    """An unnamed file of ``size`` bytes, mapped: its pages are the system's to write out."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.ftruncate(file.fileno(), size)
            # now, and not as a SIGBUS when the first byte is written
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise BudgetError(
            f"no room for {format_size(size)} in {where}: {error.strerror}",
            hint="lower --disk, or set TMPDIR to a disk with more room",
        ) from None


def spool_size(disk: int, streams: int, workers: int, window: int) -> int:
    """Bytes of each spool, so that all together keep to ``disk``. Raises BudgetError.

    ``window`` is the largest number of bytes that one side of a window has.
    """
    each = disk // (streams * workers) // mmap.PAGESIZE * mmap.PAGESIZE
    least = window + _JOINED + _ALIGNED
    if each < least:
        needed = least * streams * workers
        raise BudgetError(
            f"{format_size(disk)} of disk is too little for {workers} workers: this needs "
            f"{format_size(needed)}",
            hint="raise --disk or lower --workers",
        )
    return each


def share_disk(
    sides: Sequence[Any], disk: str | int, workers: int, window: int, *, on_cluster: bool
) -> None:
    """Give the readers of those checkpoints that are streamed their part of the disk.

    Raises UsageError where none is streamed, and BudgetError.
    """
    streams = [side for side in sides if isinstance(side, HubStream)]
    if not streams:
        raise UsageError("neither checkpoint is on the hub", hint="leave out --stream")
    if on_cluster:
        raise UsageError(
            "streaming is for this process, and not for the workers of a cluster",
            hint="leave out --stream, or --scheduler",
        )
    for stream in streams:
        stream.spool = spool_size(parse_size(disk), len(streams), workers, window)


def open_stream(text: str) -> HubStream:
    """Open the checkpoint at a hub address for streaming. Raises CheckpointError, HeaderError."""
    from ckdiff.checkpoints.hub.headers import open_headers

    found = open_headers(text)
    if not isinstance(found, HubHeaders):
        raise CheckpointError(
            f"{text}: cannot be streamed while HF_HUB_OFFLINE is set",
            hint="leave out --stream: the cache is used",
        )
    return HubStream.of(found)
