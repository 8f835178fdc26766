"""The files of a checkpoint, wherever they are. What they mean is for a format to say."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from ckdiff.checkpoints.folders import Choice, inside
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader

#: ``read(offset, nbytes)``: bytes of one file, fewer only at its end
Read = Callable[[int, int], bytes]
#: from the first bytes of a file and its size: how many of its first bytes are wanted
Wanted = Callable[[bytes, int], int]


class Place(ABC):
    """Some files: how they are read, and whether they are still the same.

    Files are known by their positions in ``files``. Most members mean what they mean in Checkpoint.
    """

    label: str  #: how messages name the checkpoint
    described: str  #: how an error names all of it
    choice: Choice  #: what was chosen, of which ``files`` are the files
    files: Sequence[SourceFile]
    open_files: Sequence[OpenFile] = ()
    directory: str | None = None
    index_name: str | None = None
    origin: Mapping[str, str] = MappingProxyType({})
    streams: bool = False
    remote: bool = False  #: where one file cannot be read, others cannot either

    @abstractmethod
    def where(self, file: int) -> str:
        """How messages name a file."""

    @abstractmethod
    def read(self, file: int, begin: int, nbytes: int) -> bytes:
        """Bytes of a file, fewer only at its end. Raises CheckpointError, SourceChanged."""

    def reads(self, files: Sequence[int], wanted: Wanted) -> Iterator[Read]:
        """For each of ``files`` a function that reads it; what is ``wanted`` may be read ahead."""
        for i in files:
            yield partial(self.read, i)

    def check(self, file: int) -> None:  # noqa: B027
        """Raise SourceChanged where a file is not what it was when it was opened."""

    def index(self) -> bytes | None:
        """See Checkpoint."""
        return None

    def part_indexes(self) -> Sequence[tuple[str, bytes]]:
        """See Checkpoint."""
        return ()

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return {}

    def fetch(self) -> bool:
        """Download what is missing; whether anything about the files may be other than before."""
        return False

    @abstractmethod
    def reader(self) -> SpanReader:
        """A SpanReader whose tensors are the files."""

    def reader_memory(self, window: int) -> int:
        """See Checkpoint."""
        return 0

    def read_ahead(self, files: IntArray, begins: IntArray, nbytes: IntArray) -> None:  # noqa: B027
        """See Checkpoint."""

    def share(self, spool: int, connections: int) -> None:  # noqa: B027
        """See Checkpoint."""

    def hang_up(self) -> None:  # noqa: B027
        """See Checkpoint."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """See Checkpoint."""

    @abstractmethod
    def seen(self) -> list[Any]:
        """What is the same of the files for everybody who shares their file system."""

    @abstractmethod
    def recipe(self) -> str:
        """See Checkpoint."""

    def verify(self) -> None:  # noqa: B027
        """See Checkpoint."""

    def close(self) -> None:  # noqa: B027
        """See Checkpoint."""


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """The files of one choice, known by their number in it: what a format reads."""

    place: Place
    choice: Choice
    first: int  #: position in the place's files of the first
    prefix: str  #: what the names of its tensors begin with
    key: str | None = None  #: where in a file the weights are, if that was said

    def __len__(self) -> int:
        return len(self.choice.names)

    @property
    def described(self) -> str:
        """How an error names all of them."""
        return self.place.described if not self.prefix else f"{self.place.described}/{self.prefix}"

    def name(self, file: int) -> str:
        """What the choice calls a file."""
        return self.choice.names[file]

    def size(self, file: int) -> int:
        """Its bytes."""
        return self.place.files[self.first + file].size

    def where(self, file: int) -> str:
        """How messages name it."""
        return self.place.where(self.first + file)

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """Bytes of it, fewer only at its end. Raises CheckpointError, SourceChanged."""
        return self.place.read(self.first + file, offset, nbytes)

    def reads(self, wanted: Wanted) -> Iterator[Read]:
        """For each a function that reads it; see Place."""
        return self.place.reads(range(self.first, self.first + len(self)), wanted)

    def check(self, file: int) -> None:
        """Raise SourceChanged where it is not what it was when it was opened."""
        self.place.check(self.first + file)

    def index(self) -> bytes | None:
        """The index of the choice as it is stored; None where it has none, or is a part."""
        return None if self.prefix else self.place.index()


def leaves(choice: Choice) -> list[tuple[str, Choice]]:
    """The choices of one directory each that a choice is made of, with what their names begin
    with.
    """
    return list(choice.parts) if choice.parts else [("", choice)]


def indexes_of_parts(choice: Choice) -> list[tuple[str, Choice]]:
    """The indexes that the parts of a choice follow: names relative to its folder, and the part."""
    found = []
    for _, part in choice.parts:
        if part.index is not None and part.weight_map is not None:
            folder = posixpath.relpath(part.folder or ".", choice.folder or ".")
            found.append((inside("" if folder == "." else folder, part.index), part))
    return found


def file_names(choice: Choice) -> list[str]:
    """The names of all files, relative to the folder of the choice."""
    found = []
    for _, leaf in leaves(choice):
        folder = posixpath.relpath(leaf.folder or ".", choice.folder or ".")
        found += [name if folder == "." else inside(folder, name) for name in leaf.names]
    return found


def files_of(place: Place, key: str | None) -> list[Files]:
    """What formats read of a place, one after the other."""
    found, first = [], 0
    for prefix, leaf in leaves(place.choice):
        found.append(Files(place, leaf, first, prefix, key))
        first += len(leaf.names)
    return found
