"""A local checkpoint taken to a version of a stream where it lies: two passes, and never half done.

The first pass folds each tensor that changes through all its versions and holds every digest, and
writes what differs, old and new, into a journal. The second puts the journal into the files. What
was stopped in the second is finished, or undone, from the journal alone, by whoever comes next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckdiff.checkpoints.halfway import FOLDER, is_half_way
from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.changing import TwoPasses, begin, take_up, tidy, what_is_left
from ckdiff.deltas.versions.firstpass import Chosen, FirstPass, as_opened, check_local
from ckdiff.deltas.versions.folding import Folder, fold_memory
from ckdiff.deltas.versions.form import read_marker, version_text
from ckdiff.deltas.versions.given import StreamPath, as_paths, asked_versions, given_versions
from ckdiff.deltas.versions.journal import RECORD_MEMORY, Header, JournalWriter
from ckdiff.deltas.versions.lock import WAIT, SyncFolder, locked
from ckdiff.deltas.versions.patching import open_writable
from ckdiff.deltas.versions.reading import Chain, opened
from ckdiff.deltas.versions.swapping import begin_swap, seed_path, swap, swap_header
from ckdiff.errors import DeltaError, printable
from ckdiff.options import Observer, Options, checked_observer, checked_path
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks

_OTHER_BASE = "the checkpoint is not at the expected version; fetch a full version"


@dataclass(slots=True)
class AppliedInPlace:
    """What happened to a local checkpoint. ``to_dict()`` is JSON-able."""

    local: Path
    version: int | None  #: that it is at; None after deltas in files, which lead to none
    before: int | None  #: that it was at; None where it had no marker
    seed: int | None  #: the full version that took its place; None where none did
    versions: list[int]  #: the deltas that were applied, in their order
    deltas: int  #: that were applied: as many as ``versions``, or those in files
    tensors: int  #: that they change
    journal_bytes: int  #: that were kept while it was changed
    #: whether an unfinished change was finished ("finished"), or undone ("undone"), before
    recovered: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "local": str(self.local),
            "version": _text(self.version),
            "before": _text(self.before),
            "seed": _text(self.seed),
            "versions": [version_text(number) for number in self.versions],
            "deltas": self.deltas,
            "tensors": self.tensors,
            "journal_bytes": self.journal_bytes,
            "recovered": self.recovered,
            "seconds": self.seconds,
        }


def _text(version: int | None) -> str | None:
    return None if version is None else version_text(version)


def apply_in_place(
    local: str | os.PathLike[str],
    stream: StreamPath | Sequence[StreamPath],
    *,
    target: int | None = None,
    base_version: int | None = None,
    wait: float = WAIT,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> AppliedInPlace:
    """Take the checkpoint in the directory ``local`` to version ``target``, or to the newest.

    ``stream`` is a stream's directory, or version directories in it, which have to be all that
    lead there. Without a marker the checkpoint is at ``base_version``, or 0. A change that was
    stopped is finished first. Nothing changes unless the whole chain is sound, and there is no
    marker while something does. Others may hold the lock for ``wait`` seconds. A full version, and
    the deltas after it, are made aside and take the place of what belongs to the checkpoint.

    Raises DeltaError for a chain that does not lead there, damaged versions and another base;
    OutputError for links, files that others share or that may not be written, a lock that is
    held, and a full disk; UsageError, CheckpointError, SourceChanged, BudgetError, Interrupted.
    """
    options, observer = Options(workers=workers, memory=memory), checked_observer(observer)
    where, paths = Path(checked_path("a local checkpoint", local)), as_paths(stream)
    target, base_version = asked_versions(target, base_version)
    began = time.perf_counter()
    with locked(where, wait) as folder, ExitStack() as stack:
        stack.enter_context(interruptible(lambda: what_is_left(where)))
        recovered = begin(folder, options, observer)
        room = Room(options.memory)
        versions = given_versions(paths, room)
        stack.callback(versions.close)
        before = read_marker(str(where))
        chain = versions.chain(target, base_version=_at_version(where, before, base_version))
        work = _Work(folder, before, chain, options, observer)
        work.run(stack, room)
    return work.result(recovered, time.perf_counter() - began)


def _at_version(local: Path, marker: int | None, said: int | None) -> int:
    """At which version a checkpoint is. Raises DeltaError where its marker says another."""
    if None not in (marker, said) and marker != said:
        raise DeltaError(
            f"the marker of {printable(str(local))} says version {marker}, and not {said}",
            hint="leave out the base version",
        )
    return marker or said or 0


def recover(
    local: str | os.PathLike[str],
    *,
    undo: bool = False,
    wait: float = WAIT,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> AppliedInPlace:
    """Finish, or ``undo``, a change in place of ``local`` that was stopped; no stream is needed.

    A checkpoint that is whole stays as it is. Raises as ``apply_in_place`` does, and DeltaError for
    a journal that is not ours, is damaged, or of files that others have changed since.
    """
    options, observer = Options(workers=workers, memory=memory), checked_observer(observer)
    where = Path(checked_path("a local checkpoint", local))
    began = time.perf_counter()
    half, version = False, None
    if not where.is_dir() or (where / FOLDER).exists():
        with locked(where, wait) as folder, interruptible(lambda: what_is_left(where)):
            half = is_half_way(where) is not None
            if half:
                version = take_up(folder, options, observer, undo=undo)
            else:
                tidy(folder)
                version = read_marker(str(where))
    return AppliedInPlace(
        local=where,
        version=version,
        before=None if half else version,
        seed=None,
        versions=[],
        deltas=0,
        tensors=0,
        journal_bytes=0,
        recovered=("undone" if undo else "finished") if half else None,
        seconds=time.perf_counter() - began,
    )


class _Work:
    """A checkpoint that is taken through a chain, by us alone."""

    def __init__(
        self,
        folder: SyncFolder,
        before: int | None,
        chain: Chain,
        options: Options,
        observer: Observer,
    ) -> None:
        self._folder, self._before, self._chain = folder, before, chain
        self._options, self._observer = options, observer
        self.tensors = self.journal_bytes = 0

    def run(self, stack: ExitStack, room: Room) -> None:
        """Do it; where the checkpoint is there already, nothing."""
        if self._chain.seed is not None:
            self._seed()
        elif self._chain.deltas:
            self._patch(stack, room)

    def result(self, recovered: str | None, seconds: float) -> AppliedInPlace:
        """What became of it."""
        chain = self._chain
        return AppliedInPlace(
            local=self._folder.local,
            version=chain.target,
            before=self._before,
            seed=None if chain.seed is None else chain.seed.number,
            versions=[version.number for version in chain.deltas],
            deltas=len(chain.deltas),
            tensors=self.tensors,
            journal_bytes=self.journal_bytes,
            recovered=recovered,
            seconds=seconds,
        )

    def _seed(self) -> None:
        """Put the full version that the chain begins with in the checkpoint's place."""
        assert self._chain.seed is not None
        folder, seed = self._folder, self._chain.seed
        versions = [seed.path, *(version.path for version in self._chain.deltas)]
        made = apply_anew(
            seed.path, versions, seed_path(folder),
            target=self._chain.target, base_version=seed.number,
            workers=self._options.workers, memory=self._options.memory, observer=self._observer,
        )  # fmt: skip
        self.tensors = made.tensors
        header = swap_header(folder, self._before, self._chain.target)
        begin_swap(folder, header)
        swap(folder, header, undo=False)

    def _patch(self, stack: ExitStack, room: Room) -> None:
        """Apply the deltas."""
        folder = self._folder
        base = stack.enter_context(open_local(folder.local))
        check_local(base, folder.local)
        opened(stack, room, self._chain, base.table)
        names = [source.name for source in base.files]
        files = open_writable(stack, folder.local, names)
        header = Header(self._before, self._chain.target, as_opened(base, files), [], [])
        chosen = Chosen(base, self._chain)
        self.tensors = len(chosen.tensors)
        need = Need(
            tables=room.taken,
            worker=fold_memory(self._chain.deltas) + RECORD_MEMORY,
        )
        workers = fit_workers(self._options.workers, len(chosen.groups), need, self._options.memory)
        change = TwoPasses(folder, header, files, workers, self._observer)
        self.journal_bytes = change.run(partial(self._fold, base, files, chosen, workers))

    def _fold(
        self,
        base: Checkpoint,
        files: Sequence[int],
        chosen: Chosen,
        workers: int,
        writer: JournalWriter,
    ) -> None:
        """The first pass: everything is checked, and nothing of the checkpoint changes."""
        sizes = chosen.sizes
        meter = Meter(self._observer, sum(sizes))

        def finished(group: int, _: None) -> None:
            meter.add(sum(sizes[slice(*chosen.groups[group])]))

        task = FirstPass(base, files, chosen, Folder(self._folder.path, _OTHER_BASE), writer)
        run_chunks(range(len(chosen.groups)), task, workers=workers, done=finished, meter=meter)
        base.verify()
        for version in self._chain.deltas:
            version.verify()
