"""A local checkpoint taken through deltas in files where it lies: two passes, and never half done.

The first pass makes every window as applying to another place does, holds all that the deltas say
against it, and writes what differs, old and new, into a journal. The second puts the journal into
the files (:mod:`ckdiff.deltas.versions.changing`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckdiff.checkpoints.opening import open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.applying import rebuild
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.deltas.container import Delta
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.held import holds
from ckdiff.deltas.links import Links
from ckdiff.deltas.outcome import allowed_workers
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import TENSOR, Room, header_cost
from ckdiff.deltas.versions.changing import TwoPasses, begin, what_is_left
from ckdiff.deltas.versions.firstpass import Noting, as_opened, check_local
from ckdiff.deltas.versions.form import read_marker
from ckdiff.deltas.versions.inplace import AppliedInPlace
from ckdiff.deltas.versions.journal import RECORD_MEMORY, Header, JournalFile, JournalWriter
from ckdiff.deltas.versions.lock import WAIT, SyncFolder, locked
from ckdiff.deltas.versions.patching import open_writable
from ckdiff.errors import DeltaError, OutputError, UsageError, printable
from ckdiff.options import Observer, Options, checked_observer, checked_path
from ckdiff.running.runners import interruptible

_ELSEWHERE = "write a new checkpoint with -o"


def apply_deltas_in_place(
    local: str | os.PathLike[str],
    deltas: Sequence[str],
    *,
    wait: float = WAIT,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> AppliedInPlace:
    """Take the checkpoint in the directory ``local`` through ``deltas``, one after the other.

    What comes out has the files that the last delta says, to the last byte. Its tensors have to lie
    where the checkpoint's do. A change that was stopped is finished first, and a checkpoint that is
    what the deltas lead to already stays as it is. A marker goes: what deltas in files make is no
    version that anybody knows.

    Raises as ``versions.inplace.apply_in_place`` does, and DeltaError for deltas that do not follow
    each other or the checkpoint, OutputError for tensors that lie elsewhere.
    """
    options, observer = Options(workers=workers, memory=memory), checked_observer(observer)
    where = Path(checked_path("a local checkpoint", local))
    if not deltas:
        raise UsageError("there is no delta to apply", hint="give one or more, in order")
    began = time.perf_counter()
    with locked(where, wait) as folder, ExitStack() as stack:
        stack.enter_context(interruptible(lambda: what_is_left(where)))
        recovered = begin(folder, options, observer)
        room = Room(options.memory)
        chain = [stack.enter_context(Delta(checked_path("a delta", item), room)) for item in deltas]
        work = _Work(folder, chain, options, observer)
        work.run(stack, room)
    return work.result(recovered, time.perf_counter() - began)


class _Work:
    """A checkpoint that is taken through deltas, by us alone."""

    def __init__(
        self, folder: SyncFolder, chain: list[Delta], options: Options, observer: Observer
    ) -> None:
        self._folder, self._chain = folder, chain
        self._options, self._observer = options, observer
        self._before = read_marker(str(folder.local))
        self._journal_bytes = 0
        self._done = False

    def run(self, stack: ExitStack, room: Room) -> None:
        """Do it; where the checkpoint is there already, nothing."""
        folder, last = self._folder, self._chain[-1].blueprint
        (base,) = open_all(stack, str(folder.local))
        check_local(base, folder.local)
        for i, source in enumerate(base.files):
            head = base.head(i)
            room.take(len(head) + header_cost(head, TENSOR), printable(source.name))
        layout = _Layout.of(base, last)
        groups, readers = len(self._chain[-1].windows.groups), base.reader_memory(FRAME_BYTES)
        workers = allowed_workers(
            self._options, groups, room.taken, readers=readers + RECORD_MEMORY
        )
        files = open_writable(stack, folder.local, layout.names)
        header = Header(self._before, None, layout.journalled(base, files), [], [])
        change = TwoPasses(folder, header, files, workers, self._observer)
        try:
            links = Links(base, self._chain)
            first = partial(self._fold, links, files, layout, workers)
            self._journal_bytes = change.run(first)
        except DeltaError:
            # it may be there already: whoever was stopped at the very end runs it again
            ordered = [files[place] for place in layout.places]
            if layout.rewritten or not holds(ordered, self._chain[-1], workers):
                raise
        self._done = self._journal_bytes > 0
        if self._done and self._before is not None:
            self._observer.note(
                f"{printable(str(folder.local))} was at version {self._before} and is at none "
                "now: engines will fetch a full version"
            )

    def result(self, recovered: str | None, seconds: float) -> AppliedInPlace:
        """What became of it."""
        return AppliedInPlace(
            local=self._folder.local,
            version=None if self._done else self._before,
            before=self._before,
            seed=None,
            versions=[],
            deltas=len(self._chain) if self._done else 0,
            tensors=self._changed() if self._done else 0,
            journal_bytes=self._journal_bytes,
            recovered=recovered,
            seconds=seconds,
        )

    def _fold(
        self, links: Links, files: Sequence[int], layout: _Layout, workers: int,
        writer: JournalWriter,
    ) -> None:  # fmt: skip
        """The first pass: everything is checked, and nothing of the checkpoint changes."""
        noting = Noting(writer, files, layout.names)
        for file, text in layout.rewritten.items():
            noting.note(file, 0, memoryview(text))
        rebuild(links, _Noted(noting, layout.places), workers, self._observer)

    def _changed(self) -> int:
        """How many tensors are not what they were, as far as the first and the last delta say."""
        first, last = self._chain[0], self._chain[-1]
        before = {
            name: first.tensors.base_hashes[i].tobytes()
            for i, name in enumerate(first.blueprint.names)
            if first.tensors.based[i] and i not in first.ranges.odd
        }
        hashes = zip(last.blueprint.names, last.tensors.tuned_hashes, strict=True)
        return sum(before.get(name) != found.tobytes() for name, found in hashes)


@dataclass(frozen=True, slots=True)
class _Noted:
    """Takes what is rebuilt, and notes down how it differs. See Target."""

    noting: Noting
    places: Sequence[int]  #: for each file of the result its position among those that change

    def __enter__(self) -> _Noted:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """See Target."""
        self.noting.note(self.places[file], offset, data)

    def commit(self) -> None:
        """See Target; the journal is finished by whoever began it."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which files of a checkpoint become which of the result."""

    names: list[str]  #: the files that may change: the checkpoint's, and its index where it does
    places: list[int]  #: for each file of the result its position among ``names``
    rewritten: dict[int, bytes]  #: what these begin with, where it is not as it was

    @classmethod
    def of(cls, base: Checkpoint, made: Blueprint) -> _Layout:
        """Raises OutputError where tensors lie elsewhere, or files have other names or sizes."""
        names = [source.name for source in base.files]
        wanted = [plan.name for plan in made.files]
        if not made.directory and len(names) == len(wanted) == 1:
            wanted = names  # what was one file may have any name
        if sorted(names) != sorted(wanted):
            other = min(set(names) ^ set(wanted))
            has = "no longer has" if other in names else "also has"
            raise _elsewhere(f"what the deltas lead to {has} the file {called(other)}")
        places = [names.index(name) for name in wanted]
        there = Blueprint.of_checkpoint(base)
        _check_tensors(there, made, places)
        rewritten = {
            at: plan.head
            for at, plan in zip(places, made.files, strict=True)
            if there.files[at].head != plan.head
        }
        if made.directory and there.index != made.index:
            text = _same_index(there, made)
            rewritten[len(names)] = text
            names = [*names, base.index_name or ""]
        return cls(names, places, rewritten)

    def journalled(self, base: Checkpoint, files: Sequence[int]) -> list[JournalFile]:
        """The files as the journal has them, which are those that are read."""
        count = len(base.files)
        found = as_opened(base, files[:count])
        for name, fd in zip(self.names[count:], files[count:], strict=True):
            status = os.fstat(fd)
            found.append(JournalFile(name, status.st_size, status.st_ino))
        return found


