"""The files of a weight version being written: frames in, complete safetensors files out.

What a header says is known when all of its file's frames are, and a header comes first: frames wait
in a file without a name, and are copied behind it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckdiff.deltas.versions.form import INDEX_NAME, Said, index_bytes, shard_name
from ckdiff.deltas.versions.spool import nameless
from ckdiff.errors import OutputError
from ckdiff.outputs.writing import start_writeback, write_all

SHARD_BYTES = 4 << 30  #: of frames in one file, unless it is one frame
_HEADER_BYTES = 32 << 20  # of a header's entries in one file; what readers take is three times that
_ENTRY = 160  # bytes of an entry besides its name, which is there twice
_COPIED = 1 << 20  # bytes at a time
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Shards:
    """The files of a version in ``folder``, which is ours; for one thread. Close it."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._fd = -1
        self._size = self._header = 0
        self._entries: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._done: list[list[str]] = []  # the tensors of each file

    def add(self, tensor: str, digest: str, size: int, parts: Iterable[bytes]) -> None:
        """Append a tensor's frame of ``size`` bytes. OSError passes through."""
        more = _ENTRY + 2 * len(json.dumps(tensor)) + len(digest)
        if self._entries and (
            self._size + size > self._limit or self._header + more > _HEADER_BYTES
        ):
            self._end()
        if self._fd < 0:
            self._fd = nameless(self._folder)
        for part in parts:
            write_all(self._fd, part)
        begin, self._size = self._size, self._size + size
        self._entries[tensor] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [begin, self._size],
        }
        self._digests[tensor] = digest
        self._header += more

    def finish(self, said: Said) -> None:
        """Give the files their names, and write the index, which is the last. OSError passes
        through; whoever puts all in its place syncs it before.
        """
        if self._entries:
            self._end()
        weight_map: dict[str, str] = {}
        for position, tensors in enumerate(self._done):
            name = shard_name(position, len(self._done))
            os.rename(self._folder / _unfinished(position), self._folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        (self._folder / INDEX_NAME).write_bytes(index_bytes(said, weight_map))

    def close(self) -> None:
        """Give back what was not finished; may be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _end(self) -> None:
        """Write the file of what was added."""
        header = {"__metadata__": self._digests, **self._entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        fd = os.open(self._folder / _unfinished(len(self._done)), _NEW, 0o666)
        try:
            write_all(fd, len(text).to_bytes(8, "little") + text)
            _copy(self._fd, fd, self._size)
            start_writeback(fd)
        finally:
            os.close(fd)
        self.close()
        self._done.append(list(self._entries))
        self._entries, self._digests = {}, {}
        self._size = self._header = 0


def _unfinished(position: int) -> str:
    return f"part-{position:05d}.safetensors"


def _copy(source: int, target: int, size: int) -> None:
    """Append a whole file to another; the system does it where it can."""
    copied = 0
    with suppress(OSError, AttributeError):  # not here, or not between these file systems
        while copied < size:
            more = os.copy_file_range(source, target, size - copied, copied)
            if not more:
                break
            copied += more
    while data := os.pread(source, min(size - copied, _COPIED), copied):
        write_all(target, data)
        copied += len(data)
    if copied != size:
        raise OutputError(
            f"{size - copied:,} bytes of a version were lost on the way to its file",
            hint="does something else write to its directory?",
        )
