"""The small protocol behind which every source of tensors stands.

A checkpoint is a table of tensors plus readers that make spans of their bytes addressable. The
engine never learns where bytes come from: a local file hands out addresses inside its mapping, a
source that has to fetch or assemble bytes (HTTP ranges, zip members, a tensor in several pieces)
copies them into its own buffers and hands out addresses of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

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


class Checkpoint(Protocol):
    """Where tensors come from."""

    label: str  #: how messages name it
    table: TensorTable
    files: Sequence[SourceFile]

    def fingerprint(self) -> list[Any]:
        """JSON-able identity of the exact bytes on this machine (device, inode, size, times).

        Two runs may share work only where it is equal. It never enters a store.
        """

    def seen(self) -> list[Any]:
        """JSON-able identity of the same bytes on any machine that shares their file system: sizes,
        modification times, and where in them each tensor is. It never enters a store either.
        """

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """Start reading spans, before there is any reader; may do nothing, may block a while."""

    def reader(self) -> SpanReader:
        """A new reader over this checkpoint, for one worker."""

    def verify(self) -> None:
        """Raise SourceChanged if any file is no longer what was opened."""

    def close(self) -> None:
        """Close files and mappings."""


class Located(Checkpoint, Protocol):
    """A checkpoint that says where in its files the tensors lie."""

    file_index: npt.NDArray[np.int32]  #: for each tensor, the position of its file in ``files``
    offset: IntArray  #: for each tensor, its first byte counted from the start of that file


def is_located(checkpoint: Checkpoint) -> TypeGuard[Located]:
    """Whether it says where in its files the tensors lie."""
    return hasattr(checkpoint, "file_index")
