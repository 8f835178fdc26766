"""Files built by hand, byte by byte, for the tests: what no library would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: dtype name, shape, the bytes of the elements
Tensor = tuple[str, tuple[int, ...], bytes]


def safetensors_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, pad: int = 0
) -> bytes:
    """The JSON of a header, without the length before it, followed by ``pad`` spaces."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        end = begin + len(data)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return json.dumps(entries, separators=(",", ":")).encode() + b" " * pad


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    pad: int = 0,
) -> Path:
    """Write ``tensors`` back to back in the given order; nothing is aligned.

    With ``pad`` spaces behind the header, or a tensor of odd size before it, a tensor can be put at
    any byte offset. Nothing is checked: wrong sizes give a wrong file.
    """
    data = b"".join(data for _, _, data in tensors.values())
    return write_raw(path, safetensors_header(tensors, metadata, pad), data)


def write_raw(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"") -> Path:
    """Write the length of ``header``, the header (JSON text or an object), and ``data``."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_index(
    directory: Path,
    weight_map: Mapping[str, Any],
    name: str = "model.safetensors.index.json",
) -> Path:
    """Write the index of a directory of shards."""
    path = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"total_size": 1.5e9}, "weight_map": weight_map}))
    return path


def write_sparse(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
    edits: Mapping[str, Mapping[int, bytes]] | None = None,
) -> Path:
    """Write tensors of dtype, shape and size in bytes that are holes, all zeros, on the disk.

    ``edits`` puts bytes at offsets inside a tensor.
    """
    entries, starts, end = {}, {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        starts[name] = end
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    header = json.dumps(entries).encode()
    write_raw(path, header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + end)
        for name, changes in (edits or {}).items():
            for offset, data in changes.items():
                file.seek(8 + len(header) + starts[name] + offset)
                file.write(data)
    return path
