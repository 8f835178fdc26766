"""What is needed to finish a change in place, or to undo it: old and new bytes of all that changes.

    MAGIC, length of the header, header (JSON), its digest, records, a last record

The header says which files of which checkpoint it is of, and between which versions. A record is of
a part of a file: the bytes that differ, where they are, what they were and what they are to be. So
it does not matter how often, or how far, it has been put into the file. A journal is ours only if
it is a file of ours, made where it lies, and it is believed only as far as its digests go.

It has another name until all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from ckdiff.checkpoints.halfway import JOURNAL_NAME
from ckdiff.checkpoints.places.openfile import read_into
from ckdiff.deltas.ownheader import pread
from ckdiff.deltas.versions.lock import SyncFolder
from ckdiff.errors import DeltaError, printable
from ckdiff.kernels.abi import GROUP
from ckdiff.kernels.changes import MARGIN, Changes, Kept
from ckdiff.outputs.writing import start_writeback, sync_data, write_at

NEW_NAME = f"{JOURNAL_NAME}.new"
PART = 1 << 20  #: bytes of a file that a record is of, at most
#: bytes that making a record, or reading one, takes: both sides and which bytes, twice; the part
RECORD_MEMORY = 6 * PART

#: kinds of records
CHANGES, TENSOR, LAST = 1, 2, 3

_MAGIC = b"CKDJRNL2"
_START, _DIGEST = struct.Struct("<8sQ"), 16
_HEAD = struct.Struct("<IIQQIIQ")
_LARGEST_HEADER = 1 << 26
_WRITEBACK = 4 << 20  # bytes after which the disk is told to begin
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Record(NamedTuple):
    """The head of a record."""

    kind: int
    file: int  #: position among the journal's files
    begin: int  #: of the part, or of the tensor, in the file
    size: int  #: bytes of it; of the last record how many there are
    masks: int  #: blocks of which bytes differ
    values: int  #: bytes that differ
    digest: int  #: of the fields before it, and of what follows

    @property
    def blocks(self) -> int:
        """Bytes that say which blocks differ."""
        return 8 * -(-self.size // GROUP)

    @property
    def payload(self) -> int:
        """Bytes that follow it."""
        if self.kind == CHANGES:
            return self.blocks + 8 * self.masks + 2 * self.values
        return 2 * _DIGEST if self.kind == TENSOR else 0

    def right(self, files: int) -> bool:
        """Whether its numbers make sense."""
        if self.kind == TENSOR:
            return self.file < files
        right = self.kind == CHANGES and self.size <= PART and self.file < files
        return right and self.masks <= 8 * self.blocks and self.values <= self.size


@dataclass(frozen=True, slots=True)
class JournalFile:
    """A file that changes."""

    name: str  #: relative to the checkpoint
    size: int
    inode: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal is of."""

    before: int | None  #: version; None where there was no marker
    after: int | None  #: None where what it leads to is no version
    files: list[JournalFile]
    #: of a checkpoint that is replaced: names that come, and names that go
    coming: list[str]
    going: list[str]