def _check_tensors(there: Blueprint, made: Blueprint, places: Sequence[int]) -> None:
    """Raise OutputError unless all tensors of the result lie where the checkpoint has them."""
    held = {name: i for i, name in enumerate(there.names)}
    for i, name in enumerate(made.names):
        at = held.get(name, -1)
        if at < 0:
            raise _elsewhere(f"the deltas add {called(name)}")
        if (there.dtypes[at], there.shapes[at]) != (made.dtypes[i], made.shapes[i]):
            what = "shape" if there.dtypes[at] == made.dtypes[i] else "dtype"
            raise _elsewhere(f"the deltas give {called(name)} another {what}")
    gone = held.keys() - set(made.names)
    if gone:
        raise _elsewhere(f"the deltas remove {called(min(gone))}")
    for i, name in enumerate(made.names):
        at, wanted = held[name], (places[int(made.file[i])], int(made.begin[i]))
        if (int(there.file[at]), int(there.begin[at])) != wanted:
            raise _elsewhere(f"the deltas lead to files in which {called(name)} lies elsewhere")
    for at, plan in zip(places, made.files, strict=True):
        if (there.files[at].size, len(there.files[at].head)) != (plan.size, len(plan.head)):
            raise _elsewhere(f"{called(plan.name)} has another size in what the deltas lead to")


def _same_index(there: Blueprint, made: Blueprint) -> bytes:
    """The index of the result, which fits in the place of the checkpoint's. Raises OutputError."""
    if there.index is None or made.index is None:
        has = "has no" if made.index is None else "has an"
        raise _elsewhere(f"what the deltas lead to {has} index of its files")
    if there.index[0] != made.index[0] or len(there.index[1]) != len(made.index[1]):
        raise _elsewhere("what the deltas lead to has an index of another name or size")
    return made.index[1]


def _elsewhere(why: str) -> OutputError:
    return OutputError(f"the checkpoint cannot be changed in place: {why}", hint=_ELSEWHERE)
