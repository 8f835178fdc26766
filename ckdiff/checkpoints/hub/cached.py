"""A checkpoint of the hub, through the hub's cache on the local disk.

Whatever is not cached yet is downloaded by ``huggingface_hub``, with its own progress bars; then it
is a local checkpoint like any other, that knows where it comes from. Nothing but the safetensors
files that count, and their index, is fetched.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ckdiff.budget import format_size
from ckdiff.checkpoints.hub.address import HubAddress
from ckdiff.checkpoints.hub.client import HubRepository, content_of
from ckdiff.checkpoints.hub.failures import hub_errors, is_transport
from ckdiff.checkpoints.hub.listing import meant_by, shards_in
from ckdiff.checkpoints.hub.retries import Backoff
from ckdiff.checkpoints.hub.settings import Settings
from ckdiff.checkpoints.local import LocalCheckpoint, open_local
from ckdiff.checkpoints.shards import indexed
from ckdiff.errors import BudgetError, CheckpointError, printable

_log = logging.getLogger(__name__)
_WORTH_SAYING = 256 << 20  # bytes to download that take long enough for a line in a log
_EVERY = 30.0  # seconds between two lines, at least
_ATTEMPTS = 3  # at one file; the client itself takes up a broken connection several times before


class _Snapshot(Protocol):
    """The files of a repository at one commit, and how to get them onto the disk."""

    commit: str
    names: list[str]

    def fetch(self, names: list[str]) -> None:
        """Bring files into the snapshot's folder. Raises CheckpointError."""

    def content(self, name: str) -> str:
        """The content hash of a file that was fetched, as in SourceFile; may be empty."""


def open_cached(text: str) -> LocalCheckpoint:
    """Open the checkpoint at a hub address, downloading what is not cached.

    Raises CheckpointError for everything that is wrong with it or with getting it, BudgetError
    where the cache's disk has too little room.
    """
    address = HubAddress.parse(text)
    settings = Settings.of_environment()
    folder = _folder(address, settings)
    snapshot: _Snapshot
    if settings.offline:
        snapshot = _Offline(address, folder)
    else:
        snapshot = _Online(HubRepository.open(address, settings), folder)
    root = os.path.join(folder, "snapshots", snapshot.commit)
    meant = meant_by(address, snapshot.names)
    path = os.path.join(root, meant.index or address.path)
    names = meant.shards
    if meant.index is not None:
        snapshot.fetch([meant.index])
        listed = indexed(os.path.dirname(path), os.path.basename(path)).names
        names = shards_in(address, meant, listed, snapshot.names)
    snapshot.fetch(list(names))
    checkpoint = open_local(path)
    checkpoint.label = str(address)
    checkpoint.origin = address.origin(snapshot.commit)
    checkpoint.files = [
        replace(file, content=snapshot.content(posixpath.join(meant.folder, file.name)))
        for file in checkpoint.files
    ]
    return checkpoint


def bytes_to_download(repository: HubRepository, names: Iterable[str]) -> int:
    """How many bytes of some files are not in the cache. Raises CheckpointError."""
    folder, needed = _folder(repository.address, repository.settings), 0
    for name in names:
        file = repository.file(name)
        blob = Path(folder, "blobs", file.content.partition(":")[2] or "-")
        there = Path(folder, "snapshots", repository.commit, name).exists() or blob.is_file()
        needed += 0 if there else file.size
    return needed


def _folder(address: HubAddress, settings: Settings) -> str:
    """Where the cache has a repository."""
    return os.path.join(settings.cache, "models--" + address.repo.replace("/", "--"))


class _Offline:
    """What the cache has of a repository, without asking anybody."""

    def __init__(self, address: HubAddress, folder: str) -> None:
        commit = address.revision or "main"
        with suppress(OSError, ValueError):
            commit = Path(folder, "refs", commit).read_text("ascii").strip()
        self._root = Path(folder, "snapshots", commit)
        if re.fullmatch(r"[0-9a-f]{40}", commit) is None or not self._root.is_dir():
            raise CheckpointError(
                f"{address}: is not in the cache, and HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE, or fetch it first with `hf download`",
            )
        self.commit = commit
        self.names = [
            Path(top, name).relative_to(self._root).as_posix()
            for top, _, names in os.walk(self._root)
            for name in names
            if os.path.exists(os.path.join(top, name))  # a link to a blob that was removed
        ]

    def fetch(self, names: list[str]) -> None:
        """See _Snapshot: they are listed only where they are there."""

    def content(self, name: str) -> str:
        """See _Snapshot."""
        return _content_of_link(self._root / name)


