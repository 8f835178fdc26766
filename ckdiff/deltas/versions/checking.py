"""Verifying a stream of weight versions without applying it.

What a chain is made from decides how much can be verified. From a full version, or a base that is
given, every tensor is folded through its versions and all digests are held; nothing is written.
Otherwise every frame is decoded to its end, and frames of one tensor are held against each other.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckdiff.checkpoints.opening import Given, fetch_all, open_all, open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import at_version, filler
from ckdiff.deltas.versions.encoding import WINDOW, window_of
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor, fold_memory
from ckdiff.deltas.versions.form import PACKED, XOR, version_name
from ckdiff.deltas.versions.given import NamedVersions, asked_versions, given_versions
from ckdiff.deltas.versions.grouping import grouped
from ckdiff.deltas.versions.places import PLACES_MEMORY, count_places
from ckdiff.deltas.versions.reading import Chain, Version, opened
from ckdiff.options import Observer, Options, checked_observer, checked_path
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import PerThread, Stopped

_HINT = "give the checkpoint that the stream begins with, or fetch the version again"


@dataclass(slots=True)
class CheckedStream:
    """What was verified. ``to_dict()`` is JSON-able."""

    stream: str
    versions: int
    frames: int  #: all of them decoded to their ends
    digests: int  #: of them those whose tensors were made and held against their digests
    bytes: int  #: of the versions' files

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {name: getattr(self, name) for name in self.__slots__} | {"ok": True}


@dataclass(frozen=True, slots=True)
class Segment:
    """Deltas that follow each other, the oldest first, and what they are made from."""

    source: Version | None  #: a full version
    from_base: bool  #: whether it is the base that was given
    deltas: list[Version]


def check_stream(
    path: str | os.PathLike[str],
    *,
    base: Given | None = None,
    target: int | None = None,
    base_version: int | None = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> CheckedStream:
    """Verify a stream of weight versions, or one version, all or those up to ``target``.

    Chains, indexes, shards, headers and frames; the digests of all versions after a full one, and
    with ``base`` of those that begin with it. Nothing is written, memory is bounded. Raises
    DeltaError for what is wrong, UsageError, CheckpointError, SourceChanged, BudgetError and
    Interrupted.
    """
    options = Options(workers=workers, memory=memory)
    where, observer = checked_path("a stream", path), checked_observer(observer)
    target, base_version = asked_versions(target, base_version)
    with ExitStack() as stack, interruptible():
        room = Room(options.memory)
        stream = given_versions([where], room)
        stack.callback(stream.close)
        given = None if base is None else open_all(stack, base)[0]
        at = None if given is None else at_version(given, base_version)
        single = isinstance(stream, NamedVersions)
        if isinstance(stream, NamedVersions):
            versions = stream.versions
        else:
            last = stream.newest if target is None else stream.version(target).number
            versions = [stream.version(number) for number in stream.numbers if number <= last]
        found = CheckedStream(where, len(versions), 0, 0, 0)
        found.bytes = sum(version.nbytes() for version in versions)
        work = _Checking(options, room, observer, found)
        for version in versions:
            if version.full:
                open_in(stack, version.path)
        for segment in segments(versions, at, gaps=single):
            if segment.from_base and given is not None:
                fetch_all([given])
            work.segment(segment, given if segment.from_base else None)
        return found


def segments(versions: Sequence[Version], at: int | None, *, gaps: bool) -> list[Segment]:
    """The chains that end in versions from which no other is made.

    ``at`` is the version of the base that was given. With ``gaps`` links may lead to what is not
    there. Raises DeltaError for a link that is missing.
    """
    known = {version.number: version for version in versions}
    bases = {version.said.base_version for version in versions if version.said is not None}
    found: list[Segment] = []
    for leaf in versions:
        if leaf.full or leaf.number in bases:
            continue
        deltas: list[Version] = []
        number, version = leaf.number, leaf
        while version.said is not None:
            deltas.insert(0, version)
            number = version.said.base_version
            if number == at:
                found.append(Segment(None, True, deltas))
                deltas = []
            if number not in known:
                if number and number != at and not gaps:
                    raise version.fault(
                        f"is made from {version_name(number)}, which is missing",
                        "fetch it, or begin with a full version",
                    )
                break
            version = known[number]
        if deltas:
            found.append(Segment(version if version.full else None, False, deltas))
    return found


@dataclass(slots=True)
class _Checking:
    options: Options
    room: Room
    observer: Observer
    found: CheckedStream
    _sizes: dict[str, int] = field(default_factory=dict)  #: bytes of tensors, as frames say

    def segment(self, segment: Segment, base: Checkpoint | None) -> None:
        """Verify a chain, from ``base`` where it begins with that."""
        taken = self.room.taken
        with ExitStack() as stack:
            source = base
            if segment.source is not None:
                source = open_in(stack, segment.source.path)
            if source is None:
                for version in segment.deltas:
                    self._frames(version)
            else:
                chain = Chain(segment.source, segment.deltas, segment.deltas[-1].number)
                opened(stack, self.room, chain, source.table)
                self._fold(source, segment.deltas)
        self.room.give(self.room.taken - taken)

    def _frames(self, version: Version) -> None:
        """Decode all frames of a version."""
        version.open(self.room)
        version.check()
        tensors = list(version.frames)
        for tensor in tensors:
            self._hold_size(version, tensor)
        meter = Meter(self.observer, sum(frame.size for frame in version.frames.values()))
        workers = self._fit(len(tensors), PLACES_MEMORY)

        def decode(chunk: int, stop: threading.Event) -> None:
            if stop.is_set():
                raise Stopped
            count_places(version, tensors[chunk], self._sizes.get(tensors[chunk]))

        def finished(chunk: int, _: None) -> None:
            meter.add(version.frames[tensors[chunk]].size)

        run_chunks(range(len(tensors)), decode, workers=workers, done=finished, meter=meter)
        version.verify()
        self.found.frames += len(tensors)
        version.close()

    def _hold_size(self, version: Version, tensor: str) -> None:
        """Raise DeltaError where a frame is of a tensor of another size than one before it."""
        head = version.head(tensor, self._sizes.get(tensor))
        if version.said is not None and version.said.encoding in (XOR, PACKED):
            self._sizes[tensor] = head.content

    def _fold(self, source: Checkpoint, deltas: Sequence[Version]) -> None:
        """Take all tensors that change through ``deltas``, and hold all digests."""
        table = source.table
        steps = {
            at: found
            for at, name in enumerate(table.names)
            if (found := [version for version in deltas if name in version.frames])
        }
        order = list(steps)
        nbytes = table.nbytes[order]
        groups = list(grouped(nbytes))
        meter = Meter(self.observer, int(nbytes.sum()))
        workers = self._fit(len(groups), fold_memory(deltas) + source.reader_memory(WINDOW))
        folder, buffers = Folder(Path(tempfile.gettempdir()), _HINT), PerThread(Buffers)

        def fold(chunk: int, stop: threading.Event) -> None:
            with closing(source.reader()) as reader:
                for at in order[slice(*groups[chunk])]:
                    name, size = table.names[at], int(table.nbytes[at])
                    window = window_of(table.dtypes[at])
                    tensor = Tensor(name, size, window, filler(reader, at, stop), steps[at])
                    for _ in folder.fold(tensor, buffers()):
                        pass

        def finished(chunk: int, _: None) -> None:
            meter.add(int(nbytes[slice(*groups[chunk])].sum()))

        run_chunks(range(len(groups)), fold, workers=workers, done=finished, meter=meter)
        source.verify()
        for version in deltas:
            version.verify()
        frames = sum(map(len, steps.values()))
        self.found.frames += frames
        self.found.digests += frames

    def _fit(self, tasks: int, each: int) -> int:
        need = Need(self.room.taken, each)
        return fit_workers(self.options.workers, tasks, need, self.options.memory)
