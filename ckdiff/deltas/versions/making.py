"""The work on a group of tensors of a new version: both sides in, frames and digests out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader
from ckdiff.deltas.parts import called
from ckdiff.deltas.versions.checksums import Digester, digester
from ckdiff.deltas.versions.encoding import WINDOW, Tools, encoder, window_of
from ckdiff.deltas.versions.following import Expected, other_base
from ckdiff.deltas.versions.form import Said, version_name
from ckdiff.deltas.versions.spool import Spool
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import Bytes, views
from ckdiff.running.threads import InOrder, PerThread, Stopped

Spans = tuple[IntArray, IntArray, IntArray]  #: tensors, first bytes in them, and how many


@dataclass(slots=True)
class Found:
    """What became of a tensor."""

    tensor: int  #: position in the tuned side's table
    elements: int  #: that differ
    changed: int  #: bytes that differ
    digest: str = ""
    frame: Spool | None = None  #: None of a tensor that did not change


@dataclass(slots=True)
class VersionTask:
    """The task of a group of tensors. Shared by the threads."""

    sides: tuple[Checkpoint, Checkpoint]  #: base and tuned
    said: Said
    level: int
    expected: dict[str, Expected]
    groups: Sequence[tuple[int, int]]
    order: InOrder[list[Found]]
    folder: Path
    workers: int
    base: IntArray = field(init=False)  #: for each tuned tensor its position on the other side
    _tools: PerThread[Tools] = field(init=False)

    def __post_init__(self) -> None:
        where = {name: i for i, name in enumerate(self.sides[0].table.names)}
        self.base = np.array([where[name] for name in self.sides[1].table.names], np.int64)
        self._tools = PerThread(Tools)

    def __call__(self, chunk: int, stop: threading.Event) -> list[Found]:
        """See ChunkTask; a chunk is a group of tensors."""
        self.order.wait(chunk, stop)
        with ExitStack() as stack:
            readers = [stack.enter_context(closing(side.reader())) for side in self.sides]
            if chunk + self.workers < len(self.groups):
                for reader, spans in zip(readers, self._ahead(chunk + self.workers), strict=True):
                    reader.prefetch(*spans)
            first, after = self.groups[chunk]
            if after - first == 1:
                return [self._tensor(first, self._windows(first, readers, stop))]
            return self._small(first, after, readers, stop)

    def _ahead(self, chunk: int) -> list[Spans]:
        """What is read first of a chunk, of both sides."""
        first, after = self.groups[chunk]
        nbytes = self.sides[1].table.nbytes[first:after]
        return self._spans(first, after, np.zeros(after - first, np.int64),
                           np.minimum(nbytes, WINDOW))  # fmt: skip

    def _spans(self, first: int, after: int, starts: IntArray, sizes: IntArray) -> list[Spans]:
        return [
            (self.base[first:after], starts, sizes),
            (np.arange(first, after, dtype=np.int64), starts, sizes),
        ]

    def _small(
        self, first: int, after: int, readers: Sequence[SpanReader], stop: threading.Event
    ) -> list[Found]:
        """Tensors that are together no more than a group: they are read in one go."""
        nbytes = self.sides[1].table.nbytes[first:after]
        spans = self._spans(first, after, np.zeros_like(nbytes), nbytes)
        held = [
            views(reader.acquire(*chosen), nbytes)
            for reader, chosen in zip(readers, spans, strict=True)
        ]
        found = []
        for at, *sides in zip(range(first, after), *held, strict=True):
            if stop.is_set():
                raise Stopped
            window = window_of(self.sides[1].table.dtypes[at])
            starts = range(0, len(sides[0]), window)
            parts = ([side[start : start + window] for side in sides] for start in starts)
            found.append(self._tensor(at, parts))
        for reader in readers:
            reader.release()
        return found

    def _windows(
        self, at: int, readers: Sequence[SpanReader], stop: threading.Event
    ) -> Iterator[list[Bytes]]:
        """The windows of a tensor, of both sides; they hold until the next are taken."""
        table = self.sides[1].table
        nbytes, window = int(table.nbytes[at]), window_of(table.dtypes[at])
        for start in range(0, nbytes, window):
            if stop.is_set():
                raise Stopped
            here, coming = (
                self._spans(at, at + 1, np.array([begin]), np.array([max(0, size)]))
                for begin, size in (
                    (start, min(window, nbytes - start)),
                    (start + window, min(window, nbytes - start - window)),
                )
            )
            sides = []
            for reader, now, soon in zip(readers, here, coming, strict=True):
                if soon[2][0]:
                    reader.prefetch(*soon)
                sides += views(reader.acquire(*now), now[2])
            yield sides
            for reader in readers:
                reader.release()

    def _tensor(self, at: int, windows: Iterable[list[Bytes]]) -> Found:
        table = self.sides[1].table
        name, dtype = table.names[at], table.dtypes[at]
        spool = Spool(self.folder)
        work = encoder(
            self.said.encoding, dtype, int(table.nbytes[at]), spool, self._tools(),
            level=self.level,
        )  # fmt: skip
        digests = _Digests(self.said.checksum, self.expected.get(name), DTYPES[dtype].bits)
        found = Found(at, 0, 0)
        for base, tuned in windows:
            elements, changed = work.add(base, tuned)
            digests.add(base, tuned, equal=not changed)
            found.elements += elements
            found.changed += changed
        digests.check(name)
        if work.finish():
            found.frame, found.digest = spool, digests.tuned.hexdigest()
        return found


class _Digests:
    """Those of both sides of a tensor; of the base only where something is expected of it."""

    def __init__(self, checksum: str, expected: Expected | None, bits: int) -> None:
        self.tuned, self._expected = digester(checksum), expected
        self._base: Digester | None = None
        self._shared = expected is not None and expected.checksum == checksum
        if expected is not None and not self._shared:
            self._base = digester(expected.checksum, bits)

    def add(self, base: Bytes, tuned: Bytes, *, equal: bool) -> None:
        """Take the next window of both; ``equal`` says that nothing differs."""
        if self._shared and not equal:  # up to here it was the same
            self._base, self._shared = self.tuned.copy(), False
        self.tuned.update(tuned)
        if self._base is not None:
            self._base.update(base)

    def check(self, name: str) -> None:
        """Raise DeltaError where the base is not what was expected of it."""
        if self._expected is None:
            return
        found = (self.tuned if self._base is None else self._base).hexdigest()
        if found != self._expected.digest:
            version = version_name(self._expected.version)
            raise other_base(f"{called(name)} is not what {version} says")