class _Online:
    """A repository that is asked for what the cache does not have."""

    def __init__(self, repository: HubRepository, folder: str) -> None:
        self._repository = repository
        self._folder = folder
        self._root = Path(folder, "snapshots", repository.commit)
        self.commit = repository.commit
        self.names = repository.names

    def fetch(self, names: list[str]) -> None:
        """See _Snapshot. One file after the other, so that Ctrl-C is heard at once."""
        missing = [name for name in names if not (self._root / name).exists()]
        needed = bytes_to_download(self._repository, missing)
        self._check_disk(needed)
        told = needed >= _WORTH_SAYING
        if told:
            what = f"{self._repository.address}: {format_size(needed)}"
            _log.info("downloading %s%s", what, f", {len(missing)} files" * (len(missing) > 1))
        came, said = 0, time.monotonic()
        for name in missing:
            size = bytes_to_download(self._repository, [name])
            self._download(name)
            came += size
            if told and came < needed and time.monotonic() - said >= _EVERY:
                said = time.monotonic()
                _log.info("downloaded %s of %s", format_size(came), format_size(needed))
        for name in names:
            self._check_size(name)
        if missing:
            self._remember()

    def content(self, name: str) -> str:
        """See _Snapshot."""
        cached, listed = _content_of_link(self._root / name), self._repository.file(name).content
        # somebody put another file there: of its content nothing is known
        return "" if cached and listed and cached != listed else cached or listed

    def _download(self, name: str) -> None:
        from huggingface_hub import hf_hub_download

        address, settings = self._repository.address, self._repository.settings
        backoff = Backoff(attempts=_ATTEMPTS, wait=self._repository.wait)
        with hub_errors(address, settings.endpoint), _quiet():
            while True:
                try:
                    hf_hub_download(
                        address.repo,
                        name,
                        revision=self.commit,
                        cache_dir=settings.cache,
                        endpoint=settings.endpoint,
                        library_name="ckdiff",
                    )
                    return
                except Exception as error:
                    if not _may_pass(error) or not backoff.again():
                        raise

    def _check_disk(self, needed: int) -> None:
        """Raise BudgetError where that many bytes do not fit."""
        place = Path(self._folder)
        while not place.is_dir() and place != place.parent:
            place = place.parent
        try:
            free = shutil.disk_usage(place).free
        except OSError:
            return  # the download will say what is wrong there
        if needed > free:
            raise BudgetError(
                f"{self._repository.address}: {format_size(needed)} have to be downloaded, and "
                f"{printable(str(place))} has {format_size(free)} free",
                hint="free some space, or set HF_HOME to a place with more",
            )

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

    def _remember(self) -> None:
        """Note in the cache what the revision led to, for runs without a network."""
        from huggingface_hub import HfApi

        address, settings = self._repository.address, self._repository.settings
        if address.revision == self.commit:
            return
        with suppress(Exception), _quiet():  # it is only a convenience
            HfApi(endpoint=settings.endpoint, library_name="ckdiff").resolve_revision(
                address.repo, revision=address.revision, cache_dir=settings.cache
            )


def _content_of_link(path: Path) -> str:
    """What the name of a cached file's blob says: it is the etag under which it was downloaded."""
    try:
        target = os.readlink(path)  # one step: what a blob may link to in turn has other names
    except OSError:
        return ""  # a cache on a file system without links
    folder, name = os.path.split(target)
    return content_of(name) if os.path.basename(folder) == "blobs" else ""


def _may_pass(error: Exception) -> bool:
    """Whether a download may succeed the next time."""
    if isinstance(error, ConnectionError) or is_transport(error):
        return True
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's log lines to errors: they hold signed URLs, and failures are said here."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
