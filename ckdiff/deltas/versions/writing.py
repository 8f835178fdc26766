"""Two checkpoints -> the next version of a stream: complete, or not there at all."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np

from ckdiff.checkpoints.opening import Given, fetch_all, open_all
from ckdiff.checkpoints.pieces import notes_of
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.conversions.convert import convert
from ckdiff.deltas.blueprint import refuse_components
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.checksums import check_checksum
from ckdiff.deltas.versions.encoding import TOOLS_MEMORY
from ckdiff.deltas.versions.following import (
    Following,
    check_whole,
    follow,
    not_sayable,
    unsayable,
)
from ckdiff.deltas.versions.form import PACKED, Said, check_encoding, version_name
from ckdiff.deltas.versions.grouping import GROUP_BYTES, grouped
from ckdiff.deltas.versions.holding import hold_full
from ckdiff.deltas.versions.making import Found, VersionTask
from ckdiff.deltas.versions.outcome import VersionReport as VersionReport
from ckdiff.deltas.versions.shards import SHARD_BYTES, Shards
from ckdiff.deltas.versions.writepacked import PackedMaking
from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError, printable
from ckdiff.options import Observer, Options, checked_int, checked_observer, checked_output
from ckdiff.outputs.place import Place, write_errors
from ckdiff.outputs.placing import sync_path
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import InOrder

_AHEAD = 3  # groups for each worker that may be done before the oldest is written
_TENSOR = 700  # bytes that a tensor takes in our tables, at most
_LEVELS = range(1, 23)  # of zstd


def write_version(
    base: Given | None,
    tuned: Given,
    stream: str | os.PathLike[str],
    *,
    encoding: str = "xor",
    checksum: str = "xxh3-128",
    number: int | None = None,
    base_version: int | None = None,
    full: bool = False,
    full_when_needed: bool = False,
    level: int = 1,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> VersionReport:
    """Publish ``tuned`` as the next version of ``stream``, or as version ``number``.

    A delta from ``base``, which has to be what the newest version leads to: where versions say
    digests of its tensors, these are held against it. A full version with ``full``, then no base is
    needed, or with ``full_when_needed`` where a delta cannot say what changed. ``level`` is zstd's.
    With ``packed`` it is as small as can be, has digests of its own, and is for readers that are
    ours. A delta says that it is made from the newest version, or from ``base_version``. A file of
    the version has at most ``shard_bytes`` of frames. One pass over both sides in bounded memory;
    the version is there whole or not at all.

    Raises UsageError, CheckpointError, SourceChanged, BudgetError, DeltaError for another base, a
    stream that is damaged and what no delta can say, OutputError and Interrupted.
    """
    _check(encoding, level, checksum)
    options = Options(workers=workers, memory=memory)
    observer, path = checked_observer(observer), checked_output(stream)
    number = None if number is None else checked_int("number", number)
    if base is None and not full:
        raise UsageError("a delta needs a base", hint="give one, or publish a full version")
    with ExitStack() as stack:
        sides = open_all(stack, tuned) if base is None else open_all(stack, tuned, base)
        _check_sides(sides, observer)
        full = full or _must_be_full(sides, encoding, full_when_needed, observer)
        room = Room(options.memory)
        following = follow(str(path), number, None if full else sides[1].table, room)
        with MadeFolder(path):
            if full:
                return _full(sides[0], path, following, options, observer)
            said = Said(following.number, _before(following, base_version), encoding, checksum)
            return _delta(
                sides, path, said, following, room, options=options, level=level,
                shard_bytes=shard_bytes, observer=observer,
            )  # fmt: skip


def _check_sides(sides: Sequence[Checkpoint], observer: Observer) -> None:
    for side in sides:
        refuse_components(side)
        check_whole(side.table, side.label)
    for note in notes_of(sides):
        observer.note(note)


def _delta(
    sides: Sequence[Checkpoint], path: Path, said: Said, following: Following, room: Room, *,
    options: Options, level: int, shard_bytes: int, observer: Observer,
) -> VersionReport:  # fmt: skip
    """Publish a delta of the tuned side, which is the first, from the base."""
    if said.encoding == PACKED:
        packed = PackedMaking(sides[1], sides[0], path, said, options)
        packed.prepare()
        fetch_all(sides)
        with interruptible("nothing was published"):
            return packed.run(following, room, observer)
    work = _Making(sides[1], sides[0], path, said, options)
    work.prepare(following, room, level)
    fetch_all(sides)
    with interruptible("nothing was published"):
        return work.run(Shards, shard_bytes, observer)


def _before(following: Following, asked: int | None) -> int:
    """The version that a delta says it is made from; UsageError for one that is not before it."""
    before = following.base_version if asked is None else checked_int("base_version", asked)
    if not 0 <= before < following.number:
        raise UsageError(
            f"version {following.number} cannot be made from version {before}",
            hint="give it a higher number",
        )
    return before


def _check(encoding: str, level: int, checksum: str) -> None:
    check_encoding(encoding)
    if checked_int("level", level) not in _LEVELS:
        raise UsageError(f"level must be from 1 to {_LEVELS[-1]}, not {level}")
    check_checksum(checksum)


def _must_be_full(
    sides: Sequence[Checkpoint], encoding: str, allowed: bool, observer: Observer
) -> bool:
    """Whether no delta can say what changed; raises DeltaError where that is not allowed."""
    why = unsayable(sides[1].table, sides[0].table, encoding)
    if why is None:
        return False
    if not allowed:
        raise not_sayable(why)
    observer.note(printable(f"this is a full version: {why}"))
    return True


class MadeFolder:
    """Makes a stream's directory where there is none, and removes it again where nothing came."""

    def __init__(self, path: Path) -> None:
        self._path, self._ours = path, False

    def __enter__(self) -> None:
        if not self._path.is_dir():
            with write_errors(self._path):
                self._path.mkdir(parents=True)
                sync_path(self._path.parent)
            self._ours = True

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None and self._ours:
            with suppress(OSError):
                self._path.rmdir()


