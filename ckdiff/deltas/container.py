"""A delta as a file: safetensors, so that every tool can look into it and none misreads it.

    __metadata__      format, version, encoding, digests of the manifest and of the entries
    ckdiff.data       packed: the frames, one after the other
    NAME...           indices: positions and values of tensors that changed, and tensors whole
    ckdiff.frames     for each window, packed: size and digest of its frame; indices: of its part
    ckdiff.tensors    for each rebuilt tensor: whether it has a base, hashes, changed elements
    ckdiff.heads      the headers of the rebuilt files and their index, verbatim
    ckdiff.manifest   everything else, and the digests of the parts above

Everything in a delta is covered by a digest. They detect accidents; they are not cryptographic.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from ckdiff.checkpoints.header import Header, read_header
from ckdiff.checkpoints.openfile import OpenFile
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.errors import CkdiffError, DeltaError, printable
from ckdiff.writing.objects import write_all
from ckdiff.writing.rebuilt import FilePlan

FORMAT = "ckdiff-delta"
VERSION = 1
PREFIX = "ckdiff."
DATA, FRAMES, TENSORS, HEADS, MANIFEST = (
    PREFIX + part for part in ("data", "frames", "tensors", "heads", "manifest")
)
ENCODINGS = ("packed", "indices")
#: what is believed of a delta before anything of that size is allocated: bytes of an unpacked part,
#: how many times larger it is than stored, and windows (32 TiB of them)
_MOST_UNPACKED, _MOST_TIMES, _MOST_WINDOWS = 1 << 30, 200, 1 << 22
_COPIED = 1 << 20  # bytes at a time
_AGAIN = "make or fetch the delta again"

UInt64 = npt.NDArray[np.uint64]


def digest(data: bytes | memoryview) -> str:
    """What parts of a delta are checked by."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(slots=True)
class Tensors:
    """What a delta says about each rebuilt tensor, in columns."""

    based: npt.NDArray[np.bool_]  #: whether it is made from the base's tensor of that name
    base_hashes: UInt64  #: (tensors, 2): hash sums of the base's tensor, low and high
    tuned_hashes: UInt64  #: (tensors, 2)
    changed: IntArray  #: elements

    ROW: ClassVar[int] = 1 + 16 + 16 + 8  #: bytes

    @classmethod
    def empty(cls, count: int) -> Tensors:
        sums = np.zeros((2, count, 2), np.uint64)
        return cls(np.zeros(count, np.bool_), sums[0], sums[1], np.zeros(count, np.int64))

    def to_bytes(self) -> bytes:
        columns = self.based, self.base_hashes, self.tuned_hashes, self.changed
        return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> Tensors:
        """What ``to_bytes`` gave of ``count`` tensors."""
        based, hashes, changed = data[:count], data[count : 33 * count], data[33 * count :]
        sums = np.frombuffer(hashes, np.uint64).reshape(2, count, 2)
        return cls(
            np.frombuffer(based, np.uint8) != 0, sums[0], sums[1], np.frombuffer(changed, np.int64)
        )


