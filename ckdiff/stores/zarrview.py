"""A Zarr store over a mask store that verifies what it hands out.

Zarr reads a chunk that is not there as zeros, which would mean "unchanged". Here it is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from ckdiff.errors import StoreCorrupt, StoreError
from ckdiff.stores.verified import VerifiedObjects


class VerifiedStore(LocalStore):
    """A read-only LocalStore that raises StoreCorrupt for missing or damaged objects.

    It can be pickled, so that Dask can send it to workers.
    """

    def __init__(self, verified: VerifiedObjects) -> None:
        super().__init__(verified.root, read_only=True)
        self._verified = verified

    def with_read_only(self, read_only: bool = False) -> Self:
        """As LocalStore, but never writable."""
        if not read_only:
            raise StoreError(f"{self.root} is a finished mask store: it cannot be written to")
        return type(self)(self._verified)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As LocalStore, after verifying the whole object once."""
        if self._is_ours(key):
            await asyncio.to_thread(self._verified.verify, key)
        return self._there(key, await super().get(key, prototype, byte_range))

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As ``get``."""
        if self._is_ours(key):
            self._verified.verify(key)
        found = super().get_sync(key, prototype=prototype, byte_range=byte_range)
        return self._there(key, found)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """As ``get``, for each."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    def _is_ours(self, key: str) -> bool:
        return key in self._verified.objects or "/c/" in key

    def _there(self, key: str, found: Buffer | None) -> Buffer | None:
        if found is None and self._is_ours(key):  # deleted since it was verified
            raise StoreCorrupt(f"{self._verified.shown(key)} is missing")
        return found
