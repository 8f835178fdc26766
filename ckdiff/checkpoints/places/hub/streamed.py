"""A checkpoint of the hub that is read as it is needed: nothing is downloaded whole.

Headers come first, by ranges. Then each worker has a spool, an unnamed file of fixed size on the
local disk: the byte ranges of the next windows are fetched into it side by side while one window is
compared, and their room is used again when that is done. What is not compared is never fetched.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import threading
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ckdiff.budget import format_size
from ckdiff.checkpoints.folders import Choice
from ckdiff.checkpoints.places.hub.cache import Missing
from ckdiff.checkpoints.places.hub.client import HubRepository
from ckdiff.checkpoints.places.hub.fetching import Batch, Check, Fetchers
from ckdiff.checkpoints.places.hub.headers import HubPlace
from ckdiff.checkpoints.places.hub.spool import ALIGNED, Range, ranges, unnamed_file
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import BudgetError

CONNECTIONS = 8  #: ranges that are fetched at a time, for all workers and both sides together


class StreamedPlace(HubPlace):
    """Files whose readers fetch what they are asked for. ``close`` ends its connections."""

    streams = True

    def __init__(self, repository: HubRepository, choice: Choice) -> None:
        super().__init__(repository, choice)
        self.spool = 1 << 30  #: bytes of each reader's spool; set before the first reader is made
        self.fetchers = Fetchers(CONNECTIONS, self.label)
        self.bytes_fetched = 0  #: of tensors, so far
        self._lock = threading.Lock()
        repository.wait = self.fetchers.pause

    def missing_bytes(self) -> Missing:
        """See Checkpoint: nothing has to be here before it can be read."""
        return {}

    def fetch(self) -> bool:
        """See Place: readers fetch what is needed."""
        return False

    def reader(self) -> StreamReader:
        """See Checkpoint. Its spool is made when it is first needed."""
        return StreamReader(self, self.spool)

    def share(self, spool: int, connections: int) -> None:
        """See Checkpoint."""
        self.spool, self.fetchers.most = spool, connections

    def recipe(self) -> str:
        """See Checkpoint: the same commit, streamed as well."""
        return json.dumps(
            {"stream": str(replace(self.repository.address, revision=self.repository.commit))}
        )

    def hang_up(self) -> None:
        """Whoever waits for bytes, on whatever thread, gets a CheckpointError at once; nothing can
        be read after this.
        """
        self.fetchers.close()

    def close(self) -> None:
        """See Checkpoint. Does not wait for a server that is slow to answer."""
        self.hang_up()

    # for the readers

    def ranges(
        self, files: IntArray, begins: IntArray, nbytes: IntArray, *, between: bool
    ) -> list[Range]:
        """What to fetch for some spans, with small gaps between them if ``between`` is set."""
        return ranges(files, begins, nbytes, between=between)

    def read_range(self, wanted: Range, view: memoryview, check: Check) -> None:
        """Fill ``view`` with a range of a file."""
        self.repository.read_into(self._names[wanted.file], wanted.begin, view, check)
        with self._lock:
            self.bytes_fetched += len(view)


@dataclass(slots=True)
class _Piece:
    """A window on its way into the spool, or there."""

    begin: int  #: in the spool
    stop: int
    addresses: IntArray
    batch: Batch


_Columns = tuple[IntArray, IntArray, IntArray]


class StreamReader:
    """A SpanReader whose tensors are files of the hub; one for each worker.

    Windows get room in the order in which they are asked for: one that has to wait for room holds
    up those after it, so that nothing is fetched early that would be in its way.
    """

    def __init__(self, source: StreamedPlace, size: int) -> None:
        self._source = source
        self._size = size
        self._pieces: dict[bytes, _Piece] = {}
        self._waiting: dict[bytes, _Columns] = {}  # for room
        self._held: list[bytes] = []
        self._map: mmap.mmap | None = None

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. Raises CheckpointError, SourceChanged, BudgetError."""
        if not len(tensors):
            return np.zeros(0, np.int64)
        wanted = tensors, starts, nbytes
        key = _key(wanted)
        self._waiting.pop(key, None)
        piece = self._pieces.get(key) or self._begin(key, wanted)
        while piece is None:  # what was asked for before is in the way: this is out of turn
            early = next((k for k in reversed(self._pieces) if k not in self._held), None)
            if early is None:
                piece = self._begin(key, wanted, tight=True)
                break
            self._source.fetchers.drop(self._pieces.pop(early).batch)
            piece = self._begin(key, wanted)
        if piece is None:
            raise BudgetError(
                f"{format_size(self._size)} of disk is too little to stream through: one worker "
                f"needs {format_size(int(nbytes.sum()))} at a time",
                hint="raise --disk, or lower --workers",
            )
        self._held.append(key)
        self._source.fetchers.wait(piece.batch)
        return piece.addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader. Where the spool is full, it starts as soon as there is room."""
        wanted = tensors, starts, nbytes
        key = _key(wanted)
        if len(tensors) and key not in self._pieces:
            self._waiting.setdefault(key, wanted)
            self._fill()

    def release(self) -> None:
        """See SpanReader. What was fetched was checked as it arrived."""
        held, self._held = self._held, []
        for key in held:
            piece = self._pieces.pop(key, None)
            if piece is not None:
                self._source.fetchers.drop(piece.batch)
        self._fill()

    def close(self) -> None:
        """See SpanReader."""
        pieces, self._pieces, self._held = self._pieces, {}, []
        self._waiting.clear()
        for piece in pieces.values():
            self._source.fetchers.abandon(piece.batch)
        # what is still arriving holds the spool, which goes with the last of it
        with contextlib.suppress(BufferError):
            if self._map is not None:
                self._map.close()
        self._map = None

    # inside

    def _fill(self) -> None:
        """Start what waits, in order, while there is room."""
        for key in list(self._waiting):
            if self._begin(key, self._waiting[key]) is None:
                return
            del self._waiting[key]

    def _begin(self, key: bytes, wanted: _Columns, *, tight: bool = False) -> _Piece | None:
        """Start fetching a window; None where there is no room.

        ``tight``: into the least room that is possible, by more requests.
        """
        listed = self._source.ranges(*wanted, between=not tight)
        step = 1 if tight else ALIGNED
        sizes = [-(-(one.stop - one.begin) // step) * step for one in listed]
        begin = self._room(sum(sizes))
        if begin is None:
            return None
        if self._map is None:
            self._map = unnamed_file(self._size)
        view = memoryview(self._map)
        start = np.frombuffer(view, np.uint8).ctypes.data
        addresses, jobs, at = np.zeros(len(wanted[0]), np.int64), [], begin
        for one, size in zip(listed, sizes, strict=True):
            for position, first in one.spans:
                addresses[position] = start + at + first - one.begin
            part = view[at : at + one.stop - one.begin]
            jobs.append(partial(self._source.read_range, one, part))
            at += size
        self._pieces[key] = piece = _Piece(begin, at, addresses, self._source.fetchers.start(jobs))
        return piece

    def _room(self, size: int) -> int | None:
        """Where ``size`` bytes are free."""
        at = 0
        for piece in sorted(self._pieces.values(), key=lambda piece: piece.begin):
            if piece.begin - at >= size:
                return at
            at = max(at, piece.stop)
        return at if self._size - at >= size else None


def _key(columns: _Columns) -> bytes:
    return b"".join(column.tobytes() for column in columns)
