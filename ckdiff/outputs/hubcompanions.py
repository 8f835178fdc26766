"""Configs and tokenizers of a repository on the hub: from its cache, or fetched.

They are small, and not put into the cache, which has what somebody asked for.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from functools import partial

from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository
from ckdiff.checkpoints.places.hub.client import HubRepository
from ckdiff.checkpoints.places.hub.listing import RepositoryFolder
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.errors import SourceChanged, printable
from ckdiff.outputs.companionfiles import Companion, LocalSource, Source

_PART = 1 << 20  # bytes that are asked for at a time


def hub_source(origin: Mapping[str, str]) -> Source:
    """Where the companions of a checkpoint of the hub are; ``origin`` is as stores record it.

    Without a network it is the cache, which need not have all of them. Raises CheckpointError.
    """
    address = HubAddress(origin["repository"], origin["commit"], origin.get("path", ""))
    settings = Settings.of_environment()
    if settings.offline:
        root = CachedRepository(address, settings).snapshot(origin["commit"])
        path = os.path.join(root, address.path)
        return LocalSource(path if os.path.isdir(path) else os.path.dirname(path))
    return _HubSource(HubRepository.open(address, settings))


class _HubSource:
    """A folder of a repository, at one commit."""

    def __init__(self, repository: HubRepository) -> None:
        self.label = str(repository.address)
        self._repository = repository
        self._cache = CachedRepository(repository.address, repository.settings)
        self._listed = RepositoryFolder(repository)
        path = repository.address.path
        self._folder = posixpath.dirname(path) if path in repository else path

    def names(self, folder: str = "") -> list[str]:
        """See Source."""
        return list(self._listed.names(posixpath.join(self._folder, folder)))

    def companion(self, name: str) -> Companion:
        """See Source."""
        path = posixpath.join(self._folder, name)
        return Companion(name, self._repository.file(path).size, partial(self._parts, path))

    def _parts(self, path: str) -> Iterator[bytes]:
        """Its bytes, held against its hash where the hub says one."""
        file = self._repository.file(path)
        kind, _, wanted = file.content.partition(":")
        found = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        if kind == "sha256":
            found = hashlib.sha256()
        for begin in range(0, file.size, _PART):
            size = min(_PART, file.size - begin)
            part = self._cache.read(self._repository, path, begin, size)
            if part is None:
                part = self._repository.read(path, begin, size)
            found.update(part)
            yield part
        if wanted and found.hexdigest() != wanted:
            raise SourceChanged(
                f"{printable(f'{self.label}: {path}')} differs from the file at the hub",
                hint="remove it from the cache, if it is there, and run it again",
            )
