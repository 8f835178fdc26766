"""A version made of a snapshot and what is published, while the snapshot becomes the latter.

A window of the snapshot is brought up to date when it was compared, while it is in the cache: the
snapshot is ahead of the stream until the version is complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, SpanReader, TensorTable
from ckdiff.deltas.versions.applying import grouped
from ckdiff.deltas.versions.checksums import digester
from ckdiff.deltas.versions.encoding import TOOLS_MEMORY, WINDOW, Tools, encoder, window_of
from ckdiff.deltas.versions.form import Said
from ckdiff.deltas.versions.shards import Shards
from ckdiff.deltas.versions.spool import Spool
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import bytes_at
from ckdiff.options import Observer, Options
from ckdiff.outputs.place import Place, write_errors
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import InOrder, PerThread, Stopped
from ckdiff.sync.loading import span
from ckdiff.sync.snapshot import Snapshot

_AHEAD = 4  # groups for each worker that may be done before the oldest is written
_TENSOR = 700  # bytes that a tensor takes in our tables, at most


@dataclass(slots=True)
class Found:
    """What became of a tensor, or of all."""

    tensors: int = 0  #: that changed
    elements: int = 0  #: that differ
    changed: int = 0  #: bytes that differ

    def add(self, other: Found) -> None:
        """Count another one too."""
        self.tensors += other.tensors
        self.elements += other.elements
        self.changed += other.changed


@dataclass(slots=True)
class Frame:
    """The frame of a tensor that changed. Close it."""

    name: str
    digest: str
    spool: Spool

    def put(self, files: Shards) -> None:
        """Append it to the files of the version."""
        files.add(self.name, self.digest, self.spool.size, self.spool.parts())
        self.spool.close()


@dataclass(slots=True)
class Advancing:
    """Makes frames of tensors and advances the snapshot; shared by threads."""

    snapshot: Snapshot
    said: Said
    folder: Path  #: where frames wait that are large
    touched: Callable[[], None]  #: called before a byte of the snapshot is changed

    def tensor(
        self, at: int, reader: SpanReader, place: int, tools: Tools, stop: threading.Event
    ) -> tuple[Found, Frame | None]:
        """The frame of the snapshot's tensor ``at``, now that it is ``place`` of the reader's."""
        table, old = self.snapshot.table, self.snapshot.tensor(at)
        dtype, nbytes = table.dtypes[at], int(table.nbytes[at])
        spool, window = Spool(self.folder), window_of(dtype)
        work = encoder(self.said.encoding, dtype, nbytes, spool, tools, level=1)
        digest, found = digester(self.said.checksum), Found()
        for start in range(0, nbytes, window):
            if stop.is_set():
                raise Stopped
            size = min(window, nbytes - start)
            new = bytes_at(int(reader.acquire(*span(place, start, size))[0]), size)
            before = old[start : start + size]
            elements, changed = work.add(before, new)
            if changed:
                self.touched()
                before[:] = new
            # of the snapshot: these bytes are what the next version is compared with
            digest.update(before)
            found.elements += elements
            found.changed += changed
            reader.release()
        if not work.finish():
            return found, None
        found.tensors = 1
        return found, Frame(table.names[at], digest.hexdigest(), spool)


class Making:
    """A delta on its way: ``encode``, then ``commit``, on whatever thread. Close it."""

    def __init__(self, snapshot: Snapshot, tuned: Checkpoint, said: Said, place: Place) -> None:
        """``tuned`` has the snapshot's tensors, in its order."""
        self._snapshot, self._tuned, self._said, self._place = snapshot, tuned, said, place
        self._groups = list(grouped(snapshot.table.nbytes))
        self._stack = ExitStack()
        self.found = Found()
        self.bytes = 0  #: of the version's files

    def encode(self, options: Options, observer: Observer, touched: Callable[[], None]) -> None:
        """Compare everything; afterwards nothing is read of what is published.

        Raises BudgetError before anything is done, OutputError, SourceChanged and Interrupted.
        """
        table = self._snapshot.table
        need = Need(
            tables=_TENSOR * len(table), worker=TOOLS_MEMORY + self._tuned.reader_memory(WINDOW)
        )
        workers = fit_workers(options.workers, len(self._groups), need, options.memory)
        with write_errors(self._place.out), interruptible("nothing was published"):
            folder = self._stack.enter_context(self._place).path
            files = self._stack.enter_context(closing(Shards(folder)))
            order = InOrder[list[tuple[Found, Frame | None]]](_AHEAD * workers)
            advancing = Advancing(self._snapshot, self._said, folder, touched)
            task = _Task(advancing, self._tuned, self._groups, order)
            meter = Meter(observer, 2 * int(table.nbytes.sum()))

            def finished(group: int, result: list[tuple[Found, Frame | None]]) -> None:
                for at, pairs in order.put(group, result):
                    for found, frame in pairs:
                        self.found.add(found)
                        if frame is not None:
                            frame.put(files)
                    meter.add(2 * int(table.nbytes[slice(*self._groups[at])].sum()))

            chunks = range(len(self._groups))
            run_chunks(chunks, task, workers=workers, done=finished, meter=meter)
            self._tuned.verify()
            files.finish(self._said)
            self.bytes = size_of(folder)

    def commit(self) -> None:
        """Bring it to the disk, and into its place."""
        with write_errors(self._place.out):
            self._place.commit()

    def close(self) -> None:
        """Remove what was not committed; may be called more than once."""
        self._stack.close()


@dataclass(slots=True)
class _Task:
    """The task of a group of tensors. Shared by the threads."""

    advancing: Advancing
    tuned: Checkpoint
    groups: Sequence[tuple[int, int]]
    order: InOrder[list[tuple[Found, Frame | None]]]
    _tools: PerThread[Tools] = field(init=False)

    def __post_init__(self) -> None:
        self._tools = PerThread(Tools)

    def __call__(self, chunk: int, stop: threading.Event) -> list[tuple[Found, Frame | None]]:
        """See ChunkTask."""
        self.order.wait(chunk, stop)
        with closing(self.tuned.reader()) as reader:
            tensors = range(*self.groups[chunk])
            return [self.advancing.tensor(i, reader, i, self._tools(), stop) for i in tensors]


def size_of(folder: Path) -> int:
    """Bytes of the files in a directory. OSError passes through."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())


def elements_of(table: TensorTable) -> int:
    """Elements of all tensors."""
    bits = np.array([DTYPES[name].bits for name in table.dtypes], np.int64)
    return int((table.nbytes * 8 // np.maximum(bits, 1)).sum())
