"""Putting a journal into the files that it is of, forwards or backwards, as often as one likes."""

from __future__ import annotations

import os
import stat
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import xxhash

from ckdiff.checkpoints.halfway import JOURNAL_NAME
from ckdiff.checkpoints.places.openfile import make_room, read_into
from ckdiff.deltas.parts import called
from ckdiff.deltas.versions.journal import (
    CHANGES,
    PART,
    TENSOR,
    Journal,
    JournalFile,
    Record,
)
from ckdiff.deltas.versions.lock import SyncFolder
from ckdiff.deltas.versions.marker import put_marker
from ckdiff.errors import DeltaError, OutputError, printable
from ckdiff.kernels.changes import MARGIN, PAGE, Put
from ckdiff.kernels.memory import Bytes
from ckdiff.options import Observer
from ckdiff.outputs.place import write_errors
from ckdiff.outputs.writing import start_writeback, sync_data, write_at
from ckdiff.running.runners import Meter, run_chunks
from ckdiff.running.threads import PerThread, Stopped

_GROUP = 32  # records that are one piece of work
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_writable(stack: ExitStack, local: Path, names: Sequence[str]) -> list[int]:
    """Descriptors of files of a checkpoint that may be changed where they are, closed by ``stack``.

    Raises OutputError for links and for files with other links: others read these too.
    """
    make_room(len(names))
    found = []
    root = os.path.realpath(local)
    for name in names:
        path = os.path.join(root, name)
        shown = printable(os.path.join(local, name))
        if os.path.realpath(path) != path:
            raise _shared(shown, "is a link, or behind one")
        try:
            fd = os.open(path, _FLAGS)
        except OSError as error:
            raise OutputError(
                f"{shown} cannot be changed in place: {error.strerror}",
                hint="make it writable, or write a new checkpoint with -o",
            ) from None
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _shared(shown, "is not a regular file")
        if status.st_nlink != 1:
            raise _shared(shown, f"has {status.st_nlink} names")
        found.append(fd)
    return found


def _shared(shown: str, why: str) -> OutputError:
    return OutputError(
        f"{shown} {why}, and would change for others too",
        hint="copy the checkpoint, or write a new one with -o",
    )


@dataclass(frozen=True, slots=True)
class Putting:
    """A journal that is put into its files."""

    folder: SyncFolder
    journal: Journal
    files: Sequence[int]  #: descriptors of the journal's files
    workers: int
    observer: Observer

    def run(self, *, undo: bool, verify: bool) -> int | None:
        """Finish the change, or undo it; gives the version that the checkpoint is at then.

        With ``verify`` each tensor's digest is held against the journal's before it is called
        whole. Raises DeltaError where others have changed the files, and OutputError; the journal
        stays then.
        """
        header = self.journal.header
        changes, tensors = self._listed()
        self._all(_PutTask(self.journal, self.files, header.files, changes, undo))
        if verify:
            self._all(_VerifyTask(self.journal, self.files, header.files, tensors, undo))
        version = header.before if undo else header.after
        with write_errors(self.folder.local):
            for fd in self.files:
                start_writeback(fd)
            for fd in self.files:
                sync_data(fd)
            settle(self.folder, version)
        return version

    def _listed(self) -> tuple[list[array[int]], list[array[int]]]:
        """Where the records are, of each kind, in groups; those of a file in the order of what they
        are of, those of different files take turns.
        """
        count = len(self.journal.header.files)
        kinds = {kind: [_Column() for _ in range(count)] for kind in (CHANGES, TENSOR)}
        for at, record in self.journal.records():
            kinds[record.kind][record.file].add(at, record.begin)
        changes, tensors = ([column.ordered() for column in kinds[k]] for k in (CHANGES, TENSOR))
        return _in_turn(changes, _GROUP), _in_turn(tensors, 1)

    def _all(self, task: _Task) -> None:
        meter = Meter(self.observer, len(task.groups))

        def finished(_: int, __: None) -> None:
            meter.add(1)

        with write_errors(self.folder.local):
            run_chunks(
                range(len(task.groups)), task, workers=self.workers, done=finished, meter=meter
            )


