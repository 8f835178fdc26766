"""What a checkpoint of the hub holds, from its headers alone: a few requests, no download."""

from __future__ import annotations

import json
import posixpath
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from ckdiff.checkpoints.choosing import INDEX_LIMIT, Shards, digest, parsed_index
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository, Missing
from ckdiff.checkpoints.places.hub.cached import open_cached, open_repository
from ckdiff.checkpoints.places.hub.client import HubRepository, filled
from ckdiff.checkpoints.places.hub.fetching import Batch, Check, Fetchers
from ckdiff.checkpoints.places.hub.listing import Meant, meant_by, shards_in
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.checkpoints.places.local import LocalCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader
from ckdiff.checkpoints.views.joined import Joined, JoinedFiles, Joining
from ckdiff.errors import CheckpointError, HeaderError, SourceChanged

_AT_ONCE = 8  # headers that are fetched at a time
_AHEAD = 2 * _AT_ONCE  # headers that are in memory, or on their way, before they are parsed
_FIRST = 1 << 16  # bytes of the first request for a header: often all of it
_LONG = 1 << 20  # bytes of a header that is fetched and parsed while no other is


class HubCheckpoint(JoinedFiles):
    """A checkpoint of which only the headers are here, until ``fetch`` brings its files into the
    hub's cache; then it is what those are.
    """

    def __init__(self, repository: HubRepository, meant: Meant, shards: Shards) -> None:
        self._names = [posixpath.join(meant.folder, name) for name in shards.names]
        joined = _joined(repository, shards, self._names)
        super().__init__(str(repository.address), joined)
        self.repository = repository
        self.origin = repository.address.origin(repository.commit)
        self._cache = CachedRepository(repository.address, repository.settings)
        self._root = self._cache.snapshot(repository.commit)
        self._index = meant.index
        self._index_digest = shards.index_digest
        if meant.index is not None or not repository.address.names_file:
            self.directory = str(self._root / meant.folder)
        if meant.index is not None:
            self.index_name = posixpath.basename(meant.index)
        self._here: LocalCheckpoint | None = None

    def missing_bytes(self) -> Missing:
        """See Checkpoint; what is cached is not missing."""
        return {} if self._here else self._cache.missing(self.repository, self._names)

    def fetch(self) -> None:
        """See Checkpoint. It is fetched at the commit whose headers are known."""
        if self._here is not None:
            return
        here = open_repository(self.repository)
        if not _is_same(self, here):
            here.close()
            raise SourceChanged(
                f"{self.label}: what is in the cache is not what the hub has",
                hint="remove its files from the cache, and run it again",
            )
        self.files, self.open_files = here.files, here.open_files
        here.table = self.table  # tables may be large: one of them is enough
        here.file_index, here.offset = self.file_index, self.offset
        self._here = here

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        if self._here is None:
            raise CheckpointError(f"{self.label}: only its headers were fetched")
        return self._here.reader()

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        if self._here is not None:
            self._here.read_ahead(tensors, starts, nbytes)

    def head(self, file: int) -> bytes:
        """See Checkpoint."""
        if self._here is not None:
            return self._here.head(file)
        return self.repository.read(self._names[file], 0, self.head_sizes[file])

    def index(self) -> bytes | None:
        """See Checkpoint."""
        if self._here is not None or self._index is None:
            return None if self._here is None else self._here.index()
        raw = _whole(self.repository, self._index)
        if digest(raw) != self._index_digest:
            raise SourceChanged(f"{self.label}: its index was replaced", hint="run it again")
        return raw

    def fingerprint(self) -> list[Any]:
        """The commit, and for each file its name, size and content hash; of cached files theirs."""
        if self._here is not None:
            return self._here.fingerprint()
        listed = [[file.name, file.size, file.content] for file in self.files]
        return [self.repository.address.repo, self.repository.commit, *listed]

    def seen(self) -> list[Any]:
        """The same: a commit never changes."""
        return self.fingerprint() if self._here is None else self._here.seen()

    def recipe(self) -> str:
        """See Checkpoint: the files where they are, or will be."""
        return json.dumps({"path": str(self._root / (self._index or self.repository.address.path))})

    def verify(self) -> None:
        """See Checkpoint; a commit never changes, but the cache may."""
        if self._here is not None:
            self._here.verify()

    def close(self) -> None:
        """See Checkpoint."""
        if self._here is not None:
            self._here.close()


def _is_same(planned: HubCheckpoint, here: LocalCheckpoint) -> bool:
    """Whether files hold the tensors, each at its place, that their headers were said to have."""

    def places(side: JoinedFiles) -> object:
        table = side.table
        files = [(file.name, file.size) for file in side.files]
        numbers = (table.nbytes, side.file_index, side.offset)
        columns = [column.tobytes() for column in numbers]
        return files, table.names, table.dtypes, table.shapes, columns, side.head_sizes

    return places(planned) == places(here)


Kind = TypeVar("Kind", bound=HubCheckpoint)


def open_headers(text: str) -> HubCheckpoint | LocalCheckpoint:
    """The checkpoint at a hub address, without its data, if that is not all in the cache.

    Raises CheckpointError and HeaderError.
    """
    return open_as(HubCheckpoint, text)


def open_as(kind: type[Kind], text: str) -> Kind | LocalCheckpoint:
    """``open_headers``, of that kind unless all of it is in the cache."""
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    if settings.offline:
        return open_cached(text)
    repository = HubRepository.open(address, settings)
    meant, shards = _shards(repository)
    names = [posixpath.join(meant.folder, name) for name in shards.names]
    # what the cache has for another commit only is not linked to this one by those who just look
    if CachedRepository(address, settings).holds(repository.commit, names):
        return open_repository(repository)
    return kind(repository, meant, shards)


def _shards(repository: HubRepository) -> tuple[Meant, Shards]:
    """What the address means, and the shards of it."""
    address = repository.address
    meant = meant_by(address, repository.names)
    if meant.index is None:
        names = [posixpath.relpath(name, meant.folder or ".") for name in meant.shards]
        return meant, Shards(meant.folder, names)
    size = repository.file(meant.index).size
    where = f"hf://{address.repo}/{meant.index}"
    if size > INDEX_LIMIT:
        raise CheckpointError(
            f"{where}: an index of {size:,} bytes, more than {INDEX_LIMIT:,}",
            hint="the index must map tensor names to file names",
        )
    shards = parsed_index(_whole(repository, meant.index), meant.folder, where)
    shards_in(address, meant, shards.names, repository.names)  # all of them are there
    return meant, shards


def _whole(repository: HubRepository, name: str) -> bytes:
    """All bytes of a small file, from the cache where it is there."""
    cached = CachedRepository(repository.address, repository.settings).read(repository, name)
    return repository.read(name, 0, repository.file(name).size) if cached is None else cached


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
