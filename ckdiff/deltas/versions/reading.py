"""A stream of weight versions as it lies on the disk: which there are, and what each holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from ckdiff.checkpoints.indexes import SUFFIX, read_index
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.ownheader import pread, read_own_header
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room, index_cost
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.checksums import plain_digest
from ckdiff.deltas.versions.decoding import Read, checked_head
from ckdiff.deltas.versions.form import (
    INDEX_NAME,
    PREFIX,
    Index,
    Said,
    parse_index,
    shard_name,
    shard_numbers,
    version_name,
    version_number,
)
from ckdiff.errors import CheckpointError, DeltaError, printable
from ckdiff.kernels.zstdframes import LONGEST_HEADER, FrameHead
from ckdiff.outputs.ownership import SUFFIX as PARTIAL

_AGAIN = "publish or fetch the version again"
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

    @property
    def full(self) -> bool:
        """Whether it is a checkpoint by itself."""
        return self.said is None

    @property
    def shown(self) -> str:
        """Its path, for messages."""
        return printable(self.path)

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
        if self.full or self.shards or not self.weight_map:
            self._names()
            return
        names = self._names()
        make_room(len(names))
        for position, name in enumerate(names):
            path = os.path.join(self.path, name)
            try:
                file = OpenFile.open(path)
                self.shards.append(file)
                header = read_own_header(file, room, printable(path))
            except (CheckpointError, OSError) as error:
                text = error.message if isinstance(error, CheckpointError) else str(error)
                raise DeltaError(text, hint=_AGAIN) from None
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

    def close(self) -> None:
        """Close its files; may be called more than once."""
        files, self.shards = self.shards, []
        for file in files:
            file.close()
        self.frames = {}

    def reader(self, frame: Frame) -> Read:
        """What reads a frame's bytes; any thread may use it. OSError passes through."""
        return partial(_part, self.shards[frame.shard].fd, frame)

    def head(self, tensor: str, nbytes: int | None = None) -> FrameHead:
        """The header of a tensor's frame, which holds what one of a tensor of ``nbytes`` has to.

        Raises DeltaError.
        """
        assert self.said is not None
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
        for tensor in self.frames:
            if table is not None and tensor not in sizes:
                raise self.fault(
                    f"changes {called(tensor)}, which the base does not have",
                    hint="give the checkpoint that the stream begins with",
                )
            self.head(tensor, sizes.get(tensor))

    def verify(self) -> None:
        """Raise SourceChanged where its files are not what was opened."""
        for file in self.shards:
            file.check()

    def fault(self, what: str, hint: str = _AGAIN) -> DeltaError:
        """The error for something that is wrong with it."""
        return DeltaError(f"{self.shown}: {what}", hint=hint)

    def _names(self) -> list[str]:
        """The shards of a delta, in their order; raises DeltaError unless they are complete."""
        if self.full:
            return []
        there = sorted(name for name in _listed(self.path) if name.endswith(SUFFIX))
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


@dataclass(frozen=True, slots=True)
class Chain:
    """What leads to a version: a full version or none, and deltas, the oldest first."""

    seed: Version | None  #: None where it begins with the local checkpoint
    deltas: list[Version]
    target: int  #: the version that it leads to


