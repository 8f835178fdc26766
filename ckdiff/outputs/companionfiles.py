"""Files beside weights, and how they are read from a directory that may be a stranger's.

A link is followed only to what lies in the directory itself, or in the hub's cache where that
directory is a snapshot in it: else the copy would show whoever gets it a file of ours that the
stranger only named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ckdiff.checkpoints.places.localfolder import LocalFolder
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError, SourceChanged, printable

_PART = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that lies beside weights."""

    name: str  #: relative to the weights, with slashes
    size: int  #: bytes
    #: gives its bytes in order, a part at a time; raises CheckpointError, SourceChanged
    parts: Callable[[], Iterator[bytes]]

    def read(self, limit: int) -> bytes | None:
        """All of it, where it is not longer than ``limit`` bytes."""
        return b"".join(self.parts()) if self.size <= limit else None


class Source(Protocol):
    """Where companions lie."""

    label: str  #: how messages name it

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder of it; folders end with a slash. Raises CheckpointError."""

    def companion(self, name: str) -> Companion:
        """A file of it. Raises CheckpointError where it must not or cannot be read."""


class LocalSource:
    """A directory of this machine."""

    def __init__(self, root: str) -> None:
        self.label = root
        self._folder = LocalFolder(root)
        self._root = os.path.realpath(root)
        #: what files may lie in; of the cache's blobs none is followed any further
        self._inside = tuple(f"{top.rstrip('/')}/" for top in (self._root, *_blobs(self._root)))

    def names(self, folder: str = "") -> list[str]:
        """See Source."""
        return list(self._folder.names(folder))

    def companion(self, name: str) -> Companion:
        """See Source: a link that leads out of it is refused."""
        real = os.path.realpath(os.path.join(self._root, name))
        if not real.startswith(self._inside):
            raise CheckpointError(f"{name} is a link that leads out of the directory")
        with closing(_opened(real)) as file:
            return Companion(name, file.size, partial(_parts, file))


def _blobs(root: str) -> tuple[str, ...]:
    """The blobs of a repository in the hub's cache, where ``root`` is in a snapshot of it."""
    path = root
    while path != os.path.dirname(path):
        parent = os.path.dirname(path)
        top = os.path.dirname(parent)
        if os.path.basename(parent) == "snapshots" and os.path.basename(top).startswith("models--"):
            return (os.path.join(top, "blobs"),)
        path = parent
    return ()


def _opened(real: str) -> OpenFile:
    """Open a path that has no links in it; SourceChanged where it has by now."""
    file = OpenFile.open(real)
    with suppress(OSError):  # where the system does not say what was opened
        if os.readlink(f"/proc/self/fd/{file.fd}") != real:
            file.close()
            raise SourceChanged(f"{printable(real)}: was replaced", hint="run it again")
    return file


def _parts(known: OpenFile) -> Iterator[bytes]:
    """The bytes of a file that was opened before; SourceChanged where it is another by now."""
    with closing(_opened(known.path)) as file:
        if file.identity != known.identity:
            raise SourceChanged(
                f"{printable(file.path)}: changed before it was copied", hint="run it again"
            )
        have = 0
        while have < file.size:
            try:
                part = os.pread(file.fd, min(_PART, file.size - have), have)
            except OSError as error:
                raise CheckpointError(
                    f"{printable(file.path)}: cannot be read: {error.strerror}"
                ) from None
            if not part:
                break
            have += len(part)
            yield part
        file.check()
