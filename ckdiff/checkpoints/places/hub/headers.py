"""What a checkpoint of the hub holds, from its headers alone: a few requests, no download."""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.choosing import INDEX_LIMIT, Shards, parsed_index
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository, Missing
from ckdiff.checkpoints.places.hub.cached import open_cached, open_repository
from ckdiff.checkpoints.places.hub.client import HubRepository, filled
from ckdiff.checkpoints.places.hub.fetching import Batch, Check, Fetchers
from ckdiff.checkpoints.places.hub.listing import meant_by, shards_in
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.checkpoints.places.local import LocalCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader, TensorTable
from ckdiff.checkpoints.views.joined import Joined, Joining
from ckdiff.errors import CheckpointError, HeaderError

_AT_ONCE = 8  # headers that are fetched at a time
_AHEAD = 2 * _AT_ONCE  # headers that are in memory, or on their way, before they are parsed
_FIRST = 1 << 16  # bytes of the first request for a header: often all of it
_LONG = 1 << 20  # bytes of a header that is fetched and parsed while no other is


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

    def missing(self) -> Missing:
        """What opening it for real would download; what is cached is not."""
        cache = CachedRepository(self.repository.address, self.repository.settings)
        return cache.missing(self.repository, self.names)

    def download(self) -> LocalCheckpoint:
        """Open it for real, at the same commit. Raises CheckpointError and BudgetError."""
        return open_repository(self.repository)

    def verify(self) -> None:
        """See Checkpoint; a commit never changes."""

    def close(self) -> None:
        """See Checkpoint."""


def open_headers(text: str) -> HubHeaders | LocalCheckpoint:
    """The checkpoint at a hub address, without its data, if that is not all in the cache.

    Raises CheckpointError and HeaderError.
    """
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    if settings.offline:
        return open_cached(text)
    repository = HubRepository.open(address, settings)
    shards, names, directory = _shards(repository)
    # what the cache has for another commit only is not linked to this one by those who just look
    if CachedRepository(address, settings).holds(repository.commit, names):
        return open_repository(repository)
    return _headers(repository, shards, names, directory=directory)


def _shards(repository: HubRepository) -> tuple[Shards, list[str], bool]:
    """(the shards, their paths in the repository, whether they are a directory of files)."""
    address = repository.address
    meant = meant_by(address, repository.names)
    directory = not address.names_file or meant.index is not None
    if meant.index is None:
        names = [posixpath.relpath(name, meant.folder or ".") for name in meant.shards]
        return Shards(meant.folder, names), list(meant.shards), directory
    size = repository.file(meant.index).size
    where = f"hf://{address.repo}/{meant.index}"
    if size > INDEX_LIMIT:
        raise CheckpointError(
            f"{where}: an index of {size:,} bytes, more than {INDEX_LIMIT:,}",
            hint="the index must map tensor names to file names",
        )
    cached = CachedRepository(address, repository.settings).read(repository, meant.index)
    raw = repository.read(meant.index, 0, size) if cached is None else cached
    shards = parsed_index(raw, meant.folder, where)
    return shards, list(shards_in(address, meant, shards.names, repository.names)), directory


def _headers(
    repository: HubRepository, shards: Shards, names: list[str], *, directory: bool
) -> HubHeaders:
    joined = _joined(repository, shards, names)
    return HubHeaders(
        label=str(repository.address),
        table=joined.table,
        files=joined.files,
        file_index=joined.file_index,
        offset=joined.offset,
        head_sizes=joined.head_sizes,
        names=names,
        repository=repository,
        origin=repository.address.origin(repository.commit),
        directory=directory,
    )


def _joined(repository: HubRepository, shards: Shards, names: list[str]) -> Joined:
    joining = Joining(shards)
    fetchers = Fetchers(_AT_ONCE, str(repository.address))
    try:
        found = _beginnings(repository, names, fetchers)
        for name, file, first in zip(shards.names, names, found, strict=True):
            try:
                header = _header(repository, file, first)
            except HeaderError as error:
                joining.failed(name, error)
                continue
            there = repository.file(file)
            joining.add(SourceFile(name, there.size, there.content), header)
    finally:
        fetchers.close()
    return joining.finish(str(repository.address))


def _beginnings(repository: HubRepository, names: list[str], fetchers: Fetchers) -> Iterator[bytes]:
    """For each file its header with what is before it, if that is short, else its beginning.

    A few are fetched ahead of the one that is given. Raises CheckpointError: where a header cannot
    be fetched at all, others are not waited for.
    """

    def ask() -> None:
        for name in islice(rest, _AHEAD - len(coming)):
            into: list[bytes] = []
            job = partial(_begin, repository, name, into)
            coming.append((fetchers.start([job]), into))

    coming: deque[tuple[Batch, list[bytes]]] = deque()
    rest = iter(names)
    ask()
    while coming:
        batch, into = coming.popleft()
        fetchers.wait(batch)
        yield into.pop()
        ask()


def _begin(repository: HubRepository, name: str, into: list[bytes], check: Check) -> None:
    size = repository.file(name).size
    first = repository.read(name, 0, min(_FIRST, size), check)
    whole = 8 + int.from_bytes(first[:8], "little")
    if len(first) < whole <= min(_LONG, size):
        first = _longer(repository, name, memoryview(first), 0, whole, check)
    into.append(first)


def _header(repository: HubRepository, name: str, first: bytes) -> Header:
    """The header of a file that begins with ``first``."""
    size = repository.file(name).size

    def read(offset: int, nbytes: int) -> bytes:
        stop = min(offset + nbytes, size)
        if stop <= len(first):
            return first[offset:stop]
        return _longer(repository, name, memoryview(first)[offset:], offset, stop - offset)

    return header_from(read, size, f"hf://{repository.address.repo}/{name}")


def _longer(
    repository: HubRepository,
    name: str,
    first: memoryview,
    offset: int,
    nbytes: int,
    check: Check = lambda: None,
) -> bytes:
    """``nbytes`` bytes of a file from ``offset`` on, of which the ``first`` ones are there."""

    def fill(view: memoryview) -> None:
        view[: len(first)] = first
        repository.read_into(name, offset + len(first), view[len(first) :], check)

    return filled(nbytes, fill)
