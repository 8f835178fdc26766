"""The protocol behind which every source of tensors stands.

A checkpoint is a table of tensors plus readers that make spans of their bytes addressable. The
engine never learns where bytes come from: a local file hands out addresses inside its mapping, a
source that has to fetch or assemble bytes (HTTP ranges, zip members, a tensor in several pieces)
copies them into its own buffers and hands out addresses of those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ckdiff.errors import CheckpointError, UsageError, printable

if TYPE_CHECKING:
    from ckdiff.checkpoints.places.openfile import OpenFile

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class TensorTable:
    """The tensors of a checkpoint, in columns: 100,000 tensors must stay cheap.

    All columns have the same length; a tensor is known by its position.
    """

    names: list[str]  #: as stored, unique
    dtypes: list[str]  #: safetensors dtype names
    shapes: list[tuple[int, ...]]
    nbytes: IntArray  #: bytes of the packed elements
    #: names that an index has and no file, and those of what a file has that cannot be compared
    absent: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint, as provenance: nothing here depends on where or when."""

    name: str  #: relative to the checkpoint
    size: int  #: bytes
    #: ``sha256:HEX``, or ``git:HEX`` (a git blob's id), where whoever keeps the file says so
    content: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As stores record it."""
        known = {"content": self.content} if self.content else {}
        return {"name": self.name, "size": self.size, **known}


class SpanReader(Protocol):
    """Makes spans of tensors addressable, one window at a time. Each worker has its own."""

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """Addresses (int64) at which ``nbytes[i]`` bytes of tensor ``tensors[i]`` can be read.

        ``starts`` are byte offsets inside the tensors. The addresses hold until ``release``.
        Raises SourceChanged or CheckpointError; never lets a read fault.
        """

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """Start reading spans that will be acquired soon, if that is useful; never blocks long."""

    def release(self) -> None:
        """End the window: verify that the bytes handed out were the source's (SourceChanged
        otherwise), and give their memory back."""

    def close(self) -> None:
        """Release everything, without verification."""


class Checkpoint(ABC):
    """Where tensors come from, and all that anybody may ask of it. A context manager that closes.

    Nobody asks of which kind it is: what a kind does not have it has as nothing, by default.
    Opening costs headers only. Whoever wants to read calls ``fetch`` first, once all is planned.
    """

    label: str  #: how messages name it
    table: TensorTable
    files: Sequence[SourceFile] = ()  #: in natural order of their names; none where there are none
    #: the files that are open on this machine: none, or one for each of ``files``. No output may
    #: replace one of them.
    open_files: Sequence[OpenFile] = ()
    #: the directory of this machine that all of it is, or will be once it is fetched; None where it
    #: is one file, or none. No output may lie inside.
    directory: str | None = None
    index_name: str | None = None  #: of the index that was followed
    #: of a pipeline what the names of its tensors begin with and those in its files do not
    components: Sequence[str] = ()
    origin: Mapping[str, str] = MappingProxyType({})  #: provenance, as stores record it
    #: for people, one line each: what of its files is passed over, and the like
    notes: Sequence[str] = ()
    #: whether its readers fetch what they are asked for into spools, of which ``share`` is told
    streams: bool = False

    # what its files say of it

    @cached_property
    def file_index(self) -> npt.NDArray[np.int32]:
        """For each tensor the position of its file in ``files``, -1 where it is in none."""
        return np.full(len(self.table), -1, np.int32)

    @cached_property
    def offset(self) -> IntArray:
        """For each tensor its first byte counted from the start of its file, -1 in none."""
        return np.full(len(self.table), -1, np.int64)

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """For tensors that lie in several places the elements, in order, at which another begins.

        A span that does not cross one costs no copy. Nothing is said of tensors that are in one
        place, nor of those that have to be gathered all the same.
        """
        return {}

    @property
    def in_files(self) -> bool:
        """Whether each tensor is in one of ``files``, so that these can be made again."""
        return bool(self.files) and bool((self.file_index >= 0).all())

    def as_stored(self) -> Checkpoint:
        """The same with all that is in its files, also what does not count; not to be closed."""
        return self

    def head(self, file: int) -> bytes:
        """The header of ``files[file]`` as it is stored, its 8 bytes of length included.

        Raises SourceChanged, and CheckpointError where it cannot be read or there is none.
        """
        raise CheckpointError(f"{printable(self.label)} does not say what its files are")

    def index(self) -> bytes | None:
        """The index ``index_name`` as it is stored; None where none was followed.

        Raises SourceChanged where it is not the one by which the checkpoint was opened.
        """
        return None

    def part_indexes(self) -> Sequence[tuple[str, bytes]]:
        """Of a pipeline the indexes of its components, as they are stored: names and bytes.

        Raises SourceChanged as ``index`` does.
        """
        return ()

    @property
    def addresses(self) -> IntArray | None:
        """Where in this process each tensor is that was given in memory, 0 where it is copied; None
        where nothing was.
        """
        return None

    @property
    def merged(self) -> Sequence[str]:
        """Names of the tensors that an adapter's matrices change; its readers say what they were
        before.
        """
        return ()

    @property
    def longer(self) -> int:
        """How often a window of it may be doubled until it has as many bytes as one of 16-bit
        elements, where its readers can say how values are made; 0 where they cannot.
        """
        return 0

    @property
    def scattered(self) -> bool:
        """Whether some of its tensors lie between each other, so that windows that have them whole
        read them once.
        """
        return False

    # what is to be fetched before it can be read

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """What ``fetch`` would download: bytes by what they are known by, as two checkpoints may
        lack the same. Raises CheckpointError.
        """
        return {}

    def fetch(self) -> None:  # noqa: B027
        """Download what is missing, and read what says whether its files fit together. The table
        stays: raises SourceChanged where that is not what arrived, CheckpointError and BudgetError;
        may be called again.
        """

    # reading

    @abstractmethod
    def reader(self) -> SpanReader:
        """A new reader over this checkpoint, for one worker. CheckpointError before ``fetch``."""

    def reader_memory(self, window: int) -> int:
        """Bytes of anonymous memory that a reader takes by itself, for windows of so many bytes."""
        return 0

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:  # noqa: B027
        """Start reading spans, before there is any reader; may do nothing, may block a while."""

    def share(self, spool: int, connections: int) -> None:  # noqa: B027
        """What each reader may have of the disk, and all of them of connections, if it streams."""

    def hang_up(self) -> None:  # noqa: B027
        """Let nobody wait for bytes any more, on whatever thread: nothing can be read after it."""

    # whether it is still the same

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON-able identity of the exact bytes on this machine (device, inode, size, times).

        Two runs may share work only where it is equal. It never enters a store.
        """

    def seen(self) -> list[Any]:
        """JSON-able identity of the same bytes on any machine that shares their file system: sizes,
        modification times, and where in them each tensor is. It never enters a store either.
        """
        return self.fingerprint()

    def recipe(self) -> str:
        """How ``open_recipe`` opens the same in another process: a JSON object. UsageError."""
        raise UsageError(
            f"on a cluster every worker opens the checkpoints, and {printable(self.label)} is only "
            "here",
            hint='scheduler="threads"',
        )

    def verify(self) -> None:  # noqa: B027
        """Raise SourceChanged if it is no longer what was opened."""

    def close(self) -> None:  # noqa: B027
        """Close files, mappings and connections; may be called more than once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
