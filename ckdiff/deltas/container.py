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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from ckdiff.checkpoints.mistaken import seen_instead
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.contents import Contents
from ckdiff.deltas.facts import MANIFEST_LIMIT, read_manifest
from ckdiff.deltas.filenames import index_fault, newer_fault
from ckdiff.deltas.ownheader import pread, read_own_header
from ckdiff.deltas.parts import (
    DATA,
    FORMAT,
    FRAMES,
    HEADS,
    MANIFEST,
    NEWER,
    TENSORS,
    VERSION,
    Tensors,
    UInt64,
    called,
    digest,
    entries_digest,
)
from ckdiff.deltas.ranges import read_ranges
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.room import TENSOR, Room, header_cost, index_cost, json_cost, windows_cost
from ckdiff.deltas.tables import check_tables
from ckdiff.errors import DeltaError, HeaderError, OutputError, printable
from ckdiff.outputs.rebuilt import FilePlan
from ckdiff.outputs.writing import write_all

_METADATA = {"format", "version", "encoding", "manifest", "entries"}
_MOST_WINDOWS = 1 << 22  # of any checkpoint: 32 TiB of them
_FRAME_ROOM = 1024  # bytes that a zstd frame may have besides its data, however small that is
_COPIED = 1 << 20  # bytes at a time
_AGAIN = "make or fetch the delta again"


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
        if copied != size:
            raise OutputError(
                f"{size - copied:,} bytes of a delta were lost on the way to its file",
                hint="does something else write to its directory?",
            )

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
        raw = json.dumps(
            manifest | self._own_parts(blueprint, tensors, frames),
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode("utf-8", "surrogatepass")
        self.append(raw)
        self.end(MANIFEST)
        version = NEWER if "ranges" in manifest else VERSION
        head = self._header(manifest["encoding"], version, digest(raw))
        os.lseek(self._fd, 0, os.SEEK_SET)
        write_all(self._fd, head)

    def _own_parts(self, blueprint: Blueprint, tensors: Tensors, frames: bytes) -> dict[str, Any]:
        """Append the parts before the manifest; gives what it says of them."""
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
        return {
            "files": [[plan.name, plan.size, len(plan.head)] for plan in blueprint.files],
            "directory": blueprint.directory,
            "index": None if blueprint.index is None else blueprint.index[0],
            "parts": digests,
        }

    def _header(self, encoding: str, version: int, manifest: str) -> bytes:
        """The header with its length; ``manifest`` is the digest of that."""
        metadata = {
            "format": FORMAT,
            "version": str(version),
            "encoding": encoding,
            "manifest": manifest,
            "entries": entries_digest(
                [name, entry["dtype"], entry["shape"], entry["data_offsets"]]
                for name, entry in self._entries.items()
            ),
        }
        header = json.dumps(
            {"__metadata__": metadata} | self._entries, ensure_ascii=False, separators=(",", ":")
        ).encode("utf-8", "surrogatepass")
        if len(header) > self._reserved:
            raise OutputError(
                f"the header of the delta has {len(header):,} bytes, and {self._reserved:,} were "
                "kept for it",
                hint="please report it",
            )
        return self._reserved.to_bytes(8, "little") + header.ljust(self._reserved)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _mistaken(path: str) -> DeltaError:
    """The error for what is no delta."""
    what, hint = seen_instead(path) or ("", "ckdiff delta makes them")
    if what == "is a checkpoint":
        hint = "the base comes first: `ckdiff apply BASE DELTA... -o OUT`"
    return DeltaError(
        f"{printable(path)} {what}, not a delta" if what else f"{printable(path)} is not a delta",
        hint=hint,
    )


class Delta:
    """An open delta. Everything but its data was read and checked.

    What it keeps in memory is taken out of ``room``, or else out of what is allowed by default.
    Raises DeltaError, HeaderError and CheckpointError, and BudgetError before it reads what does
    not fit.
    """

    def __init__(self, path: str, room: Room | None = None) -> None:
        self.path = path
        self._room = Room() if room is None else room
        if os.path.isdir(path):
            raise _mistaken(path)
        self.file = OpenFile.open(path)
        try:
            self._read()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called more than once."""
        self.file.close()

    @property
    def encoding(self) -> str:
        """Its name in the registry."""
        return str(self.manifest["encoding"])

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.size

    def read(self, name: str, start: int, size: int) -> memoryview:
        """Bytes of one of the file's tensors."""
        begin, length = self._span(name)
        if start + size > length:
            raise self.damaged(f"{called(name)} is too short")
        return memoryview(self._pread(begin + start, size))

    def frame(self, window: int) -> memoryview | None:
        """The frame of a window, or None where nothing changed. Raises DeltaError."""
        size = int(self.frame_sizes[window])
        if not size:
            return None
        data = self.read(DATA, int(self.frame_starts[window]), size)
        if xxhash.xxh3_64_intdigest(data) != int(self.frame_digests[window]):
            name = self.blueprint.names[int(self.windows.tensor[window])]
            raise self.damaged(f"the changes of {called(name)} are not what was written")
        return data

    def damaged(self, what: str) -> DeltaError:
        """The error for a delta that is not what was written."""
        return DeltaError(f"{printable(self.path)} is damaged: {what}", hint=_AGAIN)

    def check(self) -> None:
        """Raise SourceChanged if the file is no longer what was opened."""
        self.file.check()

    # inside

    def _read(self) -> None:
        try:
            self._header = read_own_header(self.file, self._room, printable(self.path))
        except OSError as error:
            raise self._unreadable(error) from None
        metadata = self._header.metadata
        if metadata.get("format") != FORMAT:
            raise _mistaken(self.path)
        if metadata.get("version") not in (str(VERSION), str(NEWER)):
            raise DeltaError(
                f"{printable(self.path)} is a delta of version "
                f"{printable(metadata.get('version', '?')[:40])}, and this is for versions "
                f"{VERSION} and {NEWER}",
                hint="use a newer ckdiff",
            )
        if metadata.keys() != _METADATA:
            raise self.damaged("its header is not that of a delta")
        self._where = {name: i for i, name in enumerate(self._header.names)}
        if entries_digest(self._entries()) != metadata["entries"]:
            raise self.damaged("its header is not what was written")
        try:
            self.manifest = self._read_manifest(metadata)
            self._read_blueprint()
            self._read_tables()
        except ValueError as error:
            raise self.damaged(f"it makes no sense: {error}") from None

    def _entries(self) -> Iterator[list[Any]]:
        """What the file's own header says of each tensor."""
        header = self._header
        begins = (header.begins - header.data_start).tolist()
        sizes = header.nbytes.tolist()
        for name, dtype, shape, begin, size in zip(
            header.names, header.dtypes, header.shapes, begins, sizes, strict=True
        ):
            yield [name, dtype, list(shape), [begin, begin + size]]

    def _read_manifest(self, metadata: dict[str, str]) -> dict[str, Any]:
        size = self._span(MANIFEST)[1]
        if size > MANIFEST_LIMIT:
            raise ValueError(f"a manifest of {size:,} bytes")
        self._take(size)
        raw = self._whole(MANIFEST)
        if digest(raw) != metadata["manifest"]:
            raise self.damaged("its manifest is not what was written")
        self._take(json_cost(raw))
        manifest = read_manifest(raw, ranges=metadata["version"] == str(NEWER))
        self._room.give(size)
        if metadata["encoding"] != manifest["encoding"]:
            raise ValueError("two encodings")
        return manifest

    def _read_blueprint(self) -> None:
        manifest, heads = self.manifest, self._part(HEADS)
        self._take(len(heads))  # once more: in pieces
        plans, at = [], 0
        for name, size, length in manifest["files"]:
            plans.append(FilePlan(name, heads[at : at + length], size))
            self._take(header_cost(plans[-1].head, TENSOR))
            at += length
        index = None if manifest["index"] is None else (manifest["index"], heads[at:])
        if at > len(heads) or (index is None and at < len(heads)):
            raise ValueError("its headers have another size")
        try:
            self.blueprint = Blueprint.of(plans, index, directory=manifest["directory"])
        except HeaderError as error:
            raise self.damaged(f"a file that it rebuilds: {error.message}") from None
        self._room.give(len(heads))
        del heads
        # a parsed index has the names once more, for a moment
        passing = 0 if index is None else index_cost(index[1])
        self._take(passing)
        fault = index_fault(self.blueprint)
        if "ranges" in manifest:
            fault = newer_fault(self.blueprint, fault, ranges=bool(manifest["ranges"]))
        if fault is not None:
            raise ValueError(fault)
        self._room.give(passing)

    def _read_tables(self) -> None:
        count, windows = len(self.blueprint.names), self.blueprint.window_count()
        if windows > _MOST_WINDOWS:
            raise ValueError("it is larger than any checkpoint")
        self._take(windows_cost(windows, int(self.blueprint.nbytes.sum())))
        self.tensors = Tensors.from_bytes(self._part(TENSORS, Tensors.ROW * count), count)
        self.windows: Windows = self.blueprint.windows()
        self.ranges = read_ranges(self.manifest, self.blueprint, self.tensors.based)
        data = self._part(FRAMES, 12 * windows)
        self.frame_sizes: IntArray = np.frombuffer(data, np.uint32, windows).astype(np.int64)
        self.frame_digests: UInt64 = np.frombuffer(data[4 * windows :], np.uint64)
        self.frame_starts: IntArray = np.cumsum(self.frame_sizes) - self.frame_sizes
        sizes, tensors, blueprint = self.frame_sizes, self.tensors, self.blueprint
        contents = Contents(self._header, blueprint, self.windows, sizes, tensors.based)
        contents.check(ENCODINGS[self.encoding].check)
        check_tables(self.manifest, self.ranges, blueprint, self.windows, tensors, sizes)

    def _part(self, name: str, wanted: int | None = None) -> bytes:
        """A part, unpacked and checked; of ``wanted`` bytes, where that is known."""
        size, expected = self.manifest["parts"][name]
        if wanted is not None and size != wanted:
            raise ValueError(f"the size of {name}")
        stored_size = self._span(name)[1]
        if stored_size > size + (size >> 7) + _FRAME_ROOM:
            raise ValueError(f"{name} is stored in more bytes than it has")
        self._take(size + stored_size)
        stored = self._whole(name)
        if digest(stored) != expected:
            raise self.damaged(f"{name} is not what was written")
        try:
            if zstandard.frame_content_size(stored) != size:  # before it is allocated
                raise ValueError(f"the size of {name}")
            found = zstandard.ZstdDecompressor().decompress(
                stored, max_output_size=size, allow_extra_data=False
            )
        except zstandard.ZstdError:
            raise self.damaged(f"{name} cannot be unpacked") from None
        self._room.give(stored_size)
        return found

    def _take(self, size: int) -> None:
        """Raise BudgetError where ``size`` more bytes of memory are too many."""
        self._room.take(size, printable(self.path))

    def _span(self, name: str) -> tuple[int, int]:
        """First byte and size of one of the file's tensors."""
        at = self._where.get(name)
        if at is None:
            raise self.damaged(f"it has no {called(name)}")
        return int(self._header.begins[at]), int(self._header.nbytes[at])

    def _whole(self, name: str) -> bytes:
        return self._pread(*self._span(name))

    def _pread(self, begin: int, size: int) -> bytes:
        try:
            data = pread(self.file.fd, begin, size)
        except OSError as error:
            raise self._unreadable(error) from None
        if len(data) < size:
            raise self.damaged("it was cut while it was read")
        return data

    def _unreadable(self, error: OSError) -> DeltaError:
        return DeltaError(
            f"{printable(self.path)}: cannot be read: {error.strerror}", hint="check the disk"
        )
