"""Mask files built by hand, byte by byte, for the tests: what no library would write."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import ckdiff

_EPOCH = (1980, 1, 1, 0, 0, 0)


def npy(values: npt.NDArray[Any]) -> bytes:
    """An array as numpy saves it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npy_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    """An array whose header says whatever is wanted."""
    raw = text.encode("latin-1")
    length = len(raw).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + raw + data


@dataclass
class Entry:
    """A member of a zip; each number can be a lie, in the directory or before the data."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    extra: bytes = b""
    size: int | None = None  #: where it is not that of the data
    packed: int | None = None
    checksum: int | None = None
    local: Mapping[str, Any] | None = None  #: what is different before the data
    offset: int | None = None


def zip_bytes(entries: Sequence[Entry], *, before: bytes = b"", comment: bytes = b"") -> bytes:
    """An archive; nothing is checked."""
    out, directory = bytearray(before), bytearray()
    for entry in entries:
        body = entry.data
        if entry.method == 8:
            deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
            body = deflate.compress(entry.data) + deflate.flush()
        told: dict[str, Any] = {
            "name": entry.name,
            "flags": entry.flags,
            "method": entry.method,
            "checksum": zlib.crc32(entry.data) if entry.checksum is None else entry.checksum,
            "packed": len(body) if entry.packed is None else entry.packed,
            "size": len(entry.data) if entry.size is None else entry.size,
            "extra": entry.extra,
        }
        offset = len(out) if entry.offset is None else entry.offset
        before_data = told | dict(entry.local or {})
        out += _fixed(b"PK\3\4" + b"\x14\0", before_data)
        out += before_data["name"] + before_data["extra"] + body
        directory += _fixed(b"PK\1\2" + b"\x14\0\x14\0", told)
        directory += struct.pack("<HHHLL", 0, 0, 0, 0, offset) + told["name"] + told["extra"]
    end = struct.pack(
        "<4sHHHHLLH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(out),
        len(comment),
    )  # fmt: skip
    return bytes(out + directory + end + comment)


def _fixed(begin: bytes, told: Mapping[str, Any]) -> bytes:
    return begin + struct.pack(
        "<HHHHLLLHH", told["flags"], told["method"], 0, 33, told["checksum"], told["packed"],
        told["size"], len(told["name"]), len(told["extra"]),
    )  # fmt: skip


def npz_bytes(
    masks: Mapping[str, npt.NDArray[Any]], metadata: Any = None, method: int = 0
) -> bytes:
    """An archive as numpy writes it, with metadata as an export has it."""
    buffer = io.BytesIO()
    arrays = {name: npy(mask) for name, mask in masks.items()}
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        arrays["__metadata__"] = npy(np.frombuffer(raw, np.uint8))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), data, method)
    return buffer.getvalue()


def torch_bytes(
    pickle: bytes, storages: Mapping[str, bytes], method: int = 0, order: bytes = b"little"
) -> bytes:
    """An archive as torch writes it; ``method`` is of the storages."""
    records = {"data.pkl": pickle, "byteorder": order, "version": b"3\n"}
    entries = [Entry(f"archive/{name}".encode(), data) for name, data in records.items()]
    entries += [Entry(f"archive/data/{k}".encode(), v, method) for k, v in storages.items()]
    return zip_bytes(entries)


def text(value: str) -> bytes:
    """A text as a pickle has it."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    """A whole number as a pickle has it."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values: Sequence[int]) -> bytes:
    """A tuple of whole numbers as a pickle has it."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str, size: int, shape: Sequence[int], strides: Sequence[int] | None = None,
    offset: int = 0, storage: str = "BoolStorage",
) -> bytes:  # fmt: skip
    """A tensor as a pickle of torch has it."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape))]
    kind = b"ctorch\n" + storage.encode() + b"\n"
    place = b"(" + text("storage") + kind + text(key) + text("cpu") + number(size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    view = place + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"


def mapping(items: Mapping[str, bytes]) -> bytes:
    """A dict as a pickle has it."""
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def pickled(content: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\2" + content + b"."


def notes(tensors: Mapping[str, Any], **changes: str) -> dict[str, str]:
    """Metadata as an export writes it; of each tensor dtype and shape."""
    told = {"format": "ckdiff-masks", "encoding": "bool", "polarity": "1 = changed"}
    return told | {"rule": "exact", "tensors": json.dumps(tensors)} | changes


def refused(path: Path, out: Path) -> str:
    """What an import that must fail says; it must leave nothing."""
    try:
        ckdiff.import_masks(path, out)
    except ckdiff.CkdiffError as error:
        assert not out.exists()
        assert not out.with_name(out.name + ".ckdiff-partial").exists()
        line = error.one_line()
        assert "\n" not in line
        assert len(line) < 1000
        return line
    raise AssertionError("it was imported")
