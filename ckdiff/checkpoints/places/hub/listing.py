"""A repository of the hub as a folder that is chosen from, whether it is asked or cached."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckdiff.checkpoints.choosing import choice_of
from ckdiff.checkpoints.folders import Choice, Folder, inside, where
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository
from ckdiff.checkpoints.places.hub.client import HubRepository
from ckdiff.checkpoints.places.hub.failures import OFFLINE
from ckdiff.checkpoints.places.hub.listedfolder import ListedFolder
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.checkpoints.places.localfolder import LocalFolder
from ckdiff.checkpoints.places.place import file_names
from ckdiff.errors import CheckpointError

_KEPT = 8 << 20  # bytes of beginnings that are kept


class RepositoryFolder(ListedFolder):
    """The files of a repository at one commit. What is cached is not asked for."""

    def __init__(self, repository: HubRepository) -> None:
        label = str(replace(repository.address, path=""))
        super().__init__(label, ((name, 0) for name in repository.names), self._bytes)
        self._repository = repository
        self._cache = CachedRepository(repository.address, repository.settings)
        self.heads: dict[str, bytes] = {}  #: beginnings of files that were looked at

    def head(self, name: str, nbytes: int) -> bytes:
        """See Folder. Whoever reads the files then need not ask for their beginnings again."""
        found = self.heads.get(name, b"")
        if len(found) < min(nbytes, self.size(name)):
            found = super().head(name, nbytes)
            if sum(map(len, self.heads.values())) + len(found) <= _KEPT:
                self.heads[name] = found
        return found[:nbytes]

    def size(self, name: str) -> int:
        """See Folder; a listing need not have it."""
        super().size(name)
        return self._repository.file(name).size

    def _bytes(self, name: str, offset: int, nbytes: int) -> bytes:
        cached = self._cache.read(self._repository, name, offset, nbytes)
        return self._repository.read(name, offset, nbytes) if cached is None else cached


class CachedFolder(ListedFolder):
    """The files that the cache has of a commit, by their names."""

    def __init__(self, address: HubAddress, root: str, names: Iterable[str]) -> None:
        label = str(replace(address, path=""))
        self._folder = LocalFolder(root, label)
        super().__init__(label, ((name, 0) for name in names), self._bytes)

    def size(self, name: str) -> int:
        """See Folder."""
        super().size(name)
        if not os.path.exists(os.path.join(self._folder.root, name)):
            raise CheckpointError(
                f"{where(self, name)}: is not in the cache, and HF_HUB_OFFLINE is set", hint=OFFLINE
            )
        return self._folder.size(name)

    def _bytes(self, name: str, offset: int, nbytes: int) -> bytes:
        return self._folder.head(name, offset + nbytes)[offset:]


def beside(origin: Mapping[str, str], name: str, limit: int) -> bytes:
    """A small file beside a checkpoint of the hub; ``origin`` is as stores record it.

    Without a network it has to be in the cache. Raises CheckpointError, and ValueError where it is
    longer than ``limit`` bytes.
    """
    address = HubAddress(origin["repository"], origin["commit"], origin.get("path", ""))
    settings = Settings.of_environment()
    folder: Folder
    if settings.offline:
        cache = CachedRepository(address, settings)
        names = cache.names_in(origin["commit"])
        folder = CachedFolder(address, str(cache.snapshot(origin["commit"])), names)
    else:
        folder = RepositoryFolder(HubRepository.open(address, settings))
    known = folder.names(posixpath.dirname(address.path))
    is_file = posixpath.basename(address.path) in known
    inner = posixpath.dirname(address.path) if is_file else address.path
    return folder.read(inside(inner, name), limit)


def chosen(address: HubAddress, folder: Folder) -> Choice:
    """The files that an address means in a repository. Raises CheckpointError."""
    return choice_of(folder, address.path)


def paths_in(choice: Choice) -> list[str]:
    """The paths in the repository of the files of a choice."""
    return [inside(choice.folder, name) for name in file_names(choice)]


def indexes_in(choice: Choice) -> list[str]:
    """The paths in the repository of the indexes that a choice follows."""
    every = [choice, *(part for _, part in choice.parts)]
    return [posixpath.join(one.folder, one.index) for one in every if one.index is not None]


def path_of(address: HubAddress, choice: Choice, root: str) -> str:
    """The local path that means the same where the repository's files are in ``root``."""
    index = choice.index if not choice.parts else None
    if index is not None:
        return os.path.join(root, choice.folder, index)
    return os.path.join(root, address.path) if address.path else root
