"""Files on the local disk, which stay open."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ckdiff.checkpoints.choosing import choice_of
from ckdiff.checkpoints.explaining import no_such_path
from ckdiff.checkpoints.folders import Choice
from ckdiff.checkpoints.halfway import refuse_half_way
from ckdiff.checkpoints.indexes import digest, read_index
from ckdiff.checkpoints.places.localfolder import LocalFolder
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.places.place import Place, file_names, indexes_of_parts
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader
from ckdiff.errors import CheckpointError, SourceChanged

if TYPE_CHECKING:
    from ckdiff.checkpoints.places.mapped import Mappings


class LocalPlace(Place):
    """Files that are here, and stay open until ``close``.

    One that cannot be opened is there all the same: reading it says why.
    """

    def __init__(self, path: str, root: str, choice: Choice) -> None:
        """Opens the files that ``path`` was found to mean: ``choice``, made in the folder ``root``.

        Raises CheckpointError.
        """
        self.label = os.path.basename(os.path.abspath(path))
        self.path = os.path.abspath(path)  #: what it was opened by
        self.choice = choice
        self.root = os.path.join(root, choice.folder)  #: what the names are relative to
        self.index_name = choice.index
        refuse_half_way(self.root)
        self.described = path if choice.index is None else os.path.join(self.root, choice.index)
        if choice.index is not None or os.path.isdir(path):
            self.directory = os.path.normpath(self.root)
        names = file_names(choice)
        make_room(len(names))
        self._unopened: dict[int, CheckpointError] = {}
        self._mappings: Mappings | None = None
        self._refused: bool | None = None  #: whether files cannot be mapped; None: not known yet
        self._lock = threading.Lock()
        with ExitStack() as cleanup:
            self.open_files: list[OpenFile] = []
            for i, name in enumerate(names):
                self.open_files.append(self._open(i, os.path.join(self.root, name)))
                cleanup.callback(self.open_files[-1].close)
            # what only the index says of the tensors may not change either
            self._index: OpenFile | None = None
            if choice.index is not None and choice.format == "dcp":
                self._index = OpenFile.open(os.path.join(self.root, choice.index))
            cleanup.pop_all()
        pairs = zip(names, self.open_files, strict=True)
        self.files: list[SourceFile] = [SourceFile(name, file.size) for name, file in pairs]

    def _open(self, number: int, path: str) -> OpenFile:
        try:
            return OpenFile.open(path)
        except CheckpointError as error:
            self._unopened[number] = error
            return OpenFile(path, -1, 0, (0, 0, 0, 0, 0))

    def where(self, file: int) -> str:
        """See Place: its path."""
        return self.open_files[file].path

    def read(self, file: int, begin: int, nbytes: int) -> bytes:
        """See Place."""
        if file in self._unopened:
            raise self._unopened[file]
        return self.open_files[file].read(begin, nbytes)

    def check(self, file: int) -> None:
        """See Place."""
        self.open_files[file].check()

    def fingerprint(self) -> list[Any]:
        """For each file its name, device, inode, size and times (nanoseconds)."""
        pairs = zip(self.files, self.open_files, strict=True)
        index = [] if self._index is None else [[self.index_name, *self._index.identity]]
        return [*([source.name, *file.identity] for source, file in pairs), *index]

    def seen(self) -> list[Any]:
        """For each file its name, size and modification time."""
        pairs = zip(self.files, self.open_files, strict=True)
        # devices and inodes have other numbers elsewhere
        return [[source.name, file.size, file.identity[3]] for source, file in pairs]

    def read_ahead(self, files: IntArray, begins: IntArray, nbytes: IntArray) -> None:
        """Ask the kernel to read spans into the page cache, where it can be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        columns = zip(files.tolist(), begins.tolist(), nbytes.tolist(), strict=True)
        for index, begin, size in columns:
            fd = self.open_files[index].fd
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(fd, begin, size, os.POSIX_FADV_WILLNEED)

    def reader(self) -> SpanReader:
        """A new reader over the mapped files, for one worker."""
        from ckdiff.checkpoints.places.copied import CopyingReader
        from ckdiff.checkpoints.places.mapped import MappedReader

        mappings = self.mappings()
        return CopyingReader(self.open_files) if self._copies() else MappedReader(mappings)

    def reader_memory(self, window: int) -> int:
        """See Place: nothing, unless the files cannot be mapped."""
        from ckdiff.checkpoints.places.copied import CopyingReader

        return CopyingReader.memory(window) if self._copies() else 0

    def _copies(self) -> bool:
        """Whether windows are copied, because the file system refuses to map files."""
        if self._refused is None:
            self._refused = self.mappings().refused()
        return self._refused

    def mappings(self) -> Mappings:
        """The mappings that all readers of these files share."""
        from ckdiff.checkpoints.places.mapped import Mappings

        with self._lock:
            if any(file.fd < 0 for file in self.open_files):
                raise CheckpointError(
                    f"the checkpoint {self.label} was closed", hint="open it again"
                )
            if self._mappings is None:
                self._mappings = Mappings(self.open_files)
            return self._mappings

    def index(self) -> bytes | None:
        """See Checkpoint."""
        return None if self.index_name is None else self._index_in(self.index_name, self.choice)

    def part_indexes(self) -> list[tuple[str, bytes]]:
        """See Checkpoint."""
        named = indexes_of_parts(self.choice)
        return [(name, self._index_in(name, part)) for name, part in named]

    def _index_in(self, name: str, choice: Choice) -> bytes:
        """The index that a choice follows, while it is the one that was followed."""
        path = os.path.join(self.root, name)
        changed = SourceChanged(
            f"{path}: was rewritten or removed while it was being read",
            hint="let whatever writes it finish, then run again",
        )
        try:
            raw = read_index(path)
        except (CheckpointError, ValueError):
            raise changed from None
        if self._index is not None:
            self._index.check()
        elif digest(raw) != choice.index_digest:
            raise changed
        return raw

    def recipe(self) -> str:
        """See Checkpoint. Of the hub it is the cached files: nobody downloads them again, or asks
        which commit it is.
        """
        return json.dumps({"path": self.path})

    def verify(self) -> None:
        """Raise SourceChanged if a file changed or its path leads elsewhere by now."""
        for file in self._opened():
            file.check()
            file.check_path()

    def close(self) -> None:
        """Unmap and close all files; may be called more than once. No reader may be in use."""
        with self._lock:
            mappings, self._mappings = self._mappings, None
        if mappings is not None:
            mappings.close()
        for file in self._opened():
            file.close()

    def _opened(self) -> list[OpenFile]:
        return [*self.open_files, *([] if self._index is None else [self._index])]


def local_place(path: str | os.PathLike[str]) -> LocalPlace:
    """The files that ``path`` means: see ``choosing.choice_of``. Raises CheckpointError."""
    text = os.fspath(path)
    if not os.path.lexists(text):
        raise no_such_path(text)
    if os.path.isdir(text):
        root, name = text, ""
    else:
        root, name = os.path.split(text)
    folder = LocalFolder(os.path.abspath(root), root)
    return LocalPlace(text, folder.root, choice_of(folder, name))