def _full(
    tuned: Checkpoint, stream: Path, following: Following, options: Options, observer: Observer
) -> VersionReport:
    """Publish all of a checkpoint, with its config and tokenizer files."""
    out = stream / version_name(following.number)
    made = convert(tuned, out, workers=options.workers, memory=options.memory, observer=observer)
    size = sum(entry.stat().st_size for entry in os.scandir(out) if entry.is_file())
    changed = int(tuned.table.nbytes.sum())
    return VersionReport(
        out, following.number, True, made.tensors, changed, size, 1.0, made.seconds
    )


class _Making:
    """A delta being made: planned on headers, then ``run``."""

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, stream: Path, said: Said, options: Options
    ) -> None:
        self._base, self._tuned, self._said = base, tuned, said
        self._out = stream / version_name(said.version)
        self._options = options
        self._groups = list(grouped(tuned.table.nbytes))
        self._place = Place(self._out, directory=True, overwrite=False)
        self._level, self._workers = 1, 1
        self._following = Following(said.version, said.base_version)

    def prepare(self, following: Following, room: Room, level: int) -> None:
        """Say what does not work before anything is fetched: OutputError and BudgetError."""
        self._level, self._following = level, following
        self._place.keep_away_from([self._base, self._tuned])
        self._place.check()
        readers = sum(side.reader_memory(GROUP_BYTES) for side in (self._base, self._tuned))
        tables = room.taken + _TENSOR * len(self._tuned.table)
        need = Need(tables=tables, worker=TOOLS_MEMORY + _AHEAD * GROUP_BYTES + readers)
        self._workers = fit_workers(
            self._options.workers, len(self._groups), need, self._options.memory
        )

    def run(self, shards: type[Shards], shard_bytes: int, observer: Observer) -> VersionReport:
        """Make it of both sides, which are here."""
        began = time.perf_counter()
        table = self._tuned.table
        with self._place as place, write_errors(self._out):
            hold_full(self._following, self._base, self._said.checksum, self._workers)
            with closing(shards(place.path, shard_bytes)) as files:
                tensors, elements, changed = self._compare(files, observer)
                self._base.verify()
                self._tuned.verify()
                files.finish(self._said)
            size = sum(entry.stat().st_size for entry in os.scandir(place.path))
            place.commit()
        bits = np.array([DTYPES[name].bits for name in table.dtypes], np.int64)
        total = int((table.nbytes * 8 // np.maximum(bits, 1)).sum())
        return VersionReport(
            path=self._out,
            version=self._said.version,
            full=False,
            tensors=tensors,
            changed_bytes=changed,
            bytes=size,
            density=elements / total if total else 0.0,
            seconds=time.perf_counter() - began,
        )

    def _compare(self, files: Shards, observer: Observer) -> tuple[int, int, int]:
        """Write all frames; how many tensors, elements and bytes changed."""
        table, groups = self._tuned.table, self._groups
        order = InOrder[list[Found]](_AHEAD * self._workers)
        task = VersionTask(
            (self._base, self._tuned), self._said, self._level, self._following.expected,
            groups, order, self._place.path, self._workers,
        )  # fmt: skip
        meter = Meter(observer, 2 * int(table.nbytes.sum()))
        totals = np.zeros(3, np.int64)

        def finished(group: int, result: list[Found]) -> None:
            for at, found in order.put(group, result):
                for one in found:
                    if one.frame is not None:
                        name = table.names[one.tensor]
                        files.add(name, one.digest, one.frame.size, one.frame.parts())
                        one.frame.close()
                        totals[:] += 1, one.elements, one.changed
                meter.add(2 * int(table.nbytes[slice(*groups[at])].sum()))

        run_chunks(range(len(groups)), task, workers=self._workers, done=finished, meter=meter)
        tensors, elements, changed = totals.tolist()
        return tensors, elements, changed
