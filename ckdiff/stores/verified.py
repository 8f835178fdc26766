"""The objects of a store, held against their digests before anyone believes their bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.stores.objects import file_digest

Identity = tuple[int, ...]
_PIECE = 1 << 26  # bytes that are read at a time


class VerifiedObjects:
    """What a store's manifest says of its files. Shared by threads; it can be pickled."""

    def __init__(self, root: Path, objects: Mapping[str, tuple[int, str]]) -> None:
        self.root = root  #: the directory of the store
        self.objects = objects  #: key -> (size in bytes, digest)
        self._folder = f"{root}/"  # pathlib takes longer than the system does
        # No lock: when two threads verify the same object, both write the same entry.
        self._verified: dict[str, Identity] = {}

    def __reduce__(self) -> tuple[object, ...]:
        # What was verified here says nothing about the files that another machine sees.
        return type(self), (self.root, self.objects)

    def verify(self, key: str) -> None:
        """Check an object against its digest, once for as long as the file stays the same.

        Raises StoreCorrupt.
        """
        identity = self.check_size(key)
        if self._verified.get(key) == identity:
            return
        try:
            found = file_digest(self.root / key)
        except OSError as error:
            raise self._unreadable(key, error) from error
        if found != self.objects[key][1]:
            raise StoreCorrupt(f"{self.shown(key)} is damaged: its digest differs")
        if self.check_size(key) != identity:
            raise self._changed(key)
        self._verified[key] = identity

    @contextmanager
    def opened(self, key: str) -> Iterator[int]:
        """The file of an object that was verified, open for reading.

        What is read is what was verified: the file must be the same one before and afterwards.
        Raises StoreCorrupt.
        """
        fd = self._open(key)
        try:
            identity = _identity(os.fstat(fd))
            if self._verified.get(key) != identity:
                self.verify(key)
                if self._verified.get(key) != identity:
                    raise self._changed(key)
            yield fd
            if self.check_size(key) != identity:
                raise self._changed(key)
        except OSError as error:
            raise self._unreadable(key, error) from error
        finally:
            os.close(fd)

    def read(self, key: str) -> bytes:
        """The bytes of one of the store's JSON files, verified as they are read, once.

        A NUL is in none of them: a file that is only declared to be large is not read to its end.
        Raises StoreCorrupt.
        """
        self.check_size(key)
        size, wanted = self.objects[key]
        pieces, digest = list[bytes](), xxhash.xxh3_128()
        fd = self._open(key)
        try:
            identity = _identity(os.fstat(fd))
            while size > 0 and (piece := os.read(fd, min(size, _PIECE))):
                if b"\0" in piece:
                    raise StoreCorrupt(f"{self.shown(key)} is damaged: it is not text")
                digest.update(piece)
                pieces.append(piece)
                size -= len(piece)
            if size or digest.hexdigest() != wanted:
                raise StoreCorrupt(f"{self.shown(key)} is damaged: its digest differs")
            if identity == self.check_size(key):
                self._verified[key] = identity
        except OSError as error:
            raise self._unreadable(key, error) from error
        finally:
            os.close(fd)
        return b"".join(pieces)

    def check_size(self, key: str) -> Identity:
        """Raise StoreCorrupt unless the object is a file of its size; gives the file's identity."""
        if key not in self.objects:
            raise StoreCorrupt(f"{self.shown(key)} is not an object of this store")
        try:
            found = os.stat(self._folder + key)
        except (OSError, ValueError):
            raise StoreCorrupt(
                f"{self.shown(key)} is missing", hint="restore it, or run the diff again"
            ) from None
        if not stat.S_ISREG(found.st_mode):
            raise StoreCorrupt(f"{self.shown(key)} is not a regular file")
        size, _ = self.objects[key]
        if found.st_size != size:
            raise StoreCorrupt(f"{self.shown(key)} has {found.st_size} bytes instead of {size}")
        return _identity(found)

    def shown(self, key: str) -> str:
        """How messages name an object."""
        return printable(self._folder + key)

    def _open(self, key: str) -> int:
        # O_NONBLOCK: what was a file may be a named pipe by now, which must not make us wait
        try:
            return os.open(self._folder + key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._unreadable(key, error) from error

    def _unreadable(self, key: str, error: OSError) -> StoreCorrupt:
        return StoreCorrupt(f"cannot read {self.shown(key)}: {error.strerror}")

    def _changed(self, key: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self.shown(key)} was changed or replaced while it was read", hint="run it again"
        )


def _identity(found: os.stat_result) -> Identity:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
