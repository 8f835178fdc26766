"""A checkpoint of the hub, through the hub's cache on the local disk.

Whatever is not cached yet is downloaded by ``huggingface_hub``, with its own progress bars; then it
is a local checkpoint like any other, that knows where it comes from. Nothing but the safetensors
files that count, and their index, is fetched.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Protocol

from ckdiff._version import __version__
from ckdiff.budget import format_size
from ckdiff.checkpoints.folders import Folder
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.cache import CachedRepository, check_room
from ckdiff.checkpoints.places.hub.client import HubRepository
from ckdiff.checkpoints.places.hub.failures import OFFLINE, asked, hub_errors, may_pass
from ckdiff.checkpoints.places.hub.listing import (
    CachedFolder,
    RepositoryFolder,
    chosen,
    indexes_in,
    path_of,
    paths_in,
)
from ckdiff.checkpoints.places.hub.retries import Backoff
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.checkpoints.places.local import LocalPlace
from ckdiff.errors import CheckpointError, Interrupted, printable

_log = logging.getLogger(__name__)
_WORTH_SAYING = 256 << 20  # bytes to download that take long enough for a line in a log
_EVERY = 30.0  # seconds between two lines, at least
_ATTEMPTS = 3  # at one file; the client itself takes up a broken connection several times before
_ALONE = "model.safetensors"  # what every tool calls a model that is one file


class _Snapshot(Protocol):
    """The files of a repository at one commit, and how to get them onto the disk."""

    commit: str
    names: list[str]

    def folder(self) -> Folder:
        """All its files, to choose from."""

    def fetch(self, names: list[str]) -> None:
        """Bring files into the snapshot's folder. Raises CheckpointError."""

    def content(self, name: str) -> str:
        """The content hash of a file that was fetched, as in SourceFile; may be empty."""


def cached_place(text: str) -> LocalPlace:
    """The files at a hub address on the local disk, downloading what is not cached.

    Raises CheckpointError for everything that is wrong with it or with getting it, BudgetError
    where the cache's disk has too little room.
    """
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    if not settings.offline:
        return repository_place(HubRepository.open(address, settings))
    cache = CachedRepository(address, settings)
    return _open(address, cache, _Offline(address, cache))


def repository_place(repository: HubRepository) -> LocalPlace:
    """``cached_place`` of a repository that was opened already, at that commit."""
    cache = CachedRepository(repository.address, repository.settings)
    opened = _open(repository.address, cache, _Online(repository, cache))
    cache.remember(repository.address.revision, repository.commit, repository.names)
    return opened


def _open(address: HubAddress, cache: CachedRepository, snapshot: _Snapshot) -> LocalPlace:
    root = str(cache.snapshot(snapshot.commit))
    choice = chosen(address, snapshot.folder())
    for names in (indexes_in(choice), paths_in(choice)):
        snapshot.fetch(names)
    # the choice that was made of all files: of a cache that has some it might be another
    place = LocalPlace(path_of(address, choice, root), root, choice)
    place.label = str(address)
    place.origin = address.origin(snapshot.commit)
    paths = paths_in(choice)
    place.files = [
        replace(file, content=snapshot.content(path))
        for file, path in zip(place.files, paths, strict=True)
    ]
    return place


class _Offline:
    """What the cache has of a repository, without asking anybody."""

    def __init__(self, address: HubAddress, cache: CachedRepository) -> None:
        commit = cache.commit_of(address.revision)
        if commit is None:
            raise CheckpointError(
                f"{address}: is not in the cache, and HF_HUB_OFFLINE is set", hint=OFFLINE
            )
        self.commit = commit
        self._address, self._cache = address, cache
        self._there = set(cache.names_in(commit))
        names = cache.names_of(commit)
        self.names = sorted(self._there) if names is None else names
        if names is None:
            self._check_whole()

    def folder(self) -> Folder:
        """See _Snapshot; of a file that is not cached nothing can be read."""
        return CachedFolder(self._address, str(self._cache.snapshot(self.commit)), self.names)

    def fetch(self, names: list[str]) -> None:
        """See _Snapshot: they have to be there."""
        missing = [name for name in names if name not in self._there]
        if missing:
            what = printable(missing[0])
            if len(missing) > 1:
                what = f"{len(missing):,} of its files, such as {what},"
            raise CheckpointError(
                f"{self._address}: {what} {'are' if len(missing) > 1 else 'is'} not in the cache, "
                "and HF_HUB_OFFLINE is set",
                hint=OFFLINE,
            )

    def content(self, name: str) -> str:
        """See _Snapshot."""
        return self._cache.content(self.commit, name)

    def _check_whole(self) -> None:
        """Raise CheckpointError where what others cached may be a part of the checkpoint.

        An index says which files there are, and a file that is asked for by name is all of it.
        """
        choice = chosen(self._address, self.folder())
        if choice.index is not None or self._address.names_file:
            return
        if choice.names == (_ALONE,):
            return
        raise CheckpointError(
            f"{self._address}: cannot tell whether all of its files are in the cache, and "
            "HF_HUB_OFFLINE is set",
            hint="run `ckdiff info` on it once online, or name one of its files",
        )


