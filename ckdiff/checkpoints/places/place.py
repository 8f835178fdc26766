"""The files of a checkpoint, wherever they are. What they mean is for a format to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from ckdiff.checkpoints.choosing import Shards
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
    shards: Shards  #: what was chosen, of which ``files`` are the files
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

    def reads(self, wanted: Wanted) -> Iterator[Read]:
        """For each file a function that reads it. What ``wanted`` says may be read ahead."""
        for i in range(len(self.files)):
            yield partial(self.read, i)

    def check(self, file: int) -> None:  # noqa: B027
        """Raise SourceChanged where a file is not what it was when it was opened."""

    def index(self) -> bytes | None:
        """See Checkpoint."""
        return None

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return {}

    def fetch(self) -> bool:
        """Download what is missing; whether anything about the files may be other than before."""
        return False

    @abstractmethod
    def reader(self) -> SpanReader:
        """A SpanReader whose tensors are the files."""

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
