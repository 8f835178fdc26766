"""The items of ``.distcp`` files: each is a whole file of torch that holds one tensor.

There are thousands of them in a file, all written alike. So what torch writes for a tensor is read
in two looks, at the beginning and at the end of an item; an item that is written in any other way
is opened like any file of torch, which takes longer and says what is wrong.
"""

from __future__ import annotations

import struct
import zlib
from functools import partial
from typing import NamedTuple

from ckdiff.checkpoints.formats.pickledvalues import Tensor
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.checkpoints.formats.torcharchive import (
    PICKLE,
    Placed,
    open_torch_zip,
    place,
    place_in,
    plain,
    unsupported,
)
from ckdiff.checkpoints.formats.ziparchive import BEGIN, Member
from ckdiff.checkpoints.places.place import Files
from ckdiff.errors import CheckpointError

LOOK = 1 << 10  #: bytes of a look
_MOST_PICKLES = 1 << 10  # different ones that are kept: as many as there are shapes
_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_WIDE_END = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR = struct.Struct("<4sLQL")
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8
_WIDE = 0xFFFFFFFF


class Item(NamedTuple):
    """Where one is."""

    file: int
    offset: int
    length: int


class ItemReader:
    """Finds the tensors of items."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._tensors: dict[bytes, Tensor] = {}  # of pickles: those of equal shapes are equal

    def head(self, item: Item) -> bytes:
        """The first bytes of an item, 16 at least if the file goes on so far."""
        return self._files.read(item.file, item.offset, min(max(item.length, 16), LOOK))

    def place(self, item: Item, head: bytes, where: str) -> Placed:
        """Where the elements of an item's tensor are in its file. Raises CheckpointError.

        ``head`` is what ``head`` gave; ``where`` is how messages name the item.
        """
        head, after = head[: item.length], max(item.length - LOOK, 0)
        tail = head if not after else self._files.read(item.file, item.offset + after, LOOK)
        found = quick_look(head, tail, item.length)
        placed = None if found is None else self._placed(found, where)
        if placed is None:
            placed = self._opened(item, where)
        placed.begin += item.offset
        return placed

    def _placed(self, found: tuple[bytes, Member], where: str) -> Placed | None:
        pickle, member = found
        tensor = self._tensors.get(pickle)
        if tensor is None:
            value = read_pickle([pickle], len(pickle), where)
            if type(value) is not Tensor or value.storage.key != "0" or unsupported(value):
                return None
            if len(self._tensors) == _MOST_PICKLES:
                self._tensors.clear()
            tensor = self._tensors[pickle] = value
        return place_in(member, tensor, where)

    def _opened(self, item: Item, where: str) -> Placed:
        """An item that is not written as usual, opened as a file of torch."""
        read = partial(_within, self._files, item)
        opened = open_torch_zip(read, item.length, where)
        tensor = plain(opened.content)
        if type(tensor) is not Tensor:
            raise CheckpointError(f"{where}: is no tensor", hint="save the checkpoint again")
        reason = unsupported(tensor)
        if reason is not None:
            raise CheckpointError(f"{where}: is {reason}", hint="save it as a plain tensor")
        return place(opened, tensor, "its tensor")


def _within(files: Files, item: Item, offset: int, nbytes: int) -> bytes:
    size = max(0, min(nbytes, item.length - offset))
    return files.read(item.file, item.offset + offset, size) if size else b""


def quick_look(head: bytes, tail: bytes, length: int) -> tuple[bytes, Member] | None:
    """The pickle and the storage of a zip of ``length`` bytes that torch wrote for one tensor.

    ``head`` and ``tail`` are its first and last bytes. None where anything is not as usual: not
    that it is wrong. What is returned is held against itself as much as a directory can be.
    """
    found = _directory(tail, length)
    if found is None:
        return None
    members, limit = found
    name = next((n for n in members if n.endswith(PICKLE)), "")
    prefix = name.removesuffix(PICKLE)
    wanted = [name, f"{prefix}/byteorder", f"{prefix}/data/0"]
    if not name or any(other not in members for other in wanted):
        return None
    ordered = sorted(members.values(), key=lambda member: member.begin)
    ends = [*(member.begin for member in ordered[1:]), limit]
    for member, end in zip(ordered, ends, strict=True):
        if member.begin + _LOCAL.size + len(member.name) + member.size > end:
            return None
        if member.name in wanted:
            begin = _data(head, member)
            if begin is None or begin + member.size > end:
                return None
            member.begin = begin
    pickle, order, storage = (members[other] for other in wanted)
    data = _bytes(head, pickle)
    if data is None or _bytes(head, order) != b"little":
        return None
    return data, storage


def _bytes(head: bytes, member: Member) -> bytes | None:
    """All of a small member, where it is in ``head`` and has its checksum."""
    data = head[member.begin : member.begin + member.size]
    if len(data) != member.size or member.checksum not in (0, zlib.crc32(data)):
        return None  # 0: torch can be told to save without them
    return data


def _data(head: bytes, member: Member) -> int | None:
    """Where a member's data begins, where what precedes it agrees with the directory."""
    label = member.name.encode()
    at = member.begin + _LOCAL.size
    if at + len(label) > len(head):
        return None
    sign, _, flags, method, _, _, checksum, packed, size, named, extras = _LOCAL.unpack_from(
        head, member.begin
    )
    if sign != BEGIN or method or flags & ~_FLAGS or named != len(label):
        return None
    said = (checksum, packed, size)
    told = (member.checksum, member.packed, member.size)
    agree = all(a in (0, b) for a, b in zip(said, told, strict=True))
    if head[at : at + named] != label or not agree:
        return None
    return int(at + named + extras)


