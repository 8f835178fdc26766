"""A listing of files as a :class:`~ckdiff.checkpoints.folders.Folder`: of the hub or its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ckdiff.checkpoints.folders import inside, where
from ckdiff.errors import CheckpointError

Read = Callable[[str, int, int], bytes]  #: (name, offset, nbytes) -> bytes; raises CheckpointError


class ListedFolder:
    """The files of a repository by a list of their names and bytes; directories are what is in
    the names. ``read`` gives bytes of a file, fewer only at its end.
    """

    def __init__(self, label: str, files: Iterable[tuple[str, int]], read: Read) -> None:
        self.label = label  #: how messages name it
        self._sizes = dict(files)
        self._read = read
        self._entries: dict[str, dict[str, None]] = {"": {}}
        for name in self._sizes:
            self._add(name)

    def names(self, folder: str = "") -> Sequence[str]:
        """See Folder."""
        entries = self._entries.get(folder.rstrip("/"))
        if entries is None:
            raise CheckpointError(f"{where(self, folder)}: is not there")
        return list(entries)

    def read(self, name: str, limit: int) -> bytes:
        """See Folder."""
        size = self.size(name)
        if size > limit:
            raise ValueError(f"a file of {size:,} bytes, more than {limit:,}")
        return self._read(name, 0, size)

    def head(self, name: str, nbytes: int) -> bytes:
        """See Folder."""
        return self._read(name, 0, min(nbytes, self.size(name)))

    def size(self, name: str) -> int:
        """See Folder."""
        size = self._sizes.get(name)
        if size is None:
            raise CheckpointError(f"{where(self, name)}: does not exist", hint="check the path")
        return size

    def _add(self, name: str) -> None:
        *folders, file = name.split("/")
        at = ""
        for folder in folders:
            self._entries[at][f"{folder}/"] = None
            at = inside(at, folder)
            self._entries.setdefault(at, {})
        self._entries[at][file] = None
