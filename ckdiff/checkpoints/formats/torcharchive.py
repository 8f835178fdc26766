"""The zip that torch writes: its pickle, read safely, and where in it the elements of tensors are.

Members are stored, not compressed, so that a tensor's bytes lie in the file as they are. All that
a tensor says of its storage is held against the storage's member. The bytes of storages are not
read here; their checksums are, like the file itself, only as good as what wrote them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, Tensor, shown
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.checkpoints.formats.torchlike import refusal
from ckdiff.checkpoints.formats.torchscript import keep_state
from ckdiff.checkpoints.formats.ziparchive import BEGIN, Archive, Member, Read
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable

PICKLE = "/data.pkl"  #: ends the name of the pickle in an archive of torch
#: torch's names of dtypes -> those of safetensors, as far as there are any
TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16",
    "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64",
    "float16": "F16", "half": "F16", "bfloat16": "BF16", "float32": "F32", "float": "F32",
    "float64": "F64", "double": "F64", "complex64": "C64", "cfloat": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_OTHER_BYTES = {"complex128": 16, "complex32": 4, "qint32": 4, "quint4x2": 1}
_MARKS = {"conj": "conjugate", "neg": "negative"}  # what is to be done to the elements yet
_RESOLVED = "resolve_conj().resolve_neg()"
_SMALL_RECORD = 16  # bytes that say the order of bytes, and more
_FURTHEST = 1 << 60
#: torch.save never does, although torch.load reads it
_COMPRESSED = "compressed, as torch.save never writes it"
_UNPACK = "load it with torch and save it again"
_SAVE_AGAIN = "is the file whole? load it with torch and save it again"


@dataclass(slots=True)
class TorchFile:
    """An archive of torch, and what its pickle holds."""

    archive: Archive
    prefix: str  #: with which the names of all its members begin
    content: Any  #: as pickledvalues has it
    script: bool  #: whether it is a TorchScript archive


@dataclass(slots=True)
class Placed:
    """Where a tensor's elements are."""

    dtype: str  #: the safetensors name
    shape: tuple[int, ...]
    begin: int  #: byte of the file at which the first element is
    nbytes: int  #: of the packed elements
    strides: tuple[int, ...] | None  #: in elements; None where they lie packed, in order


