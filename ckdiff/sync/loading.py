"""A snapshot filled: with a checkpoint as it is, or with what a stream makes of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckdiff.checkpoints.opening import Given, fetch_all, open_all, open_in
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader, TensorTable
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import filler, grouped
from ckdiff.deltas.versions.checksums import Digester, digester
from ckdiff.deltas.versions.encoding import WINDOW, window_of
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor, fold_memory
from ckdiff.deltas.versions.following import Expected, check_whole
from ckdiff.deltas.versions.following import follow as next_version
from ckdiff.deltas.versions.form import read_marker
from ckdiff.deltas.versions.reading import Version, WeightStream
from ckdiff.dtypes import DTYPES
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.options import Observer, Options
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import PerThread, Stopped
from ckdiff.sync.casting import PublishedView, as_published
from ckdiff.sync.snapshot import Snapshot

_OTHER = "give the checkpoint that the stream begins with, or the one that it has come to"
_TENSOR = 400  # bytes that a tensor takes in our tables


@dataclass(slots=True)
class Where:
    """A stream, and how a publisher is to work."""

    stream: Path
    kind: str  #: of the snapshot
    dtype: str | None  #: that floats are published in, by its name in safetensors
    options: Options  #: workers and memory
    observer: Observer
    only: Container[str] | None = None  #: the tensors that this process keeps; all without


@dataclass(slots=True)
class Loaded:
    """Where a stream stands."""

    snapshot: Snapshot | None  #: None where nothing was published and there is no base
    version: int  #: the newest, 0 in an empty stream
    last_full: int  #: the newest full one, 0 without
    table: TensorTable | None = None  #: of all tensors, whoever keeps them


def load(where: Where, base: Given | None) -> Loaded:
    """What the stream has come to: its newest version, made of its newest full one or of ``base``.

    A base is the checkpoint that the stream begins with, or what its newest version leads to; every
    digest that versions say is held. Raises DeltaError where it is neither, and for a damaged
    stream, UsageError where there is no base and it takes one, and what opening raises.
    """
    room = Room(where.options.memory)
    with ExitStack() as stack:
        versions = stack.enter_context(WeightStream(str(where.stream), room))
        newest = versions.newest
        if not newest:
            found = None if base is None else _copied(where, stack, base)
            return Loaded(None, 0, 0) if found is None else Loaded(found[0], 0, 0, found[1])
        next_version(str(where.stream), None, None, room)  # all versions are there to their ends
        full = _newest_full(versions)
        if full is not None:
            source, chain = open_in(stack, full.path), versions.chain()
            made = _folded(where, room, chain.deltas, source)
            return Loaded(made, newest, full.number, source.table)
        if base is None:
            raise UsageError(
                f"{printable(str(where.stream))} has versions and no full one to begin with",
                hint=f"base=: {_OTHER}",
            )
        (opened_base,) = open_all(stack, base)
        check_whole(opened_base.table, opened_base.label)
        at = 0 if opened_base.directory is None else read_marker(opened_base.directory) or 0
        if at != newest:
            expected = next_version(str(where.stream), None, opened_base.table, room).expected
            found = _copied(where, stack, opened_base, expected)
            if found is not None:
                return Loaded(found[0], newest, 0, found[1])
        chain = versions.chain(base_version=at)
        made = _folded(where, room, chain.deltas, opened_base)
        return Loaded(made, newest, 0, opened_base.table)


def _newest_full(versions: WeightStream) -> Version | None:
    """The full version that the newest one is made of; None where there is none on the way."""
    number = versions.newest
    while number in versions.numbers:
        found = versions.version(number)
        if found.said is None:
            return found
        number = found.said.base_version
    return None


def _copied(
    where: Where, stack: ExitStack, base: Given, expected: Mapping[str, Expected] | None = None
) -> tuple[Snapshot, TensorTable] | None:
    """A snapshot of ``base``, and the table of all of it; None where one is not as expected."""
    (source,) = open_all(stack, base)
    check_whole(source.table, source.label)
    fetch_all([source])
    # files are what engines have; what is in memory is published in another dtype
    dtype = None if source.files else where.dtype
    whole = as_published(source, None, dtype, {})
    view = _kept(whole, where)
    snapshot = Snapshot(view.table, where.kind, where.stream)
    if copy_into(snapshot, view, where, expected or {}):
        return snapshot, whole.table
    snapshot.close()
    return None


def _kept(source: Checkpoint, where: Where) -> Checkpoint:
    """What this process keeps of a checkpoint."""
    only, table = where.only, source.table
    if only is None:
        return source
    chosen = [i for i, name in enumerate(table.names) if name in only]
    return PublishedView(source, chosen, [table.dtypes[i] for i in chosen])


def copy_into(
    snapshot: Snapshot,
    source: Checkpoint,
    where: Where,
    expected: Mapping[str, Expected] | None = None,
) -> bool:
    """Copy a checkpoint of the same table; whether all is as ``expected``."""
    task = _CopyTask(snapshot, source, expected or {})
    right = _run(task, where, 2 * source.reader_memory(WINDOW) + WINDOW)
    source.verify()
    return right


def _folded(where: Where, room: Room, deltas: Sequence[Version], source: Checkpoint) -> Snapshot:
    """A snapshot of what deltas, one after the other, make of ``source``."""
    with ExitStack() as stack:
        for version in deltas:
            stack.callback(version.close)
            version.open(room)
            version.check(source.table)
        fetch_all([source])
        kept = _kept(source, where)
        snapshot = Snapshot(kept.table, where.kind, where.stream)
        task = _FoldTask(snapshot, kept, deltas, Folder(where.stream, _OTHER))
        _run(task, where, fold_memory(deltas) + source.reader_memory(WINDOW), room.taken)
        source.verify()
        for version in deltas:
            version.verify()
    return snapshot


def _run(task: _CopyTask | _FoldTask, where: Where, worker: int, tables: int = 0) -> bool:
    """Run a task for all groups of tensors; whether each said yes."""
    groups, table = task.groups, task.snapshot.table
    meter = Meter(where.observer, int(table.nbytes.sum()))
    need = Need(tables=tables + _TENSOR * len(table), worker=worker)
    workers = fit_workers(where.options.workers, len(groups), need, where.options.memory)
    right = [True]

    def done(group: int, found: bool) -> None:
        right[0] &= found
        meter.add(int(table.nbytes[slice(*groups[group])].sum()))

    with interruptible("nothing was published"):
        run_chunks(range(len(groups)), task, workers=workers, done=done, meter=meter)
    return right[0]


@dataclass(slots=True)
class _CopyTask:
    """The task of a group of tensors: whether they are as expected."""

    snapshot: Snapshot
    source: Checkpoint
    expected: Mapping[str, Expected]
    groups: Sequence[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = list(grouped(self.snapshot.table.nbytes))

    def __call__(self, chunk: int, stop: threading.Event) -> bool:
        """See ChunkTask."""
        with closing(self.source.reader()) as reader:
            tensors = range(*self.groups[chunk])
            return all(self._copy(tensor, reader, stop) for tensor in tensors)

    def _copy(self, at: int, reader: SpanReader, stop: threading.Event) -> bool:
        table, into = self.snapshot.table, self.snapshot.tensor(at)
        expected = self.expected.get(table.names[at])
        bits = DTYPES[table.dtypes[at]].bits
        digest = None if expected is None else digester(expected.checksum, bits)
        copy_tensor(reader, at, into, window_of(table.dtypes[at]), digest, stop)
        return expected is None or (digest is not None and digest.hexdigest() == expected.digest)


def copy_tensor(
    reader: SpanReader,
    tensor: int,
    into: Bytes,
    window: int,
    digest: Digester | None,
    stop: threading.Event,
) -> None:
    """Copy a tensor in windows, on its way through a digester."""
    for start in range(0, len(into), window):
        if stop.is_set():
            raise Stopped
        size = min(window, len(into) - start)
        data = bytes_at(int(reader.acquire(*span(tensor, start, size))[0]), size)
        if digest is not None:
            digest.update(data)
        into[start : start + size] = data
        reader.release()


def span(tensor: int, start: int, size: int) -> tuple[IntArray, IntArray, IntArray]:
    """One span, as readers take several."""
    return np.array([tensor]), np.array([start]), np.array([size])


@dataclass(slots=True)
class _FoldTask:
    """The task of a group of tensors that versions are applied to."""

    snapshot: Snapshot
    source: Checkpoint
    versions: Sequence[Version]
    folder: Folder
    groups: Sequence[tuple[int, int]] = field(init=False)
    _buffers: PerThread[Buffers] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = list(grouped(self.snapshot.table.nbytes))
        self._buffers = PerThread(Buffers)

    def __call__(self, chunk: int, stop: threading.Event) -> bool:
        """See ChunkTask."""
        table = self.snapshot.table
        with closing(self.source.reader()) as reader:
            for at in range(*self.groups[chunk]):
                name, into = table.names[at], self.snapshot.tensor(at)
                tensor = Tensor(
                    name,
                    int(table.nbytes[at]),
                    window_of(table.dtypes[at]),
                    filler(reader, at, stop),
                    [version for version in self.versions if name in version.frames],
                )
                for start, data in self.folder.fold(tensor, self._buffers()):
                    into[start : start + len(data)] = data
        return True


def is_reopened(base: object) -> bool:
    """Whether what was given as the base can be read again later."""
    return isinstance(base, (str, os.PathLike))


def moved_on(stream: Path, version: int) -> DeltaError:
    """The error for a stream in which another one publishes."""
    return DeltaError(
        f"{printable(str(stream))} is not at version {version} any more: something else "
        "publishes into it",
        hint="let one publisher write a stream, and make a new one where it goes on",
    )
