"""The first pass of a change in place: all is checked, and what will change is noted down."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from ckdiff.checkpoints.indexes import SUFFIX
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.deltas.versions.applying import grouped
from ckdiff.deltas.versions.encoding import window_of
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor
from ckdiff.deltas.versions.journal import PART, JournalFile, JournalWriter, differing
from ckdiff.deltas.versions.reading import Chain, Version
from ckdiff.errors import OutputError, printable
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.running.threads import PerThread, Stopped


def check_local(base: Checkpoint, local: Path) -> None:
    """Raise OutputError unless it is safetensors files in this very directory."""
    shown = printable(str(local))
    if base.directory is None or not os.path.samefile(base.directory, local):
        raise OutputError(f"the weights of {shown} lie in another directory", hint="give that one")
    if not base.in_files or not all(source.name.endswith(SUFFIX) for source in base.files):
        raise OutputError(
            f"{shown} is no checkpoint of safetensors files, and only these change in place",
            hint="convert it, or apply to another place with -o",
        )


def as_opened(base: Checkpoint, files: Sequence[int]) -> list[JournalFile]:
    """The files as the journal has them, which are those that are read."""
    found = []
    for source, read, fd in zip(base.files, base.open_files, files, strict=True):
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino, status.st_size) != read.identity[:3]:
            raise OutputError(f"{printable(read.path)} was replaced just now", hint="run it again")
        found.append(JournalFile(source.name, source.size, status.st_ino))
    return found


class Chosen:
    """The tensors that versions of a chain change."""

    def __init__(self, base: Checkpoint, chain: Chain) -> None:
        names = base.table.names
        self.steps: dict[int, list[Version]] = {}
        for i, name in enumerate(names):
            steps = [version for version in chain.deltas if name in version.frames]
            if steps:
                self.steps[i] = steps
        self.tensors = list(self.steps)  #: positions in the table
        nbytes = base.table.nbytes[self.tensors] if self.tensors else np.zeros(0, np.int64)
        self.sizes: list[int] = nbytes.tolist()
        self.groups = list(grouped(nbytes))


class _Old:
    """The bytes of a tensor as they are; for one thread."""

    def __init__(self, reader: SpanReader, tensor: int, stop: threading.Event) -> None:
        self._reader, self._tensor, self._stop = reader, tensor, stop
        self._held: tuple[int, int] | None = None
        self._bytes: Bytes = np.empty(0, np.uint8)

    def __call__(self, start: int, into: Bytes) -> None:
        """Copy some of them."""
        into[:] = self.at(start, len(into))

    def at(self, start: int, size: int) -> Bytes:
        """Some of them, until others are asked for."""
        if self._held != (start, size):
            if self._stop.is_set():
                raise Stopped
            self.release()
            chosen = (np.array([value], np.int64) for value in (self._tensor, start, size))
            self._bytes = bytes_at(int(self._reader.acquire(*chosen)[0]), size)
            self._held = start, size
        return self._bytes

    def release(self) -> None:
        """Give them back; raises SourceChanged where they were not the file's."""
        if self._held is not None:
            self._held = None
            self._reader.release()


@dataclass(slots=True)
class FirstPass:
    """The task of a group of tensors. Shared by the threads."""

    base: Checkpoint
    chosen: Chosen
    folder: Folder
    writer: JournalWriter
    _buffers: PerThread[Buffers] = field(default_factory=lambda: PerThread(Buffers))

    def __call__(self, chunk: int, stop: threading.Event) -> None:
        """See ChunkTask; a chunk is a group of tensors."""
        with closing(self.base.reader()) as reader:
            for k in range(*self.chosen.groups[chunk]):
                self._tensor(self.chosen.tensors[k], reader, stop)

    def _tensor(self, at: int, reader: SpanReader, stop: threading.Event) -> None:
        table = self.base.table
        nbytes, old = int(table.nbytes[at]), _Old(reader, at, stop)
        tensor = Tensor(
            table.names[at], nbytes, window_of(table.dtypes[at]), old, self.chosen.steps[at]
        )
        file, begin = int(self.base.file_index[at]), int(self.base.offset[at])
        before, after = xxhash.xxh3_128(), xxhash.xxh3_128()
        for start, new in self.folder.fold(tensor, self._buffers()):
            here = old.at(start, len(new))
            before.update(here.data)
            after.update(new.data)
            for low in range(0, len(new), PART):
                found = differing(here[low : low + PART], new[low : low + PART])
                if len(found.places):
                    size = min(PART, len(new) - low)
                    self.writer.changes(file, begin + start + low, size, found)
        old.release()
        self.writer.tensor(file, begin, nbytes, (before.digest(), after.digest()))
