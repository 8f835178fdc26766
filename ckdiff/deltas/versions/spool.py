"""Bytes that wait for their turn: in memory while they are few, else in a file without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ckdiff.checkpoints.places.openfile import read_into
from ckdiff.errors import OutputError
from ckdiff.kernels.memory import Bytes
from ckdiff.outputs.writing import write_all

MOST_HELD = 2 << 20  #: bytes that one of them keeps in memory
_PART = 1 << 20  # bytes that are read at a time


class Spool:
    """Written by one thread, then read by another. ``folder`` is where its file would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[bytes] = []
        self._held = self._spilled = 0
        self._fd = -1

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self._spilled + self._held

    def write(self, data: bytes) -> None:
        """Append. OSError passes through."""
        self._parts.append(data)
        self._held += len(data)
        if self._held > MOST_HELD:
            if self._fd < 0:
                self._fd = nameless(self.folder)
            for part in self._parts:
                write_all(self._fd, part)
            self._spilled += self._held
            self._parts, self._held = [], 0

    def parts(self) -> Iterator[bytes]:
        """All of it in its order, a part at a time. OSError passes through."""
        at = 0
        while at < self._spilled:
            data = os.pread(self._fd, min(_PART, self._spilled - at), at)
            if not data:
                raise OSError(None, "a temporary file was cut")
            at += len(data)
            yield data
        yield from self._parts

    def close(self) -> None:
        """Give everything back; may be called more than once."""
        self._parts, self._held, self._spilled = [], 0, 0
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def nameless(folder: Path) -> int:
    """A descriptor of a new file in ``folder`` without a name. OSError passes through."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def read_back(fd: int, begin: int, into: Bytes) -> None:
    """Fill a buffer from such a file. OSError passes through; OutputError where it was cut."""
    if read_into(fd, into.data, begin) < len(into):
        raise OutputError("a temporary file was cut while it was read")
