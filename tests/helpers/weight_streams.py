"""Streams of weight versions as their description has them, written and read by nothing of ours.

Plain numpy, zstandard, json and the digest libraries; whole tensors in memory.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from support import Tensor, write_raw

#: name -> dtype, shape, bytes
Model = Mapping[str, Tensor]


def _blake3(data: bytes) -> str:
    from blake3 import blake3

    return str(blake3(data).hexdigest())


DIGESTS: dict[str, Callable[[bytes], str]] = {
    "xxh3-128": lambda data: str(xxhash.xxh3_128_hexdigest(data)),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "blake3": _blake3,
}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a file, and its metadata."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", None) or {}
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = entry["dtype"], tuple(entry["shape"]), raw[begin:end]
    return found, metadata


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files in a directory."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_safetensors(path)[0]
    return found


def read_stream(base: Model, stream: Path, target: int) -> dict[str, Tensor]:
    """The model at a version, as an engine makes it of the base."""
    chain: list[tuple[Path, dict[str, str]]] = []
    model, number = dict(base), target
    while number:
        folder = stream / f"weight_v{number:06d}"
        index = folder / "model.safetensors.index.json"
        metadata = json.loads(index.read_text())["metadata"] if index.exists() else {}
        if "delta_encoding" not in metadata:
            model = read_model(folder)
            break
        assert metadata["version"] == f"{number:06d}"
        chain.append((folder, metadata))
        number = int(metadata["base_version"])
    for folder, metadata in reversed(chain):
        _apply(model, folder, metadata)
    return model


def _apply(model: dict[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> None:
    assert set(metadata) == {
        "version", "base_version", "delta_encoding", "compression_format", "checksum_format",
    }  # fmt: skip
    assert metadata["compression_format"] == "zstd"
    shards = sorted(folder.glob("*.safetensors"))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert [path.name for path in shards] == names
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for path in shards:
        tensors, digests = read_safetensors(path)
        assert set(tensors) == {name for name, file in weight_map.items() if file == path.name}
        for name, (kind, shape, frame) in tensors.items():
            assert kind == "U8"
            assert shape == (len(frame),)
            held = zstandard.get_frame_parameters(frame).content_size
            payload = zstandard.ZstdDecompressor().decompress(frame, read_across_frames=False)
            assert held == len(payload)
            assert zstandard.ZstdDecompressor().decompressobj().decompress(frame) == payload
            dtype, dims, old = model[name]
            new = np.frombuffer(old, np.uint8).copy()
            if metadata["delta_encoding"] == "xor":
                new ^= np.frombuffer(payload, np.uint8)
            else:
                count = int.from_bytes(payload[:4], "little")
                places = np.frombuffer(payload, "<u4", count, 4)
                new[places] = np.frombuffer(payload, np.uint8, count, 4 + 4 * count)
            assert DIGESTS[metadata["checksum_format"]](new.tobytes()) == digests[name]
            assert new.tobytes() != old
            model[name] = dtype, dims, new.tobytes()


def write_version(
    stream: Path,
    number: int,
    base: Model,
    tuned: Model,
    *,
    base_version: int | None = None,
    encoding: str = "xor",
    checksum: str = "xxh3-128",
    shards: int = 1,
    level: int = 1,
) -> Path:
    """Write a delta as an engine's trainer does."""
    frames: list[tuple[str, bytes, str]] = []
    for name, (_, _, new) in tuned.items():
        old = base[name][2]
        if new == old:
            continue
        one, other = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
        payload = (one ^ other).tobytes()
        if encoding == "overwrite":
            places = np.flatnonzero(one != other)
            head = np.uint32(len(places)).tobytes() + places.astype("<u4").tobytes()
            payload = head + other[places].tobytes()
        frame = zstandard.ZstdCompressor(level=level).compress(payload)
        frames.append((name, frame, DIGESTS[checksum](new)))
    folder = stream / f"weight_v{number:06d}"
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        mine = frames[i::shards]
        write_shard(folder / file, mine)
        weight_map |= {name: file for name, _, _ in mine}
    metadata = {
        "version": f"{number:06d}",
        "base_version": f"{number - 1 if base_version is None else base_version:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    write_stream_index(folder, metadata, weight_map)
    return folder


def write_shard(path: Path, frames: list[tuple[str, bytes, str]]) -> None:
    """A shard of names, frames and digests."""
    header: dict[str, Any] = {"__metadata__": {name: digest for name, _, digest in frames}}
    at = 0
    for name, frame, _ in frames:
        header[name] = {"dtype": "U8", "shape": [len(frame)],
                        "data_offsets": [at, at + len(frame)]}  # fmt: skip
        at += len(frame)
    write_raw(path, header, b"".join(frame for _, frame, _ in frames))


def write_stream_index(
    folder: Path, metadata: Mapping[str, Any], weight_map: Mapping[str, str]
) -> None:
    """The index of a delta."""
    found = {"metadata": dict(metadata), "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))


def tree_digest(folder: Path) -> dict[str, str]:
    """What a directory holds: names and digests of the files below it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
