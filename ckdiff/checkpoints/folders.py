"""A directory of files, wherever it is, and what is chosen of it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckdiff.errors import printable

_SHOWN = 120  # characters of a name in a message


class Folder(Protocol):
    """A directory: a local one, or a listing of the hub or of its cache.

    Names are relative to it and have slashes; they are as whoever made the files called them.
    """

    label: str  #: how messages name it

    def names(self, folder: str = "") -> Sequence[str]:
        """What lies directly in ``folder``: directories end with a slash, hidden ones are there.

        Raises CheckpointError where it cannot be listed.
        """

    def read(self, name: str, limit: int) -> bytes:
        """All of a small file; raises ValueError where it is longer than ``limit`` bytes, and
        CheckpointError.
        """

    def head(self, name: str, nbytes: int) -> bytes:
        """The first ``nbytes`` bytes of a file, fewer where it is shorter. CheckpointError."""

    def size(self, name: str) -> int:
        """The bytes of a file. Raises CheckpointError."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that are the model, before any tensor is known."""

    #: "safetensors", "torch", "dcp", "ranks", or "pieces": safetensors files of parts of tensors
    format: str
    folder: str  #: that the names are relative to, itself relative to what was chosen from
    names: tuple[str, ...]  #: the files, in natural order
    index: str | None = None  #: the name of the index that was followed
    weight_map: Mapping[str, str] | None = None  #: of the index: tensor name -> one of ``names``
    index_digest: bytes = b""  #: of the bytes that the map was read from
    #: of a pipeline: the beginning of its names, "unet/", and what it is; all else is empty then
    parts: tuple[tuple[str, Choice], ...] = ()
    notes: tuple[str, ...] = ()  #: for people, one line each


def inside(folder: str, name: str) -> str:
    """The path of ``name`` in ``folder``, which may be empty."""
    return posixpath.join(folder, name) if folder else name


def where(folder: Folder, name: str = "") -> str:
    """How a message names something in a folder."""
    return called(inside(folder.label.rstrip("/") or folder.label, name) if name else folder.label)


def called(name: str) -> str:
    """A file's name for a message: it may be anything, of any length."""
    return printable(name if len(name) <= 2 * _SHOWN else "..." + name[-_SHOWN:])


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    items = list(names)
    text = ", ".join(map(called, items[:limit]))
    return text if len(items) <= limit else f"{text} and {len(items) - limit:,} more"