class DeltaWriter:
    """A delta being written: data first, what is known only afterwards behind it."""

    def __init__(self, path: Path, *, reserved: int = 2048) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._reserved = reserved  # bytes of the header; blanks fill it up
        self._entries: dict[str, Any] = {}
        self._begin = self.size = 0  #: bytes of data so far
        os.lseek(self._fd, 8 + reserved, os.SEEK_SET)

    def append(self, data: bytes) -> None:
        """Append to the tensor that ``end`` will name."""
        write_all(self._fd, data)
        self.size += len(data)

    def append_file(self, fd: int, start: int, size: int) -> None:
        """Append ``size`` bytes of another file; the system copies them where it can."""
        copied = 0
        with suppress(OSError, AttributeError):  # not here, or not between these file systems
            while copied < size:
                more = os.copy_file_range(fd, self._fd, size - copied, start + copied)
                if not more:
                    break
                copied += more
        self.size += copied
        while data := os.pread(fd, min(size - copied, _COPIED), start + copied):
            self.append(data)
            copied += len(data)
        assert copied == size

    def end(self, name: str, dtype: str = "U8", shape: Sequence[int] | None = None) -> None:
        """What was appended since the last call is a tensor."""
        shape = [self.size - self._begin] if shape is None else list(shape)
        offsets = [self._begin, self.size]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._begin = self.size

    def finish(
        self,
        manifest: dict[str, Any],
        blueprint: Blueprint,
        tensors: Tensors,
        frames: bytes,
    ) -> None:
        """Append what belongs to every delta, and write the header."""
        heads = b"".join(plan.head for plan in blueprint.files)
        heads += b"" if blueprint.index is None else blueprint.index[1]
        parts = {TENSORS: tensors.to_bytes(), HEADS: heads, FRAMES: frames}
        compressor = zstandard.ZstdCompressor(level=3, write_content_size=True)
        digests = {}
        for name, data in parts.items():
            stored = compressor.compress(data)
            digests[name] = [len(data), digest(stored)]
            self.append(stored)
            self.end(name)
        manifest = manifest | {
            "files": [[plan.name, plan.size, len(plan.head)] for plan in blueprint.files],
            "directory": blueprint.directory,
            "index": None if blueprint.index is None else blueprint.index[0],
            "parts": digests,
        }
        raw = json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        self.append(raw)
        self.end(MANIFEST)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "encoding": manifest["encoding"],
            "manifest": digest(raw),
            "entries": _entries_digest(
                [name, entry["dtype"], entry["shape"], entry["data_offsets"]]
                for name, entry in self._entries.items()
            ),
        }
        header = json.dumps(
            {"__metadata__": metadata} | self._entries, ensure_ascii=False, separators=(",", ":")
        ).encode("utf-8", "surrogatepass")
        assert len(header) <= self._reserved
        head = self._reserved.to_bytes(8, "little") + header.ljust(self._reserved)
        os.lseek(self._fd, 0, os.SEEK_SET)
        write_all(self._fd, head)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Delta:
    """An open delta. Everything but its data was read and checked."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = OpenFile.open(path)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called more than once."""
        self._file.close()

    @property
    def encoding(self) -> str:
        """``packed`` or ``indices``."""
        return str(self.manifest["encoding"])

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.size

    @property
    def header(self) -> Header:
        """Of the file itself."""
        return self._header

    def read(self, name: str, start: int, size: int) -> memoryview:
        """Bytes of one of the file's tensors."""
        begin, length = self._where[name]
        if start + size > length:
            raise self.damaged(f"{name} is too short")
        return self._pread(begin + start, size)

    def frame(self, window: int) -> memoryview | None:
        """The frame of a window, or None where nothing changed. Raises DeltaError."""
        size = int(self.frame_sizes[window])
        if not size:
            return None
        data = self.read(DATA, int(self.frame_starts[window]), size)
        if xxhash.xxh3_64_intdigest(data) != int(self.frame_digests[window]):
            name = self.blueprint.names[int(self.windows.tensor[window])]
            raise self.damaged(f"the changes of {printable(name)} are not what was written")
        return data

    def damaged(self, what: str) -> DeltaError:
        """The error for a delta that is not what was written."""
        return DeltaError(f"{printable(self.path)} is damaged: {what}", hint=_AGAIN)

    def check(self) -> None:
        """Raise SourceChanged if the file is no longer what was opened."""
        self._file.check()

    # inside

    def _read(self) -> None:
        self._header = read_header(self._file.fd, self._file.size, printable(self.path))
        header, metadata = self._header, self._header.metadata
        if metadata.get("format") != FORMAT:
            raise DeltaError(
                f"{printable(self.path)} is not a delta", hint="ckdiff delta makes them"
            )
        if metadata.get("version") != str(VERSION):
            raise DeltaError(
                f"{printable(self.path)} is a delta of version "
                f"{printable(metadata.get('version', '?'))}, and this is for version {VERSION}",
                hint="use a newer ckdiff",
            )
        columns = zip(header.names, header.begins.tolist(), header.nbytes.tolist(), strict=True)
        self._where = {name: (begin, size) for name, begin, size in columns}
        raw = bytes(self._whole(MANIFEST))
        if digest(raw) != metadata.get("manifest"):
            raise self.damaged("its manifest is not what was written")
        begins = header.begins - header.data_start
        offsets = np.stack([begins, begins + header.nbytes], axis=1).tolist()
        entries = zip(header.names, header.dtypes, map(list, header.shapes), offsets, strict=True)
        if _entries_digest(map(list, entries)) != metadata.get("entries"):
            raise self.damaged("its header is not what was written")
        try:
            self._read_parts(json.loads(raw.decode("utf-8", "surrogatepass")))
        except CkdiffError:
            raise
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise self.damaged(f"its manifest makes no sense ({error})") from None

    def _read_parts(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        _check_facts(manifest)
        if self._header.metadata["encoding"] != manifest["encoding"]:
            raise ValueError("encoding")
        if manifest["encoding"] not in ENCODINGS:
            raise DeltaError(
                f"{printable(self.path)} has an unknown encoding", hint="use a newer ckdiff"
            )
        heads = self._part(HEADS)
        plans, at = [], 0
        for name, size, length in manifest["files"]:
            if not (isinstance(name, str) and 8 <= length <= size):
                raise ValueError("a file")
            plans.append(FilePlan(name, heads[at : at + length], size))
            at += length
        name = manifest["index"]
        index = None if name is None else (str(name), heads[at:])
        self.blueprint = Blueprint.of(plans, index, directory=bool(manifest["directory"]))
        count = len(self.blueprint.names)
        self.tensors = Tensors.from_bytes(self._part(TENSORS, Tensors.ROW * count), count)
        if self.blueprint.window_count() > _MOST_WINDOWS:
            raise ValueError("it is larger than any checkpoint")
        self.windows: Windows = self.blueprint.windows()
        self._read_frames(self._part(FRAMES, 12 * len(self.windows)))

    def _read_frames(self, data: bytes) -> None:
        count = len(self.windows)
        self.frame_sizes: IntArray = np.frombuffer(data, np.uint32, count).astype(np.int64)
        self.frame_digests: UInt64 = np.frombuffer(data[4 * count :], np.uint64)
        ends = np.cumsum(self.frame_sizes)
        self.frame_starts: IntArray = ends - self.frame_sizes
        if self.encoding == "packed" and (ends[-1] if count else 0) != self._where[DATA][1]:
            raise ValueError("the frames are not all of the data")

    def _part(self, name: str, wanted: int | None = None) -> bytes:
        """A part, unpacked and checked; of ``wanted`` bytes, where that is known."""
        size, expected = self.manifest["parts"][name]
        stored = self._whole(name)
        if digest(stored) != expected:
            raise self.damaged(f"{name} is not what was written")
        least, most = 0, min(_MOST_UNPACKED, (1 << 16) + _MOST_TIMES * len(stored))
        if wanted is not None:
            least = most = wanted
        if not least <= size <= most or zstandard.frame_content_size(stored) != size:
            raise ValueError(f"the size of {name}")
        with suppress(zstandard.ZstdError):
            return zstandard.ZstdDecompressor().decompress(stored, max_output_size=size)
        raise self.damaged(f"{name} cannot be unpacked")

    def _whole(self, name: str) -> memoryview:
        if name not in self._where:
            raise self.damaged(f"it has no {name}")
        begin, size = self._where[name]
        return self._pread(begin, size)

    def _pread(self, begin: int, size: int) -> memoryview:
        parts, got = [], 0
        try:
            while got < size:
                part = os.pread(self._file.fd, size - got, begin + got)
                if not part:
                    raise self.damaged("it was cut while it was read")
                parts.append(part)
                got += len(part)
        except OSError as error:
            raise DeltaError(f"{printable(self.path)}: cannot be read: {error.strerror}") from None
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def _entries_digest(entries: Iterable[list[Any]]) -> str:
    """Of what a header says, whatever blanks are in it."""
    return digest(json.dumps(list(entries)).encode())


def _check_facts(manifest: dict[str, Any]) -> None:
    """Raise ValueError or its kin for a manifest whose readers would stumble."""
    kinds = {"elements": int, "changed": int, "ckdiff": str, "unpaired": list}
    for key, kind in kinds.items():
        if type(manifest[key]) is not kind:
            raise ValueError(key)
    if not all(isinstance(item["name"], str) and item["reason"] for item in manifest["unpaired"]):
        raise ValueError("unpaired")
    if not isinstance(manifest["base"]["files"], list):
        raise ValueError("base")
    lossy = manifest["lossy"]
    if lossy is not None and not (
        isinstance(lossy["rule"], str) and type(lossy["left_out"]) is int
    ):
        raise ValueError("lossy")