class _Column:
    """Records of one kind and file."""

    def __init__(self) -> None:
        self._at, self._begin = array("q"), array("q")

    def add(self, at: int, begin: int) -> None:
        """One that is at a byte of the journal, and of what begins at a byte of the file."""
        self._at.append(at)
        self._begin.append(begin)

    def ordered(self) -> array[int]:
        """Where they are in the journal, in the order of what they are of."""
        at, begin = (np.frombuffer(column, np.int64) for column in (self._at, self._begin))
        return array("q", at[np.argsort(begin, kind="stable")].tobytes())


def settle(folder: SyncFolder, version: int | None) -> None:
    """Say that the checkpoint is whole, at a version or without one. OSError passes through."""
    if version is not None:
        put_marker(folder, version)
    folder.remove(JOURNAL_NAME)
    if version is None:  # beside a marker a journal says nothing
        folder.sync()


def _in_turn(columns: Sequence[array[int]], size: int) -> list[array[int]]:
    def parts(column: array[int]) -> Iterator[array[int]]:
        return (column[i : i + size] for i in range(0, len(column), size))

    turns = zip_longest(*(parts(column) for column in columns))
    return [group for turn in turns for group in turn if group is not None]


@dataclass(slots=True)
class _Task(ABC):
    """What is done to a group of records. Shared by the threads."""

    journal: Journal
    fds: Sequence[int]
    files: Sequence[JournalFile]
    groups: Sequence[array[int]]
    undo: bool
    _buffer: PerThread[Bytes] = field(default_factory=lambda: PerThread(_buffer))

    def __call__(self, chunk: int, stop: threading.Event) -> None:
        """See ChunkTask; a chunk is a group of records."""
        for at in self.groups[chunk]:
            if stop.is_set():
                raise Stopped
            self.one(at)
        self.finish(chunk)

    def finish(self, chunk: int) -> None:  # noqa: B027
        """All of a group are done."""

    @abstractmethod
    def one(self, at: int) -> None:
        """Do it to one record."""

    def read(self, record: Record, low: int, size: int, margin: int = 0) -> Bytes:
        """Bytes of a record's file, and a ``margin`` of any after them, in this thread's buffer."""
        into = self._buffer()[: size + margin]
        if read_into(self.fds[record.file], into[:size].data, record.begin + low) < size:
            raise self.journal.fault(f"{called(self.files[record.file].name)} was cut")
        return into

    def changed(self, record: Record) -> DeltaError:
        """The error for a file that is neither what it was nor what it is to be."""
        name = called(self.files[record.file].name)
        return self.journal.fault(f"others have changed {name} since it was made")


def _buffer() -> Bytes:
    return np.empty(PART + MARGIN, np.uint8)


@dataclass(slots=True)
class _PutTask(_Task):
    _put: PerThread[Put] = field(default_factory=lambda: PerThread(lambda: Put(PART)))

    def one(self, at: int) -> None:
        record, changes = self.journal.changes(at)
        held = self.read(record, 0, record.size, MARGIN)
        try:
            runs = self._put()(changes, held, record.begin % PAGE, undo=self.undo)
        except ValueError:
            raise self.journal.fault(f"its record at byte {at:,} is damaged") from None
        if runs is None:
            raise self.changed(record)
        for first, stop in runs:
            write_at(self.fds[record.file], held[first:stop].data, record.begin + first)

    def finish(self, chunk: int) -> None:
        """Let the disk begin with what was written."""
        group = self.groups[chunk]
        first, last = self.journal.record(group[0]), self.journal.record(group[-1])
        end = last.begin + last.size
        start_writeback(self.fds[first.file], first.begin, end - first.begin)


class _VerifyTask(_Task):
    def one(self, at: int) -> None:
        record, (before, after) = self.journal.digests(at)
        state = xxhash.xxh3_128()
        for low in range(0, record.size, PART):
            state.update(self.read(record, low, min(PART, record.size - low)).data)
        if state.digest() != (before if self.undo else after):
            raise self.changed(record)
