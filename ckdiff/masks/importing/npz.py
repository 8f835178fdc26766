"""Masks in a numpy archive, compressed or not. Nothing is ever unpickled, nothing evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.ziparchive import Archive, Member
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError, printable
from ckdiff.masks.exporting.npz import METADATA
from ckdiff.masks.importing.maskfile import (
    METADATA_LIMIT,
    MaskFile,
    Notes,
    Shape,
    check_number,
    is_shape,
    make_item,
    shown,
)

_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 1 << 14  # bytes; what numpy writes for a mask has 118
#: headers are Python literals; the few that masks need are matched, and none is evaluated
_BLANKS = " \t\r\n\f"
_BLANK = r"[ \t\r\n\f]*+"
_NUMBER = r"(?:0|[1-9][0-9]*+)L?"  # Python 2 wrote the L
_FIELD = re.compile(
    rf"{_BLANK}(['\"])(descr|fortran_order|shape)\1{_BLANK}:{_BLANK}"
    rf"(?:(['\"])([<>=|]?[A-Za-z?]{{1,8}}[0-9]{{0,4}})\3|(True|False)|\(([0-9, \t\r\n\fL]*+)\))"
    rf"{_BLANK}(,|$)"
)
_TUPLE = re.compile(
    rf"{_BLANK}|(?:{_BLANK}{_NUMBER}{_BLANK},)+(?:{_BLANK}{_NUMBER})?{_BLANK}",
)
_DTYPE = re.compile(r"[<>=|]?(?:b1|\?|[iu][1248])")


def read_npz(archive: Archive, file: OpenFile) -> MaskFile:
    """The masks of an archive, which is ``file``. Raises CheckpointError."""
    where = archive.where
    notes, found = Notes(), list[tuple[str, np.dtype[Any], Shape, _Reader]]()
    check_number(where, len(archive.members))
    for member in archive.members.values():
        name = member.name.removesuffix(_SUFFIX)
        if not member.name.endswith(_SUFFIX):
            raise archive.wrong(member, "is no array", "an npz of masks holds nothing else")
        dtype, shape, skip = _header(archive, member)
        size = math.prod(shape) * dtype.itemsize
        if member.size != skip + size:
            raise archive.wrong(member, "has another size than its header says")
        if name == METADATA and size <= METADATA_LIMIT:
            notes = _notes(archive, member, skip)
        else:
            found.append((name, dtype, shape, _Reader(archive, member, skip)))
    notes.checked(where)
    items = [
        make_item(where, name, dtype, shape, reader, notes.encoding)
        for name, dtype, shape, reader in found
    ]
    described = notes.described(where, {item.name for item in items})
    return MaskFile("npz", items, [file], notes, described)


def _notes(archive: Archive, member: Member, skip: int) -> Notes:
    try:
        return Notes.parse(archive.whole(member)[skip:])
    except ValueError as error:
        raise archive.wrong(member, f"is not JSON: {printable(str(error))}") from None


def _header(archive: Archive, member: Member) -> tuple[np.dtype[Any], Shape, int]:
    """Type and shape of an array, and the bytes before its elements."""
    begin = archive.head(member, 12)
    wide = begin[6:7] in (b"\2", b"\3")  # their headers may be longer; nothing else differs
    if begin[:6] != _MAGIC or begin[6:8] not in (b"\1\0", b"\2\0", b"\3\0") or len(begin) < 12:
        raise archive.wrong(member, "is not an array that numpy wrote")
    before = 12 if wide else 10
    length = int.from_bytes(begin[8:before], "little")
    if length > min(_HEADER_LIMIT, member.size):
        raise archive.wrong(member, f"has a header of {length:,} bytes, which no mask needs")
    raw = archive.head(member, before + length)[before:]
    fields = _fields(raw.decode("latin-1"))
    if len(raw) < length or fields is None:
        raise archive.wrong(member, "has a header that cannot be read")
    descr, fortran, dims = fields
    if not _DTYPE.fullmatch(descr):
        raise CheckpointError(
            f"{archive.where}: {shown(member.name)} is not a mask: {printable(descr)}",
            hint="masks are bool or uint8 of 0 and 1, or whole numbers called NAME.indices",
        )
    parts = [part.strip().removesuffix("L") for part in dims.split(",") if part.strip()]
    if not _TUPLE.fullmatch(dims) or any(len(part) > 19 for part in parts):
        raise archive.wrong(member, "has an impossible shape")
    shape = tuple(int(part) for part in parts)
    if not is_shape(shape):
        raise archive.wrong(member, "has an impossible shape")
    if fortran == "True" and len(shape) > 1:
        raise archive.wrong(member, "is in Fortran order", "save np.ascontiguousarray of it")
    return np.dtype(descr), shape, before + length


def _fields(text: str) -> tuple[str, str, str] | None:
    """``descr``, ``fortran_order`` and ``shape`` of a header, or None where it is another."""
    text = text.removesuffix("\n").rstrip(" ")
    if not (text.startswith("{") and text.endswith("}")):
        return None
    text, at = text[1:-1].rstrip(_BLANKS), 0
    found: dict[str, str] = {}
    while at < len(text):
        match = _FIELD.match(text, at)
        if match is None or match[2] in found:
            return None
        value = {"descr": match[4], "fortran_order": match[5], "shape": match[6]}[match[2]]
        if value is None:
            return None
        found[match[2]] = value
        at = match.end()
    if len(found) != 3:
        return None
    return found["descr"], found["fortran_order"], found["shape"]


class _Reader:
    """Reads one array, unpacked on the way."""

    __slots__ = ("_archive", "_member", "_skip")

    def __init__(self, archive: Archive, member: Member, skip: int) -> None:
        self._archive, self._member, self._skip = archive, member, skip

    def __call__(self) -> Iterator[bytes]:
        skip = self._skip
        for data in self._archive.read(self._member):
            if skip < len(data):
                yield data[skip:] if skip else data
            skip = max(0, skip - len(data))
