"""Weight versions as the checkpoints of a run: each is what a delta makes of the one before it.

All are read side by side in address order, so a version is folded as it comes: the bytes of the
side before it, which are in memory anyway, and the next part of the version's own frame. A frame is
decoded once for each chunk that its tensor lies in. Digests are held at the end of each tensor;
those of tensors that go over the border of a chunk are held by folding these once more.

Frames of packed versions are of windows of a tensor, and each is decoded with all that its window
was before: where a chunk begins within one, what lies before is folded by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.budget import format_size
from ckdiff.checkpoints.opening import Given, open_in
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SourceFile, SpanReader
from ckdiff.deltas.form import FORMS
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.applying import at_version, filler
from ckdiff.deltas.versions.checksums import Digester, digester
from ckdiff.deltas.versions.decoding import COMMON_WINDOW, Patch, memory_of, patch
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor
from ckdiff.deltas.versions.form import version_name
from ckdiff.deltas.versions.given import STREAM, kind_of
from ckdiff.deltas.versions.reading import Chain, WeightStream, open_stream, opened
from ckdiff.deltas.versions.version import Version
from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError
from ckdiff.kernels.memory import U8, Bytes, bytes_at, place

_PART = 1 << 18  # bytes
_OTHER = "give the checkpoint that the stream begins with, or fetch the version again"


class VersionSide(Checkpoint):
    """A weight version, with the tensors of what it is made from. Its bytes come by folding."""

    def __init__(self, before: Checkpoint, version: Version) -> None:
        self.version = version
        self.table, self.label = before.table, version_name(version.number)
        self.open_files: Sequence[OpenFile] = tuple(version.files)
        self.files = [SourceFile(os.path.basename(f.path), f.size) for f in version.files]
        self.directory = os.path.dirname(os.path.abspath(version.path))  # no output goes there
        # as digests, and now: versions may be thousands, each made from the one before
        self._before = _digest(before.fingerprint()), _digest(before.seen())

    def reader(self) -> SpanReader:
        """See Checkpoint: there is none that knows nothing of the side before."""
        raise UsageError(f"{self.label} is only read together with what it is made from")

    def fingerprint(self) -> list[Any]:
        """See Checkpoint."""
        own = [list(file.identity) for file in self.version.files]
        return [self._before[0], self.label, own]

    def seen(self) -> list[Any]:
        """See Checkpoint."""
        own = [[file.size, file.identity[3]] for file in self.version.files]
        return [self._before[1], self.label, own]

    def verify(self) -> None:
        """See Checkpoint."""
        self.version.verify()


def _digest(known: list[Any]) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def versions_of(
    stack: ExitStack, checkpoints: Sequence[Given], key: str | None, memory: str | int | None
) -> list[Given]:
    """The checkpoints of a run: for a base and a stream, the base and each of its versions.

    A full version is a checkpoint by itself. ``stack`` closes what is opened. Raises what opening a
    stream raises.
    """
    given = list(checkpoints)
    last = given[-1]
    if not isinstance(last, (str, os.PathLike)) or kind_of(os.fspath(last)) != STREAM:
        return given
    if len(given) != 2:
        raise UsageError(
            "a stream of weight versions needs the checkpoint that it begins with",
            hint="ckdiff timeline BASE STREAM -o DIR",
        )
    from functools import partial

    from ckdiff.checkpoints.opening import open_for_planning

    opening = partial(open_for_planning, key=key)
    base, room = open_in(stack, given[0], opening), Room(memory)
    stream = open_stream(os.fspath(last), room)
    stack.callback(stream.close)
    found = [base]
    for version in _followed(stream, at_version(base, None)):
        if version.full:
            found.append(open_in(stack, version.path, opening))
            continue
        opened(stack, room, Chain(None, [version], version.number), found[-1].table)
        _check_foldable(version)
        found.append(VersionSide(found[-1], version))
    return list(found)


def _followed(stream: WeightStream, begin: int) -> list[Version]:
    """The versions after one, each made from the one before it or a full one. Raises DeltaError."""
    found, at = [], begin
    for number in stream.numbers:
        if number <= begin:
            continue
        version = stream.version(number)
        if version.said is not None and version.said.base_version != at:
            before = f"version {at}" if at else "the base"
            raise version.fault(
                f"is made from version {version.said.base_version}, and {before} is before it",
                "give the checkpoint that the stream begins with, and leave no version out",
            )
        found.append(version)
        at = number
    if not found:
        raise UsageError("the base is the newest version of the stream: there is no step")
    return found


def _check_foldable(version: Version) -> None:
    """Raise DeltaError for a delta that cannot be decoded a window at a time, beside others."""
    for tensor in version.frames:
        if version.head(tensor).window > COMMON_WINDOW:
            raise version.fault(
                f"{called(tensor)} needs {format_size(version.head(tensor).window)} to be "
                "decoded beside others",
                "ckdiff apply makes checkpoints of it",
            )


def decoders_memory(versions: Sequence[Version]) -> int:
    """Bytes of anonymous memory that the decoders of a reader take: one for each version."""
    largest = 0
    for version in versions:
        largest += max((_decoder_memory(version, tensor) for tensor in version.frames), default=0)
    return largest


def _decoder_memory(version: Version, tensor: str) -> int:
    assert version.said is not None
    if version.packed is not None:
        return version.packed.patch_memory(tensor)
    return memory_of(version.said.encoding, version.head(tensor))


#: gives bytes of a tensor of the side before: its position, the first byte, and the one after
Earlier = Callable[[int, int, int], Bytes]


def stretch(checkpoint: Checkpoint, tensor: int, first: int, stop: int) -> Bytes:
    """Bytes of a tensor of a checkpoint, by itself. See Earlier."""
    found, reader = np.empty(stop - first, np.uint8), checkpoint.reader()
    try:
        fill = filler(reader, tensor, threading.Event())
        for at in range(0, len(found), WINDOW):
            fill(first + at, found[at : at + WINDOW])
    finally:
        reader.close()
    return found


@dataclass(slots=True)
class _At:
    """Where a reader is in a tensor that some versions change."""

    tensor: int
    position: int  #: bytes that were folded
    patches: list[Patch]
    digests: list[Digester] | None  #: None where it was not begun at its first byte
    versions: list[Version]


class FoldReader:
    """Spans of what versions make of the side before them, for one chunk of one thread."""

    def __init__(
        self,
        versions: Sequence[Version],
        side: Checkpoint,
        window: int,
        start: SpanReader | None,
        earlier: Earlier,
    ) -> None:
        """``window`` is the most bytes that are acquired at a time. The versions are made from what
        ``start`` reads, where that is not the side before. ``earlier`` gives bytes of the one or
        the other that lie before those that are acquired.
        """
        self._versions, self._table, self._start = versions, side.table, start
        self._bytes, self._scratch = np.empty(window, np.uint8), np.empty(window, np.uint8)
        self._earlier = earlier
        self._known: tuple[int, int, int, Bytes] | None = None  # a stretch, until the release
        self._at: _At | None = None

    def acquire(
        self, before: IntArray, tensors: IntArray, starts: IntArray, nbytes: IntArray
    ) -> IntArray:
        """Addresses of spans; ``before`` are those of the side before, which stay as they are.

        Raises DeltaError where a frame is damaged or a digest is another.
        """
        if self._start is not None:
            before = self._start.acquire(tensors, starts, nbytes)
        found, at = before.copy(), 0
        for i, (tensor, start, size) in enumerate(
            zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        ):
            name = self._table.names[tensor]
            changing = [version for version in self._versions if name in version.frames]
            if not changing or not size:
                continue
            out = self._bytes[at : at + size]
            self._fold(tensor, start, changing, bytes_at(int(before[i]), size), out)
            found[i] = place(self._bytes, U8) + at
            at += size
        return found

    def stretch(self, tensor: int, first: int, stop: int) -> Bytes:
        """Bytes of this side; see Earlier. Raises DeltaError."""
        if self._known is not None and self._known[:3] == (tensor, first, stop):
            return self._known[3]
        found = self._earlier(tensor, first, stop).copy()
        name = self._table.names[tensor]
        for version in self._versions:
            if name in version.frames:
                with _Said(version, name):
                    step = self._patch(version, tensor, first, np.empty(_PART, np.uint8))
                    try:
                        self._apply(step, found)
                    finally:
                        step.close()
        self._known = tensor, first, stop, found
        return found

    def _apply(self, step: Patch, to: Bytes) -> None:
        size = len(self._scratch)  # whole words of lanes, as parts of packed versions are
        for at in range(0, len(to), size):
            step.apply(to[at : at + size])

    def _patch(self, version: Version, tensor: int, at: int, room: Bytes) -> Patch:
        """A version's change of a tensor, from byte ``at`` on; ``room`` is for anything."""
        name, nbytes = self._table.names[tensor], int(self._table.nbytes[tensor])
        assert version.said is not None
        if version.packed is not None:
            return version.packed.patch(name, at, self._scratch)
        read = version.reader(version.frames[name])
        step = patch(version.said.encoding, read, nbytes, self._scratch)
        try:
            for skipped in range(0, at, len(room)):  # what lies before is another chunk's
                step.apply(room[: min(len(room), at - skipped)])
        except BaseException:
            step.close()
            raise
        return step

    def _fold(
        self, tensor: int, start: int, versions: list[Version], before: Bytes, out: Bytes
    ) -> None:
        here = self._at
        if here is None or here.tensor != tensor or here.position != start:
            self._end()
            here = self._at = self._begin(tensor, start, versions, out)
        out[:] = before
        name, end = self._table.names[tensor], int(self._table.nbytes[tensor])
        here.position = start + len(out)
        for i, (version, step) in enumerate(zip(here.versions, here.patches, strict=True)):
            with _Said(version, name):
                step.apply(out)
                if here.position == end:
                    step.finish()
            if here.digests is None:
                continue
            here.digests[i].update(out)
            if here.position == end and (
                here.digests[i].hexdigest() != version.frames[name].digest
            ):
                what = f"what it makes of {called(name)} has another digest than it says"
                raise version.fault(what, _OTHER)
        if here.position == end:
            self._end()

    def _begin(self, tensor: int, start: int, versions: list[Version], room: Bytes) -> _At:
        name, dtype = self._table.names[tensor], self._table.dtypes[tensor]
        here = _At(tensor, start, [], None if start else [], versions)
        self._at = here  # so that it is closed whatever happens
        first, before = start, np.empty(0, np.uint8)
        if start and any(version.packed is not None for version in versions):
            first = start // FORMS[dtype].frame * FORMS[dtype].frame
            before = self._earlier(tensor, first, start).copy()
        for version in versions:
            assert version.said is not None
            with _Said(version, name):
                here.patches.append(self._patch(version, tensor, first, room))
                self._apply(here.patches[-1], before)
            if here.digests is not None:
                here.digests.append(digester(version.said.checksum, DTYPES[dtype].bits))
        if len(before):
            self._known = tensor, first, start, before
        return here

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        if self._start is not None:
            self._start.prefetch(tensors, starts, nbytes)

    def release(self) -> None:
        """See SpanReader."""
        self._known = None
        if self._start is not None:
            self._start.release()

    def close(self) -> None:
        """Give the decoders back, and what is read; may be called more than once."""
        self._end()
        if self._start is not None:
            self._start.close()

    def _end(self) -> None:
        here, self._at = self._at, None
        for step in here.patches if here is not None else ():
            step.close()


@dataclass(slots=True)
class _Said:
    """Says of which version and tensor a fault is."""

    version: Version
    name: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Damaged):
            raise self.version.fault(f"{called(self.name)} {error}") from None
        if isinstance(error, OSError):
            raise self.version.fault(f"cannot be read: {error.strerror}") from None


@dataclass(slots=True)
class Straddling:
    """Tensors that no chunk holds whole: their digests are held here, once all is read."""

    base: Checkpoint
    versions: Sequence[Version]
    folder: Path  #: where a tensor waits that more versions change than can be decoded at a time
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self, tensors: IntArray) -> None:
        """Fold tensors, by their positions in the base's table. Raises DeltaError."""
        buffers, table = Buffers(), self.base.table
        reader = self.base.reader()
        try:
            for i in tensors.tolist():
                name, nbytes = table.names[i], int(table.nbytes[i])
                steps = [version for version in self.versions if name in version.frames]
                if not steps:
                    continue
                fill = filler(reader, i, self.stop)
                whole = Tensor(name, nbytes, WINDOW, fill, steps)
                for _ in Folder(self.folder, _OTHER).fold(whole, buffers):
                    pass
        finally:
            reader.close()
