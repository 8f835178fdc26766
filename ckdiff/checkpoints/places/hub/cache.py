"""The hub's cache on the local disk: where a repository is in it, and what it has of a commit.

Besides what ``huggingface_hub`` keeps there, we note the names of all files of a commit that was
opened, in ``.ckdiff/COMMIT`` of the repository's folder. Without a network nothing else says
whether a cached part is all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ckdiff.budget import format_size
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.client import HubRepository
from ckdiff.checkpoints.places.hub.etags import content_of
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.errors import BudgetError, printable

_DEFAULT = "main"  # what the cache calls the default branch
_LONGEST_NOTE = 1 << 20  # bytes: names of some ten thousand files
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: for each blob that is not in the cache, how many bytes it has
Missing = dict[tuple[str, ...], int]


class CachedRepository:
    """A repository's folder in the cache, which need not be there."""

    def __init__(self, address: HubAddress, settings: Settings) -> None:
        name = "models--" + address.repo.replace("/", "--")
        self.folder = Path(settings.cache, name)

    def snapshot(self, commit: str) -> Path:
        """Where the files of a commit are."""
        return self.folder / "snapshots" / commit

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a revision led to when it was last asked for; None if that is unknown."""
        found = revision or _DEFAULT
        with suppress(OSError, ValueError):
            found = (self.folder / "refs" / found).read_text("ascii").strip()
        known = _COMMIT.fullmatch(found) is not None and self.snapshot(found).is_dir()
        return found if known else None

    def names_of(self, commit: str) -> list[str] | None:
        """The names of all files of a commit, whether they are cached or not; None if unknown."""
        with suppress(OSError, ValueError, RecursionError):
            note = self._note(commit)
            if not note.is_file() or note.stat().st_size > _LONGEST_NOTE:
                return None  # not one of ours
            names = json.loads(note.read_text("utf-8"))
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
        return None

    def names_in(self, commit: str) -> list[str]:
        """The names of the files that are cached."""
        root = self.snapshot(commit)
        return [
            Path(top, name).relative_to(root).as_posix()
            for top, _, names in os.walk(root)
            for name in names
            if os.path.exists(os.path.join(top, name))  # a link to a blob that was removed
        ]

    def holds(self, commit: str, names: Iterable[str]) -> bool:
        """Whether files of a commit are all where the cache has that commit."""
        return all((self.snapshot(commit) / name).exists() for name in names)

    def remember(self, revision: str | None, commit: str, names: list[str]) -> None:
        """Note what a revision led to and which files that commit has, for runs without a network.

        Where that cannot be written, such runs are refused.
        """
        with suppress(OSError):
            self._write(self._note(commit), json.dumps(names))
            if revision != commit:
                self._write(self.folder / "refs" / (revision or _DEFAULT), commit)

    def content(self, commit: str, name: str) -> str:
        """The content hash of a cached file, as in SourceFile, by what its blob is called: that is
        the etag under which it was downloaded. Empty for what is no link to a blob.
        """
        try:
            target = os.readlink(self.snapshot(commit) / name)  # one step: blobs may link further
        except OSError:
            return ""
        folder, blob = os.path.split(target)
        return content_of(blob) if os.path.basename(folder) == "blobs" else ""

    def read(self, repository: HubRepository, name: str, offset: int, nbytes: int) -> bytes | None:
        """Bytes of a file, if all of it is cached."""
        with suppress(OSError), open(self.snapshot(repository.commit) / name, "rb") as file:
            if os.fstat(file.fileno()).st_size == repository.file(name).size:
                return os.pread(file.fileno(), nbytes, offset)
        return None

    def missing(self, repository: HubRepository, names: Iterable[str]) -> Missing:
        """What of some files is to be downloaded. Raises CheckpointError."""
        found: Missing = {}
        for name in names:
            file = repository.file(name)
            there = (self.snapshot(repository.commit) / name).exists()
            blob = file.content.partition(":")[2]
            if there or (blob and (self.folder / "blobs" / blob).is_file()):
                continue
            key = (str(self.folder), blob) if blob else (str(self.folder), repository.commit, name)
            found[key] = file.size
        return found

    def _note(self, commit: str) -> Path:
        return self.folder / ".ckdiff" / commit

    def _write(self, path: Path, text: str) -> None:
        """Replace a small file at once, unless it says so already."""
        data = text.encode("utf-8", "surrogatepass")
        with suppress(OSError):
            if path.read_bytes() == data:
                return
        for folder in (path.parent, self._note("").parent):
            folder.mkdir(parents=True, exist_ok=True)
        # not beside it: everything in the folder of references is taken for one
        number, mine = tempfile.mkstemp(dir=self._note("").parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.chmod(mine, 0o644)
            os.replace(mine, path)
        except BaseException:
            os.unlink(mine)
            raise


def check_room(cache: str, needed: int, what: str) -> None:
    """Raise BudgetError where ``needed`` bytes do not fit on the cache's disk."""
    place = Path(cache)
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # the download will say what is wrong there
    if needed > free:
        raise BudgetError(
            f"{what}: {format_size(needed)} have to be downloaded, but {printable(str(place))} "
            f"has {format_size(free)} free",
            hint="free some space, or set HF_HOME to a place with more; diff can --stream",
        )
