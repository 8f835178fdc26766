"""Stored mask objects: one chunk's mask of one rule, as the bytes of a Zarr shard.

The engine hands over finished masks and gets plain Zarr v3: `sharding_indexed` objects of 8 MiB
with inner chunks of 64 KiB, each a zstd frame with a checksum, and an index with a crc32c at the
end. They are encoded here and not by zarr's own write path, which is several times slower than
the kernels; any Zarr reader opens the result.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from ckdiff.errors import StoreCorrupt
from ckdiff.layout import CHUNK
from ckdiff.outputs.writing import start_writeback, write_all

GROUP = "masks"  #: of a store: the Zarr group of all masks
OBJECT = CHUNK // 8  #: mask bytes of one stored object: a chunk's
INNER = 1 << 16  #: mask bytes of one inner chunk
INNERS = OBJECT // INNER
INDEX_BYTES = INNERS * 16 + 4
LARGEST_FRAME = 2 * INNER  #: bytes of a frame; a sound one is never much larger than its content
ABSENT = 2**64 - 1  #: Zarr's mark for an inner chunk that is not there: beyond the array's end

Bytes = npt.NDArray[np.uint8]


def array_path(rule: str) -> str:
    """Where in a store the Zarr array of a rule's mask is."""
    return f"{GROUP}/{rule}"


def objects_folder(rule: str) -> str:
    """Where the objects of a rule's mask are, each named for its chunk."""
    return f"{array_path(rule)}/c"


def object_key(rule: str, chunk: int) -> str:
    """Where a chunk's mask is."""
    return f"{objects_folder(rule)}/{chunk}"


def object_keys(rule: str, length: int) -> list[str]:
    """Where all of a mask of ``length`` bytes is."""
    return [object_key(rule, chunk) for chunk in range(-(-length // OBJECT))]


def rule_and_chunk(key: str) -> tuple[str, int]:
    """What an ``object_key`` is of."""
    _, rule, _, chunk = key.split("/")
    return rule, int(chunk)


def array_metadata(length: int) -> dict[str, Any]:
    """The ``zarr.json`` of a mask of ``length`` bytes."""
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [INNER],
        "codecs": [{"name": "bytes"}, zstd],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [length],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [OBJECT]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"bit_order": "little"},
        "dimension_names": ["byte"],
    }


class ObjectWriter:
    """Writes one object next to its final name; ``finish`` renames it there.

    Two writers of one object may be at work at the same time, as when a cluster takes a worker for
    dead that is not: each has a file of its own, and the last to finish leaves a whole object.
    ``elsewhere`` says that the directory is another process's: it must be there already, and is
    perhaps on another machine, so that nobody else could bring these bytes to the disk.
    """

    def __init__(self, path: Path, *, elsewhere: bool = False) -> None:
        self._path = path
        self._elsewhere = elsewhere
        self._temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        if not elsewhere:
            path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, 0o666)
        self._finished = False
        self._index = np.full((INNERS, 2), ABSENT, "<u8")
        self._frames = 0
        self._size = 0
        self._digest = xxhash.xxh3_128()

    def add(self, frames: list[bytes]) -> None:
        """Append the next inner chunks."""
        for frame in frames:
            self._index[self._frames] = self._size, len(frame)
            self._frames += 1
            self._size += len(frame)
        self._write(b"".join(frames))

    def finish(self) -> tuple[int, str]:
        """Write the index, rename into place; gives (size in bytes, digest)."""
        index = self._index.tobytes()
        crc = int(google_crc32c.value(index)).to_bytes(4, "little")
        self._write(index + crc)
        self._size += INDEX_BYTES
        if self._elsewhere:
            os.fsync(self._fd)
        else:
            start_writeback(self._fd)
        self._close()  # network file systems report here what they could not write
        os.replace(self._temporary, self._path)
        self._finished = True
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close and delete what was written so far; does nothing after ``finish``."""
        if not self._finished:
            with contextlib.suppress(OSError):
                self._close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        write_all(self._fd, data)


def file_digest(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _without_waiting(path: str, flags: int) -> int:
    # something else of that name, such as a named pipe, must not make us wait
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def read_index(fd: int, size: int, where: str) -> npt.NDArray[np.uint64]:
    """The (offset, length) pairs of an object's inner chunks; raises StoreCorrupt."""
    if size < INDEX_BYTES:
        raise StoreCorrupt(f"{where} is too short to be a mask object")
    raw = read_bytes(fd, INDEX_BYTES, size - INDEX_BYTES)
    if len(raw) != INDEX_BYTES or google_crc32c.value(raw[:-4]) != int.from_bytes(
        raw[-4:], "little"
    ):
        raise StoreCorrupt(f"the index of {where} fails its checksum")
    return np.frombuffer(raw[:-4], "<u8").reshape(INNERS, 2)


def read_bytes(fd: int, size: int, offset: int) -> bytes:
    """``size`` bytes from ``offset``, fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def read_inners(fd: int, size: int, where: str, first: int, stop: int) -> Bytes:
    """The mask bytes of inner chunks [first, stop) of an open object of ``size`` bytes, decoded and
    checked. Raises StoreCorrupt; OSError passes through.
    """
    decoder = zstandard.ZstdDecompressor()
    out = np.empty((stop - first) * INNER, np.uint8)
    for i, (offset, length) in enumerate(read_index(fd, size, where)[first:stop].tolist(), first):
        # looked at before room is made: what an object says of itself, its writer may have invented
        if (
            offset == ABSENT
            or not 4 < length <= LARGEST_FRAME
            or offset + length > size - INDEX_BYTES
        ):
            raise StoreCorrupt(f"inner chunk {i} of {where} is missing")
        frame = read_bytes(fd, length, offset)
        try:
            said = zstandard.get_frame_parameters(frame)
            if said.content_size != INNER or not said.has_checksum:
                raise StoreCorrupt(f"inner chunk {i} of {where} is not one of a mask")
            data = decoder.decompress(frame, max_output_size=INNER, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise StoreCorrupt(f"inner chunk {i} of {where} is damaged: {error}") from None
        if len(data) != INNER:
            raise StoreCorrupt(f"inner chunk {i} of {where} has {len(data)} bytes")
        at = (i - first) * INNER
        out[at : at + INNER] = np.frombuffer(data, np.uint8)
    return out


def check_absent(fd: int, size: int, where: str, first: int) -> None:
    """Raise StoreCorrupt unless an object holds just the inner chunks before ``first``.

    Zarr takes what is marked absent for zeros, that is, for "unchanged".
    """
    index = read_index(fd, size, where)
    if (index[:first] == ABSENT).any() or (index[first:] != ABSENT).any():
        raise StoreCorrupt(f"{where} does not have the inner chunks that it needs")