def is_torch_zip(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (some 100 bytes) is a zip as torch writes it.

    Members of torch's archives lie in a folder, those of numpy's do not.
    """
    named = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + named]
    return head.startswith(BEGIN) and b"/" in name and not name.endswith(b".npy")


def open_torch_zip(read: Read, size: int, file: str) -> TorchFile:
    """What the torch file of ``size`` bytes that ``read`` gives holds; ``file`` is for messages.

    Nothing is called, and nothing of torch is imported. Raises CheckpointError for all that is no
    whole archive of torch, with the remedy where it is another kind of file.
    """
    where = printable(file)
    head = read(0, min(size, 1024))
    if not head.startswith(BEGIN):
        raise refusal(head, where)
    archive = Archive(read, size, where)
    # torch can be told to save without checksums, and then there are none at all
    archive.unchecked = not any(member.checksum for member in archive.members.values())
    pickles = [name for name in archive.members if name.endswith(PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        what = (
            "is a zip file, but torch did not write it"
            if not pickles
            else "holds two pickles of torch"
        )
        raise CheckpointError(f"{where}: {what}", hint="give a file that torch.save wrote")
    prefix = pickles[0].removesuffix(PICKLE)
    _check_order(archive, prefix)
    member = archive.members[pickles[0]]
    if not member.stored:
        raise archive.wrong(member, f"is {_COMPRESSED}", _UNPACK)
    content = read_pickle(archive.read(member), member.size, where)
    script = f"{prefix}/constants.pkl" in archive.members
    if script:
        keep_state(archive, prefix, content)
    return TorchFile(archive, prefix, content, script)


def _check_order(archive: Archive, prefix: str) -> None:
    order = archive.members.get(f"{prefix}/byteorder")
    if order is None:
        return
    said = archive.whole(order) if order.size <= _SMALL_RECORD else b""
    if said == b"big":
        raise CheckpointError(
            f"{archive.where}: its elements are big-endian",
            hint="load it with torch on this machine, and torch.save it again",
        )
    if said != b"little":
        raise archive.wrong(order, "is not an order of bytes", _SAVE_AGAIN)


def storage_member(opened: TorchFile, tensor: Tensor, where: str) -> Member:
    """The bytes that a tensor is a view of; raises CheckpointError where they are not all there."""
    storage = tensor.storage
    member = opened.archive.members.get(f"{opened.prefix}/data/{storage.key}")
    if member is None:
        raise CheckpointError(f"{where}: its bytes are not in the file", hint=_SAVE_AGAIN)
    check_storage(member, tensor, where)
    return member


def check_storage(member: Member, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError where a member is not the storage that a tensor speaks of."""
    storage = tensor.storage
    if not member.stored:
        raise CheckpointError(f"{where}: its bytes are {_COMPRESSED}", hint=_UNPACK)
    width = 1 if storage.dtype is None else _width(storage.dtype)
    if not 0 <= storage.size < _FURTHEST or storage.size * width != member.size:
        raise CheckpointError(
            f"{where}: its storage has {member.size:,} bytes, not the declared size",
            hint=_SAVE_AGAIN,
        )


def _width(dtype: str) -> int:
    known = TORCH_DTYPES.get(dtype)
    return DTYPES[known].bits // 8 if known else _OTHER_BYTES.get(dtype, 1)


def unsupported(value: Tensor | Record) -> str | None:
    """Why a tensor cannot be compared, or None where it can be."""
    if isinstance(value, Record):
        kind = value.what.qualname
        if kind == "DTensor":
            return "a shard of a DTensor"
        return f"made by {shown(kind, 60)}"
    if value.dtype not in TORCH_DTYPES:
        return f"of dtype {shown(value.dtype, 40)}"
    if value.marks:
        # its own elements are not in the file: of a view that torch had not worked out yet
        how = _MARKS.get(value.marks[0], shown(value.marks[0], 40))
        return f"a view that is not computed yet ({how}); save tensor.{_RESOLVED} of it"
    return None


def plain(value: Any) -> Any:
    """The tensor that a DTensor stands for, if all of it is here; else the value itself."""
    if type(value) is not Record or value.what.qualname != "DTensor":
        return value
    local, spec = value.field("_local_tensor"), value.field("_spec")
    whole = value.args[2] if len(value.args) > 2 else None
    if type(local) is not Tensor or type(spec) is not Record or type(whole) is not tuple:
        return value
    placements = spec.field("placements", ())
    if type(placements) is not tuple or len(placements) > 64:
        return value
    kinds = {p.what.qualname for p in placements if type(p) is Record}
    fits = len(whole) == len(local.shape) and all(
        type(n) is int and n == m for n, m in zip(whole, local.shape, strict=True)
    )
    return local if fits and kinds <= {"Shard", "Replicate", "_StridedShard"} else value


def place(opened: TorchFile, tensor: Tensor, name: str) -> Placed:
    """Where the elements of a supported tensor are; ``name`` is for messages.

    Every element lies inside of the storage's member. Raises CheckpointError otherwise.
    """
    where = f"{opened.archive.where}: {shown(name)}"
    return place_in(storage_member(opened, tensor, where), tensor, where)


def place_in(member: Member, tensor: Tensor, where: str) -> Placed:
    """``place`` in the member that is the storage of a supported tensor."""
    dtype = TORCH_DTYPES[tensor.dtype]
    width = DTYPES[dtype].bits // 8
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if any(not 0 <= number < _FURTHEST for number in numbers):
        raise CheckpointError(f"{where} has an impossible shape", hint=_SAVE_AGAIN)
    elements = math.prod(tensor.shape)
    # a zero dimension does not excuse the others
    if math.prod(max(n, 1) for n in tensor.shape) * width >= _FURTHEST:
        raise CheckpointError(f"{where} has an impossible shape", hint=_SAVE_AGAIN)
    if not elements:
        return Placed(dtype, tensor.shape, member.begin, 0, None)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if (last + 1) * width > member.size:
        raise CheckpointError(f"{where} reaches beyond the end of its storage", hint=_SAVE_AGAIN)
    begin = member.begin + tensor.offset * width
    strides = None if packed(tensor.shape, tensor.strides) else tensor.strides
    return Placed(dtype, tensor.shape, begin, elements * width, strides)


def packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie behind each other; strides of single dimensions do not matter."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True
