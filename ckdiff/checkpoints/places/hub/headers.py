"""The files of a checkpoint at the hub, of which headers are read: a few requests, no download."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from ckdiff.checkpoints.folders import Choice
from ckdiff.checkpoints.indexes import INDEX_LIMIT, digest, not_an_index
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository, Missing
from ckdiff.checkpoints.places.hub.cached import cached_place, repository_place
from ckdiff.checkpoints.places.hub.client import HubRepository, filled
from ckdiff.checkpoints.places.hub.fetching import Batch, Check, Fetchers
from ckdiff.checkpoints.places.hub.listing import (
    RepositoryFolder,
    chosen,
    indexes_in,
    path_of,
    paths_in,
)
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.checkpoints.places.local import LocalPlace
from ckdiff.checkpoints.places.place import Place, Read, Wanted, file_names, indexes_of_parts
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader
from ckdiff.errors import CheckpointError, SourceChanged

_AT_ONCE = 8  # headers that are fetched at a time
_AHEAD = 2 * _AT_ONCE  # headers that are in memory, or on their way, before they are parsed
_FIRST = 1 << 16  # bytes of the first request for a header: often all of it
_LONG = 1 << 20  # bytes of a header that is fetched and parsed while no other is


class HubPlace(Place):
    """Files at the hub, of which headers can be read, until ``fetch`` brings them into the hub's
    cache; then they are what those are.
    """

    remote = True

    def __init__(self, repository: HubRepository, choice: Choice) -> None:
        self.label = self.described = str(repository.address)
        self.repository, self.choice = repository, choice
        self._names = paths_in(choice)
        listed = [repository.file(name) for name in self._names]
        self.files = [
            SourceFile(name, file.size, file.content)
            for name, file in zip(file_names(choice), listed, strict=True)
        ]
        self.origin = repository.address.origin(repository.commit)
        self._cache = CachedRepository(repository.address, repository.settings)
        self._root = self._cache.snapshot(repository.commit)
        self.index_name = choice.index
        if choice.index is not None or not repository.address.names_file:
            self.directory = os.path.normpath(self._root / choice.folder)
        self.heads: dict[str, bytes] = {}  #: beginnings of files that are known already, by path
        self._here: LocalPlace | None = None

    def where(self, file: int) -> str:
        """See Place."""
        if self._here is not None:
            return self._here.where(file)
        return f"hf://{self.repository.address.repo}/{self._names[file]}"

    def read(self, file: int, begin: int, nbytes: int) -> bytes:
        """See Place."""
        if self._here is not None:
            return self._here.read(file, begin, nbytes)
        stop = min(begin + nbytes, self.files[file].size)
        return self.repository.read(self._names[file], begin, stop - begin)

    def reads(self, files: Sequence[int], wanted: Wanted) -> Iterator[Read]:
        """See Place. Where a beginning cannot be fetched at all, others are not waited for."""
        if self._here is not None:
            yield from self._here.reads(files, wanted)
            return
        names = [self._names[i] for i in files]
        fetchers = Fetchers(_AT_ONCE, str(self.repository.address))
        try:
            found = _beginnings(self.repository, names, wanted, fetchers, self.heads)
            for name, first in zip(names, found, strict=True):
                yield partial(_read, self.repository, name, first)
        finally:
            fetchers.close()

    def check(self, file: int) -> None:
        """See Place; a commit never changes, but the cache may."""
        if self._here is not None:
            self._here.check(file)

    def missing_bytes(self) -> Missing:
        """See Checkpoint; what is cached is not missing."""
        return {} if self._here else self._cache.missing(self.repository, self._names)

    def fetch(self) -> bool:
        """See Place. It is fetched at the commit whose headers are known."""
        if self._here is not None:
            return False
        self._here = here = repository_place(self.repository)
        self.files, self.open_files = here.files, here.open_files
        return True

    def reader(self) -> SpanReader:
        """See Place. Raises CheckpointError before ``fetch``."""
        if self._here is None:
            raise CheckpointError(f"{self.label}: only its headers were fetched")
        return self._here.reader()

    def reader_memory(self, window: int) -> int:
        """See Place."""
        return 0 if self._here is None else self._here.reader_memory(window)

    def read_ahead(self, files: IntArray, begins: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        if self._here is not None:
            self._here.read_ahead(files, begins, nbytes)

    def index(self) -> bytes | None:
        """See Checkpoint."""
        if self._here is not None or self.index_name is None:
            return None if self._here is None else self._here.index()
        return self._index_in(self.choice)

    def part_indexes(self) -> list[tuple[str, bytes]]:
        """See Checkpoint."""
        if self._here is not None:
            return self._here.part_indexes()
        return [(name, self._index_in(part)) for name, part in indexes_of_parts(self.choice)]

    def _index_in(self, choice: Choice) -> bytes:
        """The index that a choice follows."""
        (path,) = indexes_in(choice)
        try:
            raw = RepositoryFolder(self.repository).read(path, INDEX_LIMIT)
        except ValueError as error:
            raise not_an_index(self.label, error) from None
        if choice.index_digest not in (b"", digest(raw)):
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
        path = path_of(self.repository.address, self.choice, str(self._root))
        return json.dumps({"path": path})

    def verify(self) -> None:
        """See Checkpoint; a commit never changes, but the cache may."""
        if self._here is not None:
            self._here.verify()

    def close(self) -> None:
        """See Checkpoint."""
        if self._here is not None:
            self._here.close()


Kind = TypeVar("Kind", bound=HubPlace)


def hub_place(text: str, kind: type[Kind]) -> Kind | LocalPlace:
    """The files at a hub address, as ``kind`` has them unless all of it is in the cache.

    Raises CheckpointError.
    """
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    if settings.offline:
        return cached_place(text)
    repository = HubRepository.open(address, settings)
    folder = RepositoryFolder(repository)
    choice = chosen(address, folder)
    names = paths_in(choice)
    # what the cache has for another commit only is not linked to this one by those who just look
    if CachedRepository(address, settings).holds(repository.commit, names):
        return repository_place(repository)
    place = kind(repository, choice)
    place.heads = folder.heads
    return place


def _beginnings(
    repository: HubRepository,
    names: list[str],
    wanted: Wanted,
    fetchers: Fetchers,
    known: Mapping[str, bytes],
) -> Iterator[bytes]:
    """For each file what is wanted of its beginning, if that is short, else a part of it.

    A few are fetched ahead of the one that is given. Raises CheckpointError: where a header cannot
    be fetched at all, others are not waited for.
    """

    def ask() -> None:
        for name in islice(rest, _AHEAD - len(coming)):
            into: list[bytes] = []
            job = partial(_begin, repository, name, wanted, known.get(name, b""), into)
            coming.append((fetchers.start([job]), into))

    coming: deque[tuple[Batch, list[bytes]]] = deque()
    rest = iter(names)
    ask()
    while coming:
        batch, into = coming.popleft()
        fetchers.wait(batch)
        yield into.pop()
        ask()


def _begin(
    repository: HubRepository,
    name: str,
    wanted: Wanted,
    first: bytes,
    into: list[bytes],
    check: Check,
) -> None:
    size = repository.file(name).size
    if len(first) < min(_FIRST, size):
        first = repository.read(name, 0, min(_FIRST, size), check)
    whole = wanted(first, size)
    if len(first) < whole <= min(_LONG, size):
        first = _longer(repository, name, memoryview(first), 0, whole, check)
    into.append(first)


def _read(repository: HubRepository, name: str, first: bytes, offset: int, nbytes: int) -> bytes:
    """Bytes of a file that begins with ``first``."""
    stop = min(offset + nbytes, repository.file(name).size)
    if stop <= len(first):
        return first[offset:stop]
    return _longer(repository, name, memoryview(first)[offset:], offset, stop - offset)


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
