"""Masks that torch saved. Neither torch nor an unpickler is needed: see formats/pickles.

The bytes of each storage lie uncompressed in a zip. Before a bit is believed, each must have the
size that the tensors say and the checksum that the zip says: ``torch.load`` looks at neither where
it maps a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.formats.pickledvalues import Tensor
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.checkpoints.formats.torcharchive import PICKLE
from ckdiff.checkpoints.formats.ziparchive import Archive, Member
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError
from ckdiff.masks.importing.maskfile import (
    METADATA_LIMIT,
    STEP,
    MaskFile,
    Notes,
    check_number,
    is_shape,
    make_item,
    shown,
)

_IN_MEMORY = 1 << 28  # bytes of a storage that is read in another order than it has
#: dtypes that masks can have, all by the names that numpy has for them too
_KINDS = {
    "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
}  # fmt: skip
_OTHER_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
_NO_MASKS = 'save {"masks": {name: bool tensor}}'


def read_torch(archive: Archive, file: OpenFile) -> MaskFile:
    """The masks of an archive, which is ``file``. Raises CheckpointError."""
    where = archive.where
    # torch can be told to save without checksums, and then there are none at all
    archive.unchecked = not any(member.checksum for member in archive.members.values())
    prefix, content = _content(archive)
    notes = Notes()
    if isinstance(content, dict) and isinstance(content.get("masks"), dict):
        notes = Notes.of(content.get("metadata")).checked(where)
        notes.ours = notes.ours and content.keys() == {"masks", "metadata"}
        content = content["masks"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds no masks with names", hint=_NO_MASKS)
    check_number(where, len(content))
    items, members = [], dict[str, Member]()
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where}: {_label(name)} is no tensor with a name", hint=_NO_MASKS
            )
        member = _storage(archive, prefix, tensor, f"{where}: {shown(name)}")
        members[member.name] = member
        known = tensor.dtype in _KINDS and not tensor.marks
        kind = np.dtype(tensor.dtype).newbyteorder("<") if known else None
        reader = _Reader(archive, member, tensor, f"{where}: {shown(name)}")
        items.append(make_item(where, name, kind, tensor.shape, reader, notes.encoding))
    described = notes.described(where, {item.name for item in items})

    def prove() -> None:  # tensors can share bytes, or use parts of them
        for member in members.values():
            archive.verify(member)

    return MaskFile("torch", items, [file], notes, described, prove=prove)


def _label(name: object) -> str:
    return shown(name) if isinstance(name, str) else "something whose name is not text"


def _content(archive: Archive) -> tuple[str, Any]:
    """The name that all records begin with, and what the pickle holds."""
    pickles = [name for name in archive.members if name.endswith(PICKLE)]
    prefix = pickles[0].removesuffix(PICKLE)
    member = archive.members[pickles[0]]
    if len(pickles) > 1 or "/" in prefix or f"{prefix}/constants.pkl" in archive.members:
        raise archive.wrong(member, "is not what torch.save writes", _NO_MASKS)
    order = archive.members.get(f"{prefix}/byteorder")
    if order is not None and (order.size > 16 or archive.whole(order) != b"little"):
        raise archive.wrong(
            order, "is not little-endian, the only order that ckdiff reads", _NO_MASKS
        )
    if not member.stored or member.size > METADATA_LIMIT:
        raise archive.wrong(member, "is compressed, or too long")
    return prefix, read_pickle(archive.read(member), member.size, archive.where)


def _storage(archive: Archive, prefix: str, tensor: Tensor, where: str) -> Member:
    """The bytes that a tensor is a view of; all that the tensor says is held against them."""
    storage = tensor.storage
    member = archive.members.get(f"{prefix}/data/{storage.key}")
    if member is None:
        raise CheckpointError(f"{where}: its bytes are not in the file", hint="make it again")
    if not member.stored:
        raise archive.wrong(member, "is compressed, as torch.save never writes it")
    size = storage.size * (1 if storage.dtype is None else _width(storage.dtype))
    if size != member.size:
        raise CheckpointError(
            f"{where}: {size:,} bytes are declared and {member.size:,} are there",
            hint="is the file whole? make it again",
        )
    numbers = (tensor.offset, *tensor.strides)
    if not is_shape(tensor.shape) or any(not 0 <= number < 1 << 60 for number in numbers):
        raise CheckpointError(f"{where} has an impossible shape", hint="make it again")
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    elements, has = math.prod(tensor.shape), size // _width(tensor.dtype)
    if elements and (last >= has or elements > has):
        raise CheckpointError(
            f"{where} declares more elements than it holds", hint="save tensor.contiguous()"
        )
    return member


def _width(dtype: str) -> int:
    return np.dtype(dtype).itemsize if dtype in _KINDS else _OTHER_BYTES.get(dtype, 1)


class _Reader:
    """Reads one tensor, in the order of its elements."""

    __slots__ = ("_archive", "_member", "_tensor", "_where")

    def __init__(self, archive: Archive, member: Member, tensor: Tensor, where: str) -> None:
        self._archive, self._member, self._tensor = archive, member, tensor
        self._where = where

    def __call__(self) -> Iterator[bytes]:
        tensor, width = self._tensor, _width(self._tensor.dtype)
        elements = math.prod(tensor.shape)
        if elements and not _in_order(tensor):
            yield from self._ordered(width)
            return
        begin = self._member.begin + tensor.offset * width
        yield from self._archive.read_exactly(begin, elements * width)

    def _ordered(self, width: int) -> Iterator[bytes]:
        """The elements of a transposed tensor, or of another view."""
        size = self._member.size
        if size > _IN_MEMORY:
            raise CheckpointError(
                f"{self._where} is not contiguous and too large to be put in order",
                hint="save tensor.contiguous()",
            )
        raw = bytearray(size)
        at = 0
        for data in self._archive.read_exactly(self._member.begin, size):
            raw[at : at + len(data)] = data
            at += len(data)
        flat = np.frombuffer(raw, f"u{width}", size // width)[self._tensor.offset :]
        # that every element lies inside the storage was shown when the file was opened
        view = np.lib.stride_tricks.as_strided(
            flat, self._tensor.shape, [stride * width for stride in self._tensor.strides]
        )
        for piece in _pieces(view, STEP // width):
            yield piece.tobytes()


def _pieces(view: npt.NDArray[Any], most: int) -> Iterator[npt.NDArray[Any]]:
    """A view in pieces of about ``most`` elements, in the order of its elements."""
    rows = view.shape[0]
    row = view.size // rows
    if row > most and view.ndim > 1:
        for part in view:
            yield from _pieces(part, most)
        return
    step = max(1, most // row)
    for at in range(0, rows, step):
        yield view[at : at + step]


def _in_order(tensor: Tensor) -> bool:
    """Whether the elements lie behind each other; strides of single dimensions do not matter."""
    expected = 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True
