"""Checkpoints on the local disk: one safetensors file, or a directory of shards."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import xxhash

from ckdiff.checkpoints.choosing import Shards, digest, find_shards, read_index
from ckdiff.checkpoints.formats.safetensors import Header, read_header
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.protocol import IntArray, SourceFile, SpanReader
from ckdiff.checkpoints.views.joined import Joined, JoinedFiles, Joining
from ckdiff.errors import CheckpointError, SourceChanged

if TYPE_CHECKING:
    from ckdiff.checkpoints.places.mapped import Mappings

__all__ = ["LocalCheckpoint", "OpenFile", "file_metadata", "open_local"]


class LocalCheckpoint(JoinedFiles):
    """A checkpoint whose files are here, and stay open until ``close``."""

    def __init__(self, joined: Joined, opened: list[OpenFile], shards: Shards, path: str) -> None:
        super().__init__(os.path.basename(os.path.abspath(path)), joined)
        self.open_files: list[OpenFile] = opened
        self.path = os.path.abspath(path)  #: what it was opened by
        if shards.index is not None or os.path.isdir(path):
            self.directory = shards.root
        if shards.index is not None:
            self.index_name = os.path.basename(shards.index)
        self._index_digest = shards.index_digest
        self._mappings: Mappings | None = None
        self._lock = threading.Lock()

    def fingerprint(self) -> list[Any]:
        """For each file its name, device, inode, size and times (nanoseconds)."""
        pairs = zip(self.files, self.open_files, strict=True)
        return [[source.name, *file.identity] for source, file in pairs]

    def seen(self) -> list[Any]:
        """For each file its name, size and modification time; a digest of the headers' tables."""
        digest = xxhash.xxh3_128()
        for column in (self.table.names, self.table.dtypes, self.table.shapes):
            digest.update(repr(column).encode("utf-8", "surrogatepass"))
        for numbers in (self.table.nbytes, self.file_index, self.offset):
            digest.update(numbers.tobytes())
        pairs = zip(self.files, self.open_files, strict=True)
        # devices and inodes have other numbers elsewhere
        files = [[source.name, file.size, file.identity[3]] for source, file in pairs]
        return [*files, digest.hexdigest()]

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """Ask the kernel to read spans into the page cache, where it can be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        files, begins = self.file_index[tensors], self.offset[tensors] + starts
        columns = zip(files.tolist(), begins.tolist(), nbytes.tolist(), strict=True)
        for index, begin, size in columns:
            fd = self.open_files[index].fd
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(fd, begin, size, os.POSIX_FADV_WILLNEED)

    def reader(self) -> SpanReader:
        """A new reader over the mapped files, for one worker."""
        from ckdiff.checkpoints.places.mapped import MappedReader

        return MappedReader(self.mappings(), self.file_index, self.offset)

    def mappings(self) -> Mappings:
        """The mappings that all readers of this checkpoint share."""
        from ckdiff.checkpoints.places.mapped import Mappings

        with self._lock:
            if any(file.fd < 0 for file in self.open_files):
                raise CheckpointError(
                    f"the checkpoint {self.label} was closed", hint="open it again"
                )
            if self._mappings is None:
                self._mappings = Mappings(self.open_files)
            return self._mappings

    def head(self, file: int) -> bytes:
        """See Checkpoint."""
        opened, size = self.open_files[file], self.head_sizes[file]
        try:
            raw = os.pread(opened.fd, size, 0)
            while len(raw) < size and (more := os.pread(opened.fd, size - len(raw), len(raw))):
                raw += more
        except OSError as error:
            raise CheckpointError(f"{opened.path}: cannot be read: {error.strerror}") from None
        opened.check()
        return raw

    def index(self) -> bytes | None:
        """See Checkpoint."""
        if self.index_name is None or self.directory is None:
            return None
        path = os.path.join(self.directory, self.index_name)
        changed = SourceChanged(
            f"{path}: was rewritten or removed while it was being read",
            hint="let whatever writes it finish, then run again",
        )
        try:
            raw = read_index(path)
        except (CheckpointError, ValueError):
            raise changed from None
        if digest(raw) != self._index_digest:
            raise changed
        return raw

    def recipe(self) -> str:
        """See Checkpoint. Of the hub it is the cached files: nobody downloads them again, or asks
        which commit it is.
        """
        return json.dumps({"path": self.path})

    def verify(self) -> None:
        """Raise SourceChanged if a file changed or its path leads elsewhere by now."""
        for file in self.open_files:
            file.check()
            file.check_path()

    def close(self) -> None:
        """Unmap and close all files; may be called more than once. No reader may be in use."""
        with self._lock:
            mappings, self._mappings = self._mappings, None
        if mappings is not None:
            mappings.close()
        for file in self.open_files:
            file.close()


def open_local(path: str | os.PathLike[str]) -> LocalCheckpoint:
    """Open the checkpoint at ``path``: a file, a directory, or an index.

    In a directory the index wins; without one every ``*.safetensors`` counts. Each tensor must be
    there once. Raises HeaderError for a file that breaks the format and CheckpointError for
    everything else that is wrong: one error names the first problems and counts all.
    """
    path = os.fspath(path)
    shards = find_shards(path)
    make_room(len(shards.names))
    joining = Joining(shards)
    opened: list[OpenFile] = []
    with ExitStack() as cleanup:
        for name in shards.names:
            try:
                file = OpenFile.open(os.path.join(shards.root, name))
                cleanup.callback(file.close)
                header = _read(file)
            except CheckpointError as error:
                joining.failed(name, error)
                continue
            opened.append(file)
            joining.add(SourceFile(name, file.size), header)
        joined = joining.finish(shards.index or path)
        checkpoint = LocalCheckpoint(joined, opened, shards, path)
        cleanup.pop_all()
    return checkpoint


def _read(file: OpenFile) -> Header:
    try:
        header = read_header(file.fd, file.size, file.path)
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}") from None
    # A header is only worth something if it is the header of the file as it was identified.
    file.check()
    return header


def file_metadata(path: str) -> dict[str, str]:
    """The metadata of a safetensors file; nothing where it is none."""
    try:
        file = OpenFile.open(path)
    except CheckpointError:
        return {}
    try:
        return read_header(file.fd, file.size, path).metadata
    except (CheckpointError, OSError):
        return {}
    finally:
        file.close()
