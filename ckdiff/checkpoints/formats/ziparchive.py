"""A zip as numpy and torch write it, read strictly: one directory, and bytes that agree with it.

A zip says most things twice: sizes, checksums and names are before each member and again in the
directory at the end. Readers that believe one or the other see two different files. Here both must
agree, no two members may share bytes, and a member's bytes must have its size and its checksum.
Nothing of a declared size is allocated, and where the bytes are is the caller's: a file, a part of
one, or a server.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ckdiff.errors import CheckpointError, printable

#: ``read(offset, nbytes)``: the bytes at an offset, fewer only at the end of the file
Read = Callable[[int, int], bytes]

STEP = 1 << 20  #: bytes that are read at a time

_DAMAGED = "is the file whole? make it again"  #: a hint
_PACK_AGAIN = "pack it again as numpy and torch do: neither encrypted nor renamed"
_ENDED = "it ended while it was read"
BEGIN = b"PK\3\4"  #: of a zip with a member
#: bytes of the longest directory: for the most members, with names of a usual length
_DIRECTORY_LIMIT = 1 << 26
_MOST_MEMBERS = (1 << 18) + 64  # three times as many tensors as any model has, and a few records
_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR = struct.Struct("<4sLQL")
_LONGEST_COMMENT = 0xFFFF
_LONGEST_ENTRY = _CENTRAL.size + 3 * 0xFFFF  # bytes, with name, extra fields and comment
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _LATER, _UTF8 = 0x0001, 0x0008, 0x0800  # flags; _LATER: sizes follow the data
_HARMLESS = _LATER | _UTF8 | 0x0006  # and how hard it was compressed
_IN_EXTRA = 0xFFFFFFFF  # a size or an offset that is in the zip64 field
_OTHER_NAME = 0x7075  # an extra field with a second name of the member


@dataclass(slots=True)
class Member:
    """One file in the archive."""

    name: str
    method: int
    checksum: int
    packed: int  #: bytes in the archive
    size: int  #: bytes when unpacked
    begin: int  #: offset in the archive: first of what precedes the data, then of the data

    @property
    def stored(self) -> bool:
        """Whether it is not compressed."""
        return self.method == _STORED


class Archive:
    """The members of a zip, in the order of their names in the directory."""

    def __init__(self, read: Read, size: int, where: str) -> None:
        """Read the directory, and hold it against the members. Raises CheckpointError.

        ``read`` gives the archive's ``size`` bytes; ``where`` names it in messages, as it is.
        """
        self._read = read
        self._size = size
        self.where = where
        self.members: dict[str, Member] = {}
        begin, size, count = self._find_directory()
        self._read_directory(begin, size, count)
        self.unchecked = False  #: whether it is known to have been written without checksums

    # reading

    def read(self, member: Member) -> Iterator[bytes]:
        """All bytes of a member, in pieces of at most STEP; raises CheckpointError.

        At the end, size and checksum are verified.
        """
        checksum, left = 0, member.size
        for data in self._unpacked(member):
            left -= len(data)
            if left < 0:
                break
            checksum = zlib.crc32(data, checksum)
            yield data
        if left:
            raise self.wrong(member, "has another size than the zip says")
        if checksum != member.checksum and not self.unchecked:
            raise self.wrong(member, "fails its checksum")

    def head(self, member: Member, size: int) -> bytes:
        """The first ``size`` bytes of a member, or all; raises CheckpointError."""
        if member.stored:
            return self._pread(member.begin, min(size, member.packed))
        have = b""
        for data in self._unpacked(member, min(size, STEP)):
            have += data
            if len(have) >= size:
                break
        return have[:size]

    def whole(self, member: Member) -> bytes:
        """A member that is known to be small; raises CheckpointError."""
        return b"".join(self.read(member))

    def verify(self, member: Member) -> None:
        """Read a member for nothing but its size and checksum; raises CheckpointError."""
        for _ in self.read(member):
            pass

    def wrong(self, member: Member, what: str, hint: str = _DAMAGED) -> CheckpointError:
        """The error for a member."""
        return self._error(f"{_shown(member.name)} {what}", hint)

    def read_exactly(self, offset: int, size: int) -> Iterator[bytes]:
        """``size`` bytes of the archive from ``offset``, in pieces of at most STEP.

        Raises CheckpointError where it ends before.
        """
        while size:
            data = self._pread(offset, min(size, STEP))
            if not data:
                raise self._error(_ENDED, "run again")
            yield data
            offset += len(data)
            size -= len(data)

    def _pread(self, offset: int, size: int) -> bytes:
        data = self._read(offset, size)
        if len(data) < min(size, self._size - offset):
            raise self._error(_ENDED, "run again")
        return data

    def _unpacked(self, member: Member, step: int = STEP) -> Iterator[bytes]:
        if member.stored:
            yield from self.read_exactly(member.begin, member.packed)
            return
        inflate = zlib.decompressobj(-15)
        try:
            for data in self.read_exactly(member.begin, member.packed):
                while data and not inflate.eof:
                    if piece := inflate.decompress(data, step):
                        yield piece
                    data = inflate.unconsumed_tail
            while not inflate.eof and (piece := inflate.decompress(b"", step)):
                yield piece
        except zlib.error as error:
            reason = printable(str(error))
            raise self.wrong(member, f"cannot be unpacked: {reason}") from None
        if not inflate.eof or inflate.unused_data:
            raise self.wrong(member, "is cut, or more is packed there than it has")

    # the directory

    def _error(self, what: str, hint: str = _DAMAGED) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}", hint=hint)

    def _find_directory(self) -> tuple[int, int, int]:
        """First byte, bytes and members of the directory."""
        length = min(self._size, _LONGEST_COMMENT + _END.size)
        tail = self._pread(self._size - length, length)
        ends, at = [], tail.find(b"PK\5\6")
        while at >= 0:
            if at + _END.size <= len(tail):
                comment = _END.unpack_from(tail, at)[-1]
                if at + _END.size + comment == len(tail):
                    ends.append(at)
            at = tail.find(b"PK\5\6", at + 1)
        if len(ends) != 1:
            what = "the directory at its end is missing" if not ends else "has two directories"
            raise self._error(f"is not a whole zip: {what}")
        _, disk, first, here, count, size, begin, _ = _END.unpack_from(tail, ends[0])
        end = self._size - length + ends[0]
        if (found := self._find_wide(end)) is not None:
            end, wide = found
            narrow = (count, size, begin)
            limits = (0xFFFF, _IN_EXTRA, _IN_EXTRA)
            if any(n not in (w, m) for n, w, m in zip(narrow, wide, limits, strict=True)):
                raise self._error("its two directories disagree")
            here = count = wide[0]
            size, begin = wide[1:]
        if disk or first or here != count or begin + size != end:
            raise self._error("is not a whole zip: something is missing or precedes it")
        if size > _DIRECTORY_LIMIT or count > _MOST_MEMBERS:
            raise self._error(f"a directory of {count:,} members in {size:,} bytes is too long")
        return begin, size, count

    def _find_wide(self, end: int) -> tuple[int, tuple[int, int, int]] | None:
        """What the directory's end for large files says, if there is one before ``end``."""
        at = end - _LOCATOR.size
        raw = self._pread(at, _LOCATOR.size) if at >= 0 else b""
        if raw[:4] != b"PK\6\7":
            return None
        _, disk, begin, disks = _LOCATOR.unpack(raw)
        if disk or disks > 1 or begin + _END64.size != at:
            raise self._error("is not a whole zip: its end for large files makes no sense")
        raw = self._pread(begin, _END64.size)
        sign, length, _, _, disk, first, here, count, size, offset = _END64.unpack(raw)
        if sign != b"PK\6\6" or length != _END64.size - 12 or disk or first or here != count:
            raise self._error("is not a whole zip: its end for large files makes no sense")
        return begin, (count, size, offset)

    def _read_directory(self, begin: int, size: int, count: int) -> None:
        pieces, raw, at = self.read_exactly(begin, size), b"", 0
        starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
        for number in range(count):
            while len(raw) - at < _LONGEST_ENTRY and (more := next(pieces, b"")):
                raw, at = raw[at:] + more, 0
            if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\1\2":
                raise self._error("its directory is damaged")
            member, flags, label, at = self._entry(raw, at)
            if member.name in self.members:
                raise self.wrong(member, "is there twice")
            self.members[member.name] = member
            starts[number] = member.begin
            self._find_data(member, flags, label, begin)
            ends[number] = member.begin + member.packed
        if at != len(raw) or next(pieces, b""):
            raise self._error("its directory is damaged")
        order = np.argsort(starts, kind="stable")
        if (starts[order][1:] < ends[order][:-1]).any():
            raise self._error("two of its members share bytes")

    def _entry(self, raw: bytes, at: int) -> tuple[Member, int, bytes, int]:
        """The directory's entry at ``at``: member, flags, name as it is there; where it ends."""
        (
            _, _, _, flags, method, _, _, checksum, packed, size,
            named, extras, comment, disk, _, _, begin,
        ) = _CENTRAL.unpack_from(raw, at)  # fmt: skip
        at += _CENTRAL.size
        label, extra = raw[at : at + named], raw[at + named : at + named + extras]
        after = at + named + extras + comment
        if after > len(raw) or disk:
            raise self._error("its directory is damaged")
        member = Member(self._name(label, flags), method, checksum, packed, size, begin)
        fields = self._fields(member, extra)
        if _OTHER_NAME in fields:
            raise self.wrong(member, "has a second name", _PACK_AGAIN)
        packed_at_most = [size, packed, begin]
        wide = self._widened(member, packed_at_most, fields)
        member.size, member.packed, member.begin = wide
        if flags & _ENCRYPTED:
            raise self.wrong(member, "is encrypted", _PACK_AGAIN)
        if flags & ~_HARMLESS or method not in (_STORED, _DEFLATED):
            raise self.wrong(member, "is packed in a way that ckdiff does not read", _PACK_AGAIN)
        if member.stored and member.size != member.packed:
            raise self.wrong(member, "is not packed and has two sizes")
        return member, flags, label, after

    def _name(self, label: bytes, flags: int) -> str:
        try:
            # as Python, and so numpy, reads a name that does not say what it is written in
            name = label.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError:
            raise self._error(
                f"a name is not valid UTF-8: {printable(repr(label)[:200])}"
            ) from None
        if "\0" in name:
            raise self._error(f"a name has a NUL in it: {printable(name[:200])}")
        return name

    def _fields(self, member: Member, extra: bytes) -> dict[int, bytes]:
        fields, at = {}, 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            at += 4
            if at + length > len(extra) or kind in fields:
                raise self.wrong(member, "has damaged extra fields")
            fields[kind] = extra[at : at + length]
            at += length
        return fields

    def _widened(self, member: Member, values: list[int], fields: dict[int, bytes]) -> list[int]:
        """Sizes and offset, those that did not fit taken from the field for large files."""
        wide, at, found = fields.get(1, b""), 0, []
        for value in values:
            if value == _IN_EXTRA and fields.get(1) is not None:
                if at + 8 > len(wide):
                    raise self.wrong(member, "has damaged extra fields")
                value = int.from_bytes(wide[at : at + 8], "little")
                at += 8
            if value >= 1 << 62:
                raise self.wrong(member, "has an impossible size")
            found.append(value)
        return found

    def _find_data(self, member: Member, flags: int, label: bytes, limit: int) -> None:
        """Hold what precedes a member's data against the directory, and find the data."""
        if member.begin + _LOCAL.size > limit:
            raise self.wrong(member, "is not where the directory says")
        raw = self._pread(member.begin, _LOCAL.size + len(label) + 64)
        sign, _, flags2, method, _, _, checksum, packed, size, named, extras = _LOCAL.unpack_from(
            raw
        )
        if sign != BEGIN or raw[_LOCAL.size : _LOCAL.size + named] != label:
            raise self.wrong(member, "is not where the directory says")
        begin = member.begin + _LOCAL.size + named + extras
        if _IN_EXTRA in (packed, size):
            at = begin - extras
            fields = self._fields(member, self._pread(at, extras))
            size, packed = self._widened(member, [size, packed], fields)
        told, wanted = (checksum, packed, size), (member.checksum, member.packed, member.size)
        if flags & _LATER:  # the sizes may follow the data, and then are not here
            agree = all(a in (0, b) for a, b in zip(told, wanted, strict=True))
        else:
            agree = told == wanted
        if not agree or flags2 != flags or method != member.method:
            raise self.wrong(member, "is described in two ways")
        if begin + member.packed > limit:
            raise self.wrong(member, "is cut")
        member.begin = begin


def _shown(name: str) -> str:
    """A name of the archive for a message: it may be long."""
    return printable(name if len(name) <= 200 else name[:200] + "...")
