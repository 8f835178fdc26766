"""One weight version as it lies on the disk: what its index says, and what its files hold."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial

from ckdiff.checkpoints.indexes import SUFFIX
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.ownheader import pread, read_own_header
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.checksums import plain_digest
from ckdiff.deltas.versions.decoding import Read, checked_head
from ckdiff.deltas.versions.form import ENCODINGS, PACKED, Said, shard_name, shard_numbers
from ckdiff.deltas.versions.packed import PackedFile
from ckdiff.errors import CheckpointError, DeltaError, printable
from ckdiff.kernels.zstdframes import LONGEST_HEADER, FrameHead

AGAIN = "publish or fetch the version again"
_FOLDERS = 1 << 20  # names in a stream's directory that are looked at


@dataclass(frozen=True, slots=True)
class Frame:
    """What a delta holds of one tensor."""

    shard: int  #: position of its file
    begin: int  #: its first byte in the file
    size: int  #: bytes
    digest: str  #: of the tensor's new bytes, in lower case


@dataclass(slots=True)
class Version:
    """One version. A full one is an ordinary checkpoint, and has nothing to open here."""

    number: int
    path: str
    said: Said | None  #: None of a full version
    #: tensor -> name of the file that holds it; of a full version nothing
    weight_map: dict[str, str]
    shards: list[OpenFile] = field(default_factory=list)  #: of a delta, once it is open
    frames: dict[str, Frame] = field(default_factory=dict)  #: the same
    packed: PackedFile | None = None  #: the same, of a packed one: it has no shards then

    @property
    def full(self) -> bool:
        """Whether it is a checkpoint by itself."""
        return self.said is None

    @property
    def shown(self) -> str:
        """Its path, for messages."""
        return printable(self.path)

    @property
    def files(self) -> list[OpenFile]:
        """The files of a delta, once it is open."""
        return self.shards if self.packed is None else [self.packed.delta.file]

    def nbytes(self) -> int:
        """Bytes of its files. OSError passes through."""
        sizes = (
            entry.stat().st_size
            for entry in os.scandir(self.path)
            if entry.is_file() and entry.name.endswith((SUFFIX, ".json"))
        )
        return sum(sizes)

    def open(self, room: Room) -> None:
        """Open a delta's shards and read their headers. Raises DeltaError and BudgetError."""
        opened = self.shards or self.packed is not None
        if self.full or opened or not self.weight_map:
            self._names()
            return
        names = self._names()
        if self.said is not None and self.said.encoding == PACKED:
            self._open_packed(names, room)
            return
        make_room(len(names))
        for position, name in enumerate(names):
            path = os.path.join(self.path, name)
            try:
                file = OpenFile.open(path)
                self.shards.append(file)
                header = read_own_header(file, room, printable(path))
            except (CheckpointError, OSError) as error:
                text = error.message if isinstance(error, CheckpointError) else str(error)
                raise DeltaError(text, hint=AGAIN) from None
            columns = zip(
                header.names, header.dtypes, header.shapes, header.begins.tolist(),
                header.nbytes.tolist(), strict=True,
            )  # fmt: skip
            for tensor, dtype, shape, begin, nbytes in columns:
                if self.weight_map.get(tensor) != name:
                    raise self.fault(f"{called(name)} has {called(tensor)}, and no index says so")
                if dtype != "U8" or len(shape) != 1:
                    raise self.fault(f"{called(tensor)} is not stored as a vector of bytes")
                digest = self._digest(tensor, header.metadata.get(tensor))
                self.frames[tensor] = Frame(position, begin, nbytes, digest)
        for tensor, name in self.weight_map.items():
            if tensor not in self.frames:
                raise self.fault(f"{called(name)} lacks {called(tensor)}, which the index names")

    def _open_packed(self, names: list[str], room: Room) -> None:
        if len(names) != 1:
            raise self.fault(f"is packed, and has {len(names):,} files instead of one")
        try:
            self.packed = PackedFile(os.path.join(self.path, names[0]), room)
        except Damaged as error:
            raise self.fault(str(error)) from None
        except (CheckpointError, OSError) as error:
            text = error.message if isinstance(error, CheckpointError) else str(error)
            raise DeltaError(text, hint=AGAIN) from None
        for tensor in self.packed.where:
            size, digest = self.packed.size(tensor), self.packed.digest(tensor)
            self.frames[tensor] = Frame(0, 0, size, digest)

    def close(self) -> None:
        """Close its files; may be called more than once."""
        files, self.shards = self.shards, []
        for file in files:
            file.close()
        packed, self.packed = self.packed, None
        if packed is not None:
            packed.delta.close()
        self.frames = {}

    def reader(self, frame: Frame) -> Read:
        """What reads a frame's bytes; any thread may use it. OSError passes through.

        Raises DeltaError for a packed version, whose frames are of windows and not of tensors.
        """
        if self.packed is not None:
            raise self.fault(
                "is packed, and tells what changed only together with its base",
                f"make {' or '.join(ENCODINGS)} of it first with ckdiff convert-delta",
            )
        return partial(_part, self.shards[frame.shard].fd, frame)

    def head(self, tensor: str, nbytes: int | None = None) -> FrameHead:
        """The header of a tensor's frame, which holds what one of a tensor of ``nbytes`` has to.

        Raises DeltaError.
        """
        assert self.said is not None
        if self.packed is not None:
            held = self.packed.nbytes(tensor)
            if nbytes not in (None, held):
                raise self.fault(
                    f"{called(tensor)} has {nbytes:,} bytes, and the version changes {held:,}"
                )
            return FrameHead(0, held, 0)
        raw = self.reader(self.frames[tensor])(0, LONGEST_HEADER)
        try:
            return checked_head(self.said.encoding, raw, nbytes)
        except Damaged as error:
            raise self.fault(f"{called(tensor)} {error}") from None

    def check(self, table: TensorTable | None = None) -> None:
        """Raise DeltaError where a delta's frames cannot be right, as far as their headers say;
        with ``table`` also where the base has other tensors.
        """
        sizes: dict[str, int] = {}
        if table is not None:
            sizes = dict(zip(table.names, table.nbytes.tolist(), strict=True))
            fault = None if self.packed is None else self.packed.fault(table)
            if fault is not None:
                raise self.fault(fault, hint="give the checkpoint that the stream begins with")
        for tensor in self.frames:
            if table is not None and tensor not in sizes:
                raise self.fault(
                    f"changes {called(tensor)}, which the base does not have",
                    hint="give the checkpoint that the stream begins with",
                )
            self.head(tensor, sizes.get(tensor))

    def verify(self) -> None:
        """Raise SourceChanged where its files are not what was opened."""
        for file in self.files:
            file.check()

    def fault(self, what: str, hint: str = AGAIN) -> DeltaError:
        """The error for something that is wrong with it."""
        return DeltaError(f"{self.shown}: {what}", hint=hint)

    def _names(self) -> list[str]:
        """The shards of a delta, in their order; raises DeltaError unless they are complete."""
        if self.full:
            return []
        there = sorted(name for name in listed(self.path) if name.endswith(SUFFIX))
        for name in there:
            if shard_numbers(name) is None:
                raise self.fault(f"holds {called(name)}, and readers would take it for a shard")
        wanted = [shard_name(i, len(there)) for i in range(len(there))]
        if there != wanted:
            raise self.fault(
                f"its shards are not numbered without gaps: {called(there[0])} is one of "
                f"{len(there):,}"
            )
        for name in dict.fromkeys(self.weight_map.values()):
            if name not in wanted:
                raise self.fault(f"lacks {called(name)}, which its index names")
        return wanted

    def _digest(self, tensor: str, text: str | None) -> str:
        assert self.said is not None
        found = None if text is None else plain_digest(self.said.checksum, text)
        if found is None:
            raise self.fault(f"has no {self.said.checksum} digest of {called(tensor)}")
        return found


def _part(fd: int, frame: Frame, begin: int, size: int) -> bytes:
    return pread(fd, frame.begin + begin, max(0, min(size, frame.size - begin)))


def listed(path: str) -> list[str]:
    """The names in a directory, without hidden ones. Raises DeltaError."""
    try:
        with os.scandir(path) as entries:
            names = []
            for entry in entries:
                if not entry.name.startswith("."):
                    names.append(entry.name)
                if len(names) > _FOLDERS:
                    raise DeltaError(f"{printable(path)} holds more than {_FOLDERS:,} files")
    except OSError as error:
        raise DeltaError(
            f"cannot look into {printable(path)}: {error.strerror}",
            hint="give the directory that holds weight_v000001 and so on",
        ) from None
    return names