def _directory(tail: bytes, length: int) -> tuple[dict[str, Member], int] | None:
    """The members by name, and where the directory begins, if all of it is in ``tail``."""
    before = length - len(tail)
    end = len(tail) - _END.size
    if end < 0:
        return None
    sign, disk, first, here, count, size, begin, comment = _END.unpack_from(tail, end)
    if sign != b"PK\5\6" or disk or first or here != count or comment:
        return None
    wide = end - _LOCATOR.size - _WIDE_END.size
    if wide >= 0 and tail[wide : wide + 4] == b"PK\6\6":
        _, rest, _, _, disk, first, here, more, wsize, wbegin = _WIDE_END.unpack_from(tail, wide)
        locator = _LOCATOR.unpack_from(tail, end - _LOCATOR.size)
        if rest != _WIDE_END.size - 12 or disk or first or here != more or count != more:
            return None
        if locator != (b"PK\6\7", 0, before + wide, 1):
            return None
        if size not in (wsize, _WIDE) or begin not in (wbegin, _WIDE):
            return None
        size, begin, end = wsize, wbegin, wide
    if begin + size != before + end or begin < before:
        return None
    members = _entries(tail[begin - before : end], count)
    return None if members is None else (members, begin)


def _entries(raw: bytes, count: int) -> dict[str, Member] | None:
    members: dict[str, Member] = {}
    at = 0
    while at + _CENTRAL.size <= len(raw):
        (
            sign, _, _, flags, method, _, _, checksum, packed, size,
            named, extras, comment, disk, _, _, begin,
        ) = _CENTRAL.unpack_from(raw, at)  # fmt: skip
        at += _CENTRAL.size
        label = raw[at : at + named]
        at += named
        if sign != b"PK\1\2" or method or flags & ~_FLAGS or packed != size or not label.isascii():
            return None
        if extras or comment or disk or _WIDE in (size, begin) or b"\0" in label:
            return None
        name = label.decode("ascii")
        if name in members:
            return None
        members[name] = Member(name, method, checksum, packed, size, begin)
    return members if at == len(raw) and len(members) == count else None