class WeightStream:
    """The versions in a directory. A context manager that closes what was opened of them."""

    def __init__(self, path: str, room: Room) -> None:
        self.path, self.room = path, room
        self._found: dict[int, Version] = {}
        names = _listed(path)
        for name in names:
            if not name.startswith(PREFIX):
                raise DeltaError(
                    f"{printable(path)} is not a stream of weight versions: it holds "
                    f"{called(name)}",
                    hint=f"its directories are called {version_name(1)} and so on",
                )
        numbers = (version_number(name) for name in names)
        #: which there are, in order
        self.numbers = sorted(number for number in numbers if number is not None)
        strange = [n for n in names if version_number(n) is None and not n.endswith(PARTIAL)]
        if strange:
            raise DeltaError(
                f"{printable(path)}: {called(strange[0])} is no version's name",
                hint=f"versions are called {version_name(1)} and so on",
            )

    @property
    def newest(self) -> int:
        """The newest version's number; 0 in an empty stream."""
        return self.numbers[-1] if self.numbers else 0

    def __iter__(self) -> Iterator[Version]:
        return (self.version(number) for number in self.numbers)

    def where(self, number: int) -> str:
        """The directory of a version."""
        return os.path.join(self.path, version_name(number))

    def version(self, number: int) -> Version:
        """A version by its number, its index read. Raises DeltaError, also where it is missing."""
        if number not in self._found:
            if number not in self.numbers:
                raise DeltaError(
                    f"{printable(self.path)} has no {version_name(number)}",
                    hint=f"it has {self._range()}",
                )
            self._found[number] = self._read(number)
        return self._found[number]

    def chain(self, target: int | None = None, *, base_version: int = 0) -> Chain:
        """How a checkpoint that is at ``base_version`` gets to ``target``, or to the newest.

        It begins with the newest full version up to there, unless the checkpoint is further.
        Raises DeltaError for links that are missing, or lead elsewhere.
        """
        target = self.newest if target is None else target
        if target == base_version:
            return Chain(None, [], target)
        if target < base_version:
            raise DeltaError(
                f"the checkpoint is at version {base_version}, which is newer than {target}",
                hint="give the checkpoint that the stream begins with",
            )
        deltas: list[Version] = []
        number = target
        while number != base_version:
            if number < base_version:
                raise DeltaError(
                    f"{deltas[-1].shown}: is made from version {number}, and the checkpoint is at "
                    f"version {base_version}, which is not among those that lead to it",
                    hint="give the checkpoint that the stream begins with",
                )
            if number not in self.numbers:
                raise self._missing(number, deltas)
            found = self.version(number)
            if found.said is None:
                return Chain(found, deltas[::-1], target)
            deltas.append(found)
            number = found.said.base_version
        return Chain(None, deltas[::-1], target)

    def close(self) -> None:
        """Close what was opened; may be called more than once."""
        for version in self._found.values():
            version.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, number: int) -> Version:
        return read_version(self.where(number), self.room, number)

    def _missing(self, number: int, deltas: list[Version]) -> DeltaError:
        if not deltas:
            return DeltaError(
                f"{printable(self.path)} has no {version_name(number)}",
                hint=f"it has {self._range()}",
            )
        name = "the checkpoint that the stream begins with" if not number else version_name(number)
        return DeltaError(
            f"{deltas[-1].shown}: is made from {name}, which is missing",
            hint="fetch it, or begin with a full version",
        )

    def _range(self) -> str:
        if not self.numbers:
            return "none"
        return f"{version_name(self.numbers[0])} to {version_name(self.newest)}"


def read_version(path: str, room: Room, number: int | None = None) -> Version:
    """The version in a directory, its index read. ``number`` is the one that its name says.

    Raises DeltaError, also for a full version of which nothing says which it is, and BudgetError.
    """
    index = os.path.join(path, INDEX_NAME)
    check_complete(path)
    found = Index({}, None)
    if os.path.lexists(index):
        try:
            raw = read_index(index)
        except (CheckpointError, ValueError) as error:
            text = error.message if isinstance(error, CheckpointError) else f"{index}: {error}"
            raise DeltaError(printable(text), hint=_AGAIN) from None
        room.take(index_cost(raw), printable(index))
        found = parse_index(raw, index)
    if found.said is None:
        if number is None:
            raise DeltaError(
                f"{printable(path)} does not say which version it is",
                hint=f"versions are called {version_name(1)} and so on",
            )
        return Version(number, path, None, {})
    if number not in (None, found.said.version):
        raise DeltaError(
            f"{printable(index)}: says that it is version {found.said.version}", hint=_AGAIN
        )
    return Version(found.said.version, path, found.said, dict(found.weight_map))


def open_stream(path: str | os.PathLike[str], room: Room | None = None) -> WeightStream:
    """The versions in a directory, by their names; what they hold is read when it is asked for.

    Raises DeltaError, and later BudgetError where tables do not fit into ``room``.
    """
    return WeightStream(os.fspath(path), Room() if room is None else room)


def opened(stack: ExitStack, room: Room, chain: Chain, table: TensorTable) -> None:
    """Open a chain's deltas and check all that their headers say against the base's ``table``."""
    for version in chain.deltas:
        stack.callback(version.close)
        version.open(room)
        version.check(table)


def check_complete(path: str) -> None:
    """Raise DeltaError for a version that is not there to its end, as far as names tell.

    The index comes last. Only a full version in one file, or in files of other names than a
    delta's, can do without.
    """
    if os.path.lexists(os.path.join(path, INDEX_NAME)):
        return
    names = [name for name in _listed(path) if name.endswith(SUFFIX)]
    if not names or any(shard_numbers(name) is not None for name in names):
        raise DeltaError(
            f"{printable(path)} is incomplete: it has no {INDEX_NAME}",
            hint="let whoever writes it finish, or remove it",
        )


def _part(fd: int, frame: Frame, begin: int, size: int) -> bytes:
    return pread(fd, frame.begin + begin, max(0, min(size, frame.size - begin)))


def _listed(path: str) -> list[str]:
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
