"""The objects of a store, held against their digests before anyone believes their bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.writing.objects import file_digest


class VerifiedObjects:
    """What a store's manifest says of its files. Shared by threads; it can be pickled."""

    def __init__(self, root: Path, objects: Mapping[str, tuple[int, str]]) -> None:
        self.root = root  #: the directory of the store
        self.objects = objects  #: key -> (size in bytes, digest)
        # No lock: when two threads verify the same object, both write the same entry.
        self._verified: dict[str, tuple[int, ...]] = {}

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
            raise StoreCorrupt(f"cannot read {self.shown(key)}: {error.strerror}") from error
        if found != self.objects[key][1]:
            raise StoreCorrupt(f"{self.shown(key)} is damaged: its digest differs")
        self._verified[key] = identity

    def check_size(self, key: str) -> tuple[int, ...]:
        """Raise StoreCorrupt unless the object is a file of its size; gives the file's identity."""
        if key not in self.objects:
            raise StoreCorrupt(f"{self.shown(key)} is not an object of this store")
        try:
            found = os.stat(self.root / key)
        except (OSError, ValueError):
            raise StoreCorrupt(
                f"{self.shown(key)} is missing", hint="restore it, or run the diff again"
            ) from None
        if not stat.S_ISREG(found.st_mode):
            raise StoreCorrupt(f"{self.shown(key)} is not a regular file")
        size, _ = self.objects[key]
        if found.st_size != size:
            raise StoreCorrupt(f"{self.shown(key)} has {found.st_size} bytes instead of {size}")
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def shown(self, key: str) -> str:
        """How messages name an object."""
        return printable(f"{self.root}/{key}")
