"""A directory of this machine as a :class:`~ckdiff.checkpoints.folders.Folder`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckdiff.checkpoints.folders import called
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError


class LocalFolder:
    """A directory and what is below it. Links are followed; nothing stays open."""

    def __init__(self, root: str, label: str | None = None) -> None:
        self.root = root
        self.label = root if label is None else label  #: how messages name it

    def names(self, folder: str = "") -> Sequence[str]:
        """See Folder; what a link leads to says whether it is a directory."""
        path = os.path.join(self.root, folder)
        try:
            with os.scandir(path or ".") as entries:
                return [f"{one.name}/" if _is_directory(one) else one.name for one in entries]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointError(f"{called(path)}: cannot be listed: {reason}") from None

    def read(self, name: str, limit: int) -> bytes:
        """See Folder."""
        with _Opened(os.path.join(self.root, name)) as file:
            if file.size > limit:
                raise ValueError(f"a file of {file.size:,} bytes, more than {limit:,}")
            return _read(file, file.size)

    def head(self, name: str, nbytes: int) -> bytes:
        """See Folder."""
        with _Opened(os.path.join(self.root, name)) as file:
            return _read(file, min(nbytes, file.size))

    def size(self, name: str) -> int:
        """See Folder."""
        with _Opened(os.path.join(self.root, name)) as file:
            return file.size


class _Opened:
    """An open file for the length of a ``with``."""

    def __init__(self, path: str) -> None:
        self._file = OpenFile.open(path)

    def __enter__(self) -> OpenFile:
        return self._file

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # whoever opens it says what is wrong
        return False


def _read(file: OpenFile, nbytes: int) -> bytes:
    """The first bytes of a file, as it was when it was opened."""
    data = file.read(0, nbytes)
    file.check()
    return data
