"""The first pass of a change in place: all is checked, and what will change is noted down."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from ckdiff.checkpoints.indexes import SUFFIX
from ckdiff.checkpoints.places.openfile import read_into
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor
from ckdiff.deltas.versions.grouping import grouped
from ckdiff.deltas.versions.journal import PART, JournalFile, JournalWriter
from ckdiff.deltas.versions.reading import Chain, Version
from ckdiff.errors import OutputError, SourceChanged, printable
from ckdiff.kernels.changes import ChangeFinder
from ckdiff.kernels.memory import Bytes
from ckdiff.running.threads import PerThread, Stopped


def check_local(base: Checkpoint, local: Path) -> None:
    """Raise OutputError unless it is safetensors files in this very directory."""
    shown = printable(str(local))
    if base.directory is None or not os.path.samefile(base.directory, local):
        raise OutputError(f"the weights of {shown} lie in another directory", hint="give that one")
    if not base.in_files or not all(source.name.endswith(SUFFIX) for source in base.files):
        raise OutputError(
            f"{shown} is not a checkpoint of safetensors files, and only these can be changed in "
            "place",
            hint="convert it, or write a new checkpoint with -o",
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


def read_old(fd: int, begin: int, into: Bytes, shown: str) -> None:
    """Bytes of a file as they are, copied. Raises SourceChanged."""
    if read_into(fd, into.data, begin) < len(into):
        raise SourceChanged(
            f"{shown}: was cut while it was being read",
            hint="let whatever writes it finish, then run again",
        )


class _Old:
    """The bytes of a tensor as they are, part by part, copied: for one thread."""

    def __init__(self, fd: int, begin: int, shown: str, buffer: Bytes) -> None:
        self._fd, self._begin, self._shown, self._buffer = fd, begin, shown, buffer
        self._held: tuple[int, int] | None = None

    def __call__(self, start: int, into: Bytes) -> None:
        """Copy some of them."""
        into[:] = self.at(start, len(into))

    def at(self, start: int, size: int) -> Bytes:
        """Some of them, until others are asked for. Raises SourceChanged."""
        found = self._buffer[:size]
        if self._held != (start, size):
            read_old(self._fd, self._begin + start, found, self._shown)
            self._held = start, size
        return found


class _Tools:
    """Buffers of a thread."""

    def __init__(self) -> None:
        self.fold, self.old = Buffers(), np.empty(PART, np.uint8)
        self.finder = ChangeFinder(PART)


@dataclass(slots=True)
class FirstPass:
    """The task of a group of tensors. Shared by the threads."""

    base: Checkpoint
    files: Sequence[int]  #: descriptors of the base's files
    chosen: Chosen
    folder: Folder
    writer: JournalWriter
    _tools: PerThread[_Tools] = field(default_factory=lambda: PerThread(_Tools))

    def __call__(self, chunk: int, stop: threading.Event) -> None:
        """See ChunkTask; a chunk is a group of tensors."""
        chosen = self.chosen.tensors[slice(*self.chosen.groups[chunk])]
        for at in chosen:
            self._tensor(at, stop)

    def _tensor(self, at: int, stop: threading.Event) -> None:
        table, tools, steps = self.base.table, self._tools(), self.chosen.steps[at]
        file, begin = int(self.base.file_index[at]), int(self.base.offset[at])
        name, nbytes = table.names[at], int(table.nbytes[at])
        # what is worked on at a time stays in the processor's cache
        old = _Old(self.files[file], begin, printable(self.base.files[file].name), tools.old)
        before, after = xxhash.xxh3_128(), xxhash.xxh3_128()
        known = _known_digest(steps[-1], name)
        for start, new in self.folder.fold(Tensor(name, nbytes, PART, old, steps), tools.fold):
            if stop.is_set():
                raise Stopped
            here = old.at(start, len(new))
            before.update(here.data)
            if known is None:
                after.update(new.data)
            found = tools.finder.find(here, new)
            if len(found.masks):
                self.writer.changes(file, begin + start, len(new), found)
        self.writer.tensor(file, begin, nbytes, (before.digest(), known or after.digest()))


def _known_digest(version: Version, name: str) -> bytes | None:
    """The digest that a tensor has after a version, where it is of the journal's kind."""
    assert version.said is not None
    if version.said.checksum != "xxh3-128":
        return None
    return bytes.fromhex(version.frames[name].digest)


class Noting:
    """Notes down how new bytes differ from those that files have; any thread may use it."""

    def __init__(self, writer: JournalWriter, files: Sequence[int], names: Sequence[str]) -> None:
        self._writer, self._files, self._names = writer, files, names
        self._tools = PerThread(_Tools)

    def note(self, file: int, begin: int, new: memoryview) -> None:
        """Of a file, from byte ``begin`` on, and the digests of both where they differ.

        OSError passes through; raises SourceChanged.
        """
        data, before = np.frombuffer(new, np.uint8), xxhash.xxh3_128()
        shown, differs, tools = printable(self._names[file]), False, self._tools()
        for start in range(0, len(data), PART):
            here = data[start : start + PART]
            old = tools.old[: len(here)]
            read_old(self._files[file], begin + start, old, shown)
            before.update(old.data)
            found = tools.finder.find(old, here)
            if len(found.masks):
                differs = True
                self._writer.changes(file, begin + start, len(here), found)
        if differs:
            digests = before.digest(), xxhash.xxh3_128_digest(new)
            self._writer.tensor(file, begin, len(data), digests)