class _Online:
    """A repository that is asked for what the cache does not have."""

    def __init__(self, repository: HubRepository, cache: CachedRepository) -> None:
        self._repository = repository
        self._cache = cache
        self._root = cache.snapshot(repository.commit)
        self.commit = repository.commit
        self.names = repository.names

    def folder(self) -> Folder:
        """See _Snapshot."""
        return RepositoryFolder(self._repository)

    def fetch(self, names: list[str]) -> None:
        """See _Snapshot. One file after the other, so that Ctrl-C is heard at once."""
        missing = [name for name in names if not (self._root / name).exists()]
        sizes = [sum(self._cache.missing(self._repository, [name]).values()) for name in missing]
        needed, came, said = sum(sizes), 0, time.monotonic()
        check_room(self._repository.settings.cache, needed, str(self._repository.address))
        told = needed >= _WORTH_SAYING
        if told:
            what = f"{self._repository.address}: {format_size(needed)}"
            _log.info("downloading %s%s", what, f", {len(missing)} files" * (len(missing) > 1))
        for name, size in zip(missing, sizes, strict=True):
            self._download(name)
            came += size
            if told and came < needed and time.monotonic() - said >= _EVERY:
                said = time.monotonic()
                _log.info("downloaded %s of %s", format_size(came), format_size(needed))
        for name in names:
            self._check_size(name)

    def content(self, name: str) -> str:
        """See _Snapshot."""
        cached, listed = self._cache.content(self.commit, name), self._repository.file(name).content
        # somebody put another file there: of its content nothing is known
        return "" if cached != listed else cached

    def _download(self, name: str) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        address, settings = self._repository.address, self._repository.settings
        backoff = Backoff(attempts=_ATTEMPTS, wait=self._repository.wait)
        with hub_errors(address, settings.endpoint), _quiet:
            while True:
                try:
                    hf_hub_download(
                        address.repo,
                        name,
                        revision=self.commit,
                        cache_dir=settings.cache,
                        endpoint=settings.endpoint,
                        library_name="ckdiff",
                        library_version=__version__,
                    )
                    return
                except KeyboardInterrupt:
                    raise Interrupted(
                        "interrupted while downloading",
                        hint="the same command goes on: files that are complete stay in the cache",
                    ) from None
                except Exception as error:
                    # where it looks into the cache then, what went wrong first is the cause
                    looked = isinstance(error, LocalEntryNotFoundError)
                    first = error.__cause__ if looked and error.__cause__ else error
                    if not _worth_another(first) or not backoff.again(asked(first)):
                        raise

    def _check_size(self, name: str) -> None:
        """Raise CheckpointError for a cached file that is not as long as the hub's."""
        path, size = self._root / name, self._repository.file(name).size
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{printable(str(path))}: cannot be read from the hub's cache: {error.strerror}"
            ) from None
        if found != size:
            raise CheckpointError(
                f"{printable(str(path))}: has {found:,} bytes, and {size:,} at the hub",
                hint="remove the file that it links to from the cache, and run it again",
            )


def _worth_another(error: BaseException) -> bool:
    """Whether a download may succeed the next time."""
    if isinstance(error, ConnectionError) or may_pass(error):
        return True
    # a file that is not as long as was announced is an OSError of the client's own, of no call
    return type(error) is OSError and error.errno is None


class _Quiet:
    """Keeps the client's log lines to errors while any thread downloads: they hold signed URLs, and
    failures are said here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = logging.NOTSET

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                logger = logging.getLogger("huggingface_hub")
                self._before = logger.level
                logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                logging.getLogger("huggingface_hub").setLevel(self._before)


_quiet = _Quiet()
