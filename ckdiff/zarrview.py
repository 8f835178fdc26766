"""A Zarr store over a mask store that verifies what it hands out.

Zarr reads a chunk that is not there as zeros, which would mean "unchanged". Here it is an error.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from ckdiff.errors import StoreCorrupt
from ckdiff.objects import file_digest


class VerifiedStore(LocalStore):
    """A read-only LocalStore that raises StoreCorrupt for missing or damaged objects.

    It can be pickled, so that Dask can send it to workers.
    """

    def __init__(self, root: Path, objects: dict[str, list[int | str]]) -> None:
        super().__init__(root, read_only=True)
        self._objects = objects  # key -> [size, digest]
        self._sound: set[tuple[str, int, int, int]] = set()

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As LocalStore, after verifying the whole object once."""
        if key in self._objects or "/c/" in key:
            await asyncio.to_thread(self._verify, key)
        return await super().get(key, prototype, byte_range)

    def _verify(self, key: str) -> None:
        path = Path(self.root) / key
        if key not in self._objects:
            raise StoreCorrupt(f"{path} is not an object of this store")
        try:
            found = path.stat()
            state = (key, found.st_ino, found.st_mtime_ns, found.st_size)
            if state in self._sound:
                return
            digest = file_digest(path)
        except OSError as error:
            raise StoreCorrupt(f"{path} is missing or cannot be read: {error.strerror}") from None
        if [found.st_size, digest] != self._objects[key]:
            raise StoreCorrupt(f"{path} is damaged: its digest differs")
        self._sound.add(state)
