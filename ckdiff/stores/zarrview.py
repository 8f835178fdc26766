"""A Zarr store over a mask store that verifies what it hands out.

Zarr reads a chunk that is not there as zeros, which would mean "unchanged". Here it is an error.
And Zarr looks for files of its other format, whose filters may run code: there is nothing here but
what the manifest names.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Self

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from ckdiff.errors import StoreCorrupt, StoreError
from ckdiff.stores.maskbits import MaskBits
from ckdiff.stores.objects import read_bytes, rule_and_chunk


class VerifiedStore(Store):
    """A read-only Zarr store that raises StoreCorrupt for missing or damaged objects.

    It can be pickled, so that Dask can send it to workers, which open the mask store themselves:
    ``again`` makes it anew.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, bits: MaskBits, again: Callable[[], VerifiedStore]) -> None:
        super().__init__(read_only=True)
        self._bits = bits
        self._again = again

    def __reduce__(self) -> tuple[Callable[[], VerifiedStore], tuple[()]]:
        return self._again, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifiedStore) and self._bits.verified is other._bits.verified

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"file://{self._bits.verified.root.as_posix()}"

    def with_read_only(self, read_only: bool = False) -> Self:
        """As every Zarr store, but never writable."""
        if not read_only:
            root = self._bits.verified.root
            raise StoreError(f"{root} is a finished mask store: it cannot be written to")
        return type(self)(self._bits, self._again)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """The bytes of an object, after verifying all of it once; None for what is no object.

        Raises StoreCorrupt.
        """
        return await asyncio.to_thread(
            self.get_sync, key, prototype=prototype, byte_range=byte_range
        )

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As ``get``."""
        found = self._read(key, byte_range)
        if found is None:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(found)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """As ``get``, for each."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether the store has such an object. Raises StoreCorrupt where its file is missing."""
        found = key in self._bits.verified.objects
        if found:
            await asyncio.to_thread(self._bits.verified.check_size, key)
        return found

    async def set(self, key: str, value: Buffer) -> None:
        """Raises ValueError: nothing can be written."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Raises ValueError: nothing can be deleted."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """The objects that the manifest names."""
        for key in self._bits.verified.objects:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Those whose names begin like this."""
        for key in self._bits.verified.objects:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The first part of what follows the prefix, each once."""
        start = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        names = [k[len(start) :] for k in self._bits.verified.objects if k.startswith(start)]
        for name in dict.fromkeys(name.partition("/")[0] for name in names):
            yield name

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        bits = self._bits
        if key not in bits.verified.objects:
            if "/c/" in key:
                raise StoreCorrupt(f"{bits.verified.shown(key)} is not an object of this store")
            return None
        if key in bits.documents:
            raw = bits.metadata(key)
            return raw[slice(*_range(wanted, len(raw)))]
        if "/c/" in key:
            bits.check_object(*rule_and_chunk(key))
        with bits.verified.opened(key) as fd:
            first, stop = _range(wanted, os.fstat(fd).st_size)
            return read_bytes(fd, max(0, stop - first), first)


def _range(wanted: ByteRequest | None, size: int) -> tuple[int, int]:
    """The first byte, and the one after the last, of a request."""
    if isinstance(wanted, RangeByteRequest):
        return wanted.start, min(wanted.end, size)
    if isinstance(wanted, OffsetByteRequest):
        return wanted.offset, size
    if isinstance(wanted, SuffixByteRequest):
        return max(0, size - wanted.suffix), size
    return 0, size
