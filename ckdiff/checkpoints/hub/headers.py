"""What a checkpoint of the hub holds, from its headers alone: a few requests, no download."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.header import Header, header_from
from ckdiff.checkpoints.hub.address import HubAddress
from ckdiff.checkpoints.hub.cached import bytes_to_download, open_cached
from ckdiff.checkpoints.hub.client import HubRepository
from ckdiff.checkpoints.hub.listing import meant_by, shards_in
from ckdiff.checkpoints.hub.settings import Settings
from ckdiff.checkpoints.joined import Joined, Joining
from ckdiff.checkpoints.local import LocalCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader, TensorTable
from ckdiff.checkpoints.shards import INDEX_LIMIT, Shards, parsed_index
from ckdiff.errors import CheckpointError

_AT_ONCE = 8  # headers that are fetched at a time
_FIRST = 1 << 16  # bytes of the first request for a header: often all of it


@dataclass(slots=True, eq=False, repr=False)
class HubHeaders:
    """A Checkpoint whose tensors are known and not fetched: good for planning."""

    label: str
    table: TensorTable
    files: Sequence[SourceFile]
    file_index: npt.NDArray[np.int32]  #: for each tensor, the position of its file
    offset: IntArray  #: for each tensor, its first byte counted from the start of that file
    head_sizes: list[int]  #: for each of ``files``, the first byte after its header
    names: list[str]  #: of ``files`` in the repository
    repository: HubRepository
    origin: dict[str, str]  #: provenance
    directory: bool  #: whether it is a directory of files, and not one file

    def fingerprint(self) -> list[Any]:
        """The commit, and for each file its name, size and content hash."""
        listed = [[file.name, file.size, file.content] for file in self.files]
        return [self.repository.address.repo, self.repository.commit, *listed]

    def seen(self) -> list[Any]:
        """The same: a commit never changes."""
        return self.fingerprint()

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint; nothing can be read."""

    def reader(self) -> SpanReader:
        """See Checkpoint. Raises CheckpointError."""
        raise CheckpointError(f"{self.label}: only its headers were fetched")

    def to_download(self) -> int:
        """Bytes that opening it for real would download; what is cached is not."""
        return bytes_to_download(self.repository, self.names)

    def verify(self) -> None:
        """See Checkpoint; a commit never changes."""

    def close(self) -> None:
        """See Checkpoint."""


def open_headers(text: str) -> HubHeaders | LocalCheckpoint:
    """The checkpoint at a hub address, without its data; offline it is opened from the cache.

    Raises CheckpointError and HeaderError.
    """
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    if settings.offline:
        return open_cached(text)
    repository = HubRepository.open(address, settings)
    meant = meant_by(address, repository.names)
    names = meant.shards
    shards = Shards(meant.folder, [posixpath.relpath(name, meant.folder or ".") for name in names])
    if meant.index is not None:
        size = repository.file(meant.index).size
        where = f"hf://{address.repo}/{meant.index}"
        if size > INDEX_LIMIT:
            raise CheckpointError(
                f"{where}: an index of {size:,} bytes, more than {INDEX_LIMIT:,}",
                hint="the index must map tensor names to file names",
            )
        raw = repository.read(meant.index, 0, size)
        shards = parsed_index(raw, meant.folder, where)
        names = shards_in(address, meant, shards.names, repository.names)
    joined = _joined(repository, shards, list(names))
    return HubHeaders(
        label=str(address),
        table=joined.table,
        files=joined.files,
        file_index=joined.file_index,
        offset=joined.offset,
        head_sizes=joined.head_sizes,
        names=list(names),
        repository=repository,
        origin=address.origin(repository.commit),
        directory=not address.names_file or meant.index is not None,
    )


def _joined(repository: HubRepository, shards: Shards, names: list[str]) -> Joined:
    def fetch(name: str) -> Header | CheckpointError:
        try:
            return _header(repository, name)
        except CheckpointError as error:
            return error

    joining = Joining(shards)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckdiff-headers") as pool:
        for name, file, found in zip(shards.names, names, pool.map(fetch, names), strict=True):
            if isinstance(found, CheckpointError):
                joining.failed(name, found)
                continue
            there = repository.file(file)
            joining.add(SourceFile(name, there.size, there.content), found)
    return joining.finish(str(repository.address))


def _header(repository: HubRepository, name: str) -> Header:
    file = repository.file(name)
    first = repository.read(name, 0, min(_FIRST, file.size))

    def read(offset: int, nbytes: int) -> bytes:
        stop = min(offset + nbytes, file.size)
        if stop <= len(first):
            return first[offset:stop]
        return first[offset:] + repository.read(name, len(first), stop - len(first))

    return header_from(read, file.size, f"hf://{repository.address.repo}/{name}")