class JournalWriter:
    """A journal being made; any thread may add to it. OSError passes through."""

    def __init__(self, folder: SyncFolder, header: Header) -> None:
        self._folder = folder
        folder.remove(NEW_NAME)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS
        self._fd = os.open(NEW_NAME, flags, 0o600, dir_fd=folder.fd)
        self._lock, self._count = threading.Lock(), 0
        self._end = self._begun = 0
        self.changed = False  #: whether anything changes
        try:
            found = {"inode": os.fstat(self._fd).st_ino, **asdict(header)}
            text = json.dumps(found, separators=(",", ":")).encode()
            start = _START.pack(_MAGIC, len(text)) + text
            self._put(start + xxhash.xxh3_128_digest(start))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self._end

    def changes(self, file: int, begin: int, size: int, found: Changes) -> None:
        """Add what changes in a part of a file."""
        self.changed = True
        differ = np.flatnonzero(found.blocks)
        first, end = int(differ[0]), int(differ[-1]) + 1
        begin, size = begin + first * GROUP, min(size, end * GROUP) - first * GROUP
        parts = (found.blocks[first:end], found.masks, found.old, found.new)
        fields = CHANGES, file, begin, size, len(found.masks), len(found.old)
        self._add(fields, b"".join(part.data for part in parts))

    def tensor(self, file: int, begin: int, size: int, digests: tuple[bytes, bytes]) -> None:
        """Add the digests of a tensor, of what it was and what it is to be."""
        self._add((TENSOR, file, begin, size, 0, 0), b"".join(digests))

    def finish(self) -> None:
        """Give it its name, when all of it is on the disk; ``drop_marker`` brings that there."""
        self._add((LAST, 0, 0, self._count, 0, 0), b"")
        sync_data(self._fd)
        fds = {"src_dir_fd": self._folder.fd, "dst_dir_fd": self._folder.fd}
        os.rename(NEW_NAME, JOURNAL_NAME, **fds)

    def close(self) -> None:
        """Close it, and remove what was not finished; may be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            with suppress(OSError):
                self._folder.remove(NEW_NAME)

    def _add(self, fields: tuple[int, ...], payload: bytes) -> None:
        digest = _digest(fields, payload)
        self._put(_HEAD.pack(*fields, digest) + payload)

    def _put(self, data: bytes) -> None:
        with self._lock:
            at = self._end
            self._end += len(data)
            self._count += 1
            begun = self._begun if self._end - self._begun > _WRITEBACK else -1
            if begun >= 0:
                self._begun = at
        write_at(self._fd, data, at)
        if begun >= 0:
            start_writeback(self._fd, begun, at + len(data) - begun)


class Journal:
    """A finished journal. A context manager that closes it."""

    def __init__(self, folder: SyncFolder) -> None:
        self.path = folder.path / JOURNAL_NAME
        try:
            self._fd = os.open(JOURNAL_NAME, os.O_RDONLY | _FLAGS, dir_fd=folder.fd)
        except OSError as error:
            raise self.fault(f"it cannot be opened: {error.strerror}") from None
        try:
            self._status = os.fstat(self._fd)
            self._require_ours()
            self.header = self._header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; may be called more than once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fault(self, what: str) -> DeltaError:
        """The error for a journal that is of no use."""
        return DeltaError(
            f"{printable(str(self.path))} cannot be trusted: {what}",
            hint="put a full version in the checkpoint's place, and delete .weight_sync",
        )

    def records(self) -> Iterator[tuple[int, Record]]:
        """All records but the last, and where they are. Raises DeltaError where one is missing."""
        at, count = self._begin, 1  # the header counts
        while True:
            record = self.record(at)
            if record.kind == LAST:
                if record.size != count or _digest(record[:-1], b"") != record.digest:
                    raise self.fault("it is damaged at its end")
                return
            if not record.right(len(self.header.files)):
                raise self.fault(f"its record at byte {at:,} is damaged")
            yield at, record
            at += _HEAD.size + record.payload
            count += 1

    def changes(self, at: int) -> tuple[Record, Kept]:
        """What changes in a part of a file. Raises DeltaError."""
        record, payload = self._payload(at, MARGIN)
        words = np.frombuffer(payload, np.uint64, record.blocks // 8 + record.masks)
        blocks, masks = np.split(words, [record.blocks // 8])
        return record, Kept(blocks, masks, np.frombuffer(payload, np.uint8, offset=words.nbytes))

    def digests(self, at: int) -> tuple[Record, tuple[bytes, bytes]]:
        """The digests of a tensor: of what it was, and what it is to be. Raises DeltaError."""
        record, payload = self._payload(at)
        return record, (bytes(payload[:_DIGEST]), bytes(payload[_DIGEST:]))

    def record(self, at: int) -> Record:
        raw = pread(self._fd, at, _HEAD.size)
        if len(raw) < _HEAD.size:
            raise self.fault("it is cut")
        return Record._make(_HEAD.unpack(raw))

    def _payload(self, at: int, margin: int = 0) -> tuple[Record, bytearray]:
        """What follows a record's head, and a ``margin`` of zeros."""
        record = self.record(at)
        if not record.right(len(self.header.files)):
            raise self.fault(f"its record at byte {at:,} is damaged")
        payload = bytearray(record.payload + margin)
        held = memoryview(payload)[: record.payload]
        if read_into(self._fd, held, at + _HEAD.size) < len(held):
            raise self.fault("it is cut")
        if _digest(record[:-1], held) != record.digest:
            raise self.fault(f"its record at byte {at:,} is damaged")
        return record, payload

    def _require_ours(self) -> None:
        status = self._status
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise self.fault("it is not a regular file, or has another link")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise self.fault("it belongs to another user, or others may write to it")

    def _header(self) -> Header:
        start = pread(self._fd, 0, _START.size)
        if len(start) < _START.size or start[:8] != _MAGIC:
            raise self.fault("it is no journal of ckdiff's")
        length = _START.unpack(start)[1]
        if length > min(_LARGEST_HEADER, self._status.st_size):
            raise self.fault("it is cut")
        raw = pread(self._fd, _START.size, length + _DIGEST)
        text, digest = raw[:length], raw[length:]
        if xxhash.xxh3_128_digest(start + text) != digest:
            raise self.fault("its header is damaged")
        self._begin = _START.size + length + _DIGEST
        try:
            found = json.loads(text)
            inode = found.pop("inode")
            files = [JournalFile(**file) for file in found.pop("files")]
            header = Header(files=files, **found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self.fault("its header is damaged") from None
        if inode != self._status.st_ino:
            raise self.fault("it was copied here from elsewhere")
        for name in [file.name for file in files] + header.coming + header.going:
            if not _plain(name):
                raise self.fault(f"it names {printable(repr(name))}")
        return header


def _plain(name: object) -> bool:
    """Whether a name leads to a file in the checkpoint."""
    return isinstance(name, str) and "\0" not in name and all(
        part not in ("", ".", "..") for part in name.split("/")
    )  # fmt: skip


def _digest(fields: tuple[int, ...], payload: bytes | memoryview) -> int:
    state = xxhash.xxh3_64(_HEAD.pack(*fields, 0))
    state.update(payload)
    return state.intdigest()
