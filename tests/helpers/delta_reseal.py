"""Deltas taken apart and put together again with all digests right: what a stranger can do."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
import zstandard

PARTS = ["ckdiff.tensors", "ckdiff.heads", "ckdiff.frames"]
MANIFEST, DATA = "ckdiff.manifest", "ckdiff.data"


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


@dataclass
class Loose:
    """A delta in pieces, to be changed at will; ``seal`` puts it together."""

    metadata: dict[str, str]
    manifest: dict[str, Any]
    parts: dict[str, bytes]  #: unpacked
    streams: dict[str, tuple[str, list[int], bytes]]  #: the other tensors: dtype, shape, bytes
    text: bytes | None = None  #: the manifest as text, where it is to be no JSON of its own
    stored: dict[str, bytes] = field(default_factory=dict)  #: parts that are to be stored so
    kept: set[str] = field(default_factory=set)  #: parts whose entry in the manifest is kept

    def copy(self) -> Loose:
        return copy.deepcopy(self)

    @property
    def windows(self) -> int:
        return len(self.parts["ckdiff.frames"]) // 12

    @property
    def tensors(self) -> int:
        return len(self.parts["ckdiff.tensors"]) // 41

    def frames(self) -> list[bytes]:
        """The frames of a packed delta, one for each window."""
        sizes = memoryview(self.parts["ckdiff.frames"])[: 4 * self.windows].cast("I")
        data, at, found = self.streams[DATA][2], 0, []
        for size in sizes:
            found.append(data[at : at + size])
            at += size
        return found

    def set_frames(self, frames: list[bytes]) -> None:
        data = b"".join(frames)
        self.streams[DATA] = "U8", [len(data)], data
        sizes = b"".join(len(frame).to_bytes(4, "little") for frame in frames)
        digests = b"".join(
            (xxhash.xxh3_64_intdigest(frame) if frame else 0).to_bytes(8, "little")
            for frame in frames
        )
        self.parts["ckdiff.frames"] = sizes + digests

    def seal(self, path: Path) -> Path:
        """Write the delta, with the digests that its pieces have."""
        stored = {
            name: zstandard.ZstdCompressor(level=1).compress(data)
            for name, data in self.parts.items()
        } | self.stored
        if self.text is None and isinstance(self.manifest.get("parts"), dict):
            for name, data in self.parts.items():
                if name not in self.kept and name in self.manifest["parts"]:
                    self.manifest["parts"][name] = [len(data), digest(stored[name])]
        text = self.text
        if text is None:
            text = json.dumps(self.manifest, ensure_ascii=False).encode("utf-8", "surrogatepass")
        tensors = dict(self.streams)
        for name, data in [*stored.items(), (MANIFEST, text)]:
            tensors[name] = "U8", [len(data)], data
        entries, at = dict[str, Any](), 0
        for name, (dtype, shape, data) in tensors.items():
            offsets = [at, at + len(data)]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            at += len(data)
        listed = [[n, e["dtype"], e["shape"], e["data_offsets"]] for n, e in entries.items()]
        sealed = {"manifest": digest(text), "entries": digest(json.dumps(listed).encode())}
        header = json.dumps({"__metadata__": self.metadata | sealed} | entries).encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, _, data in tensors.values():
                file.write(data)
        return path


def loosen(path: Path) -> Loose:
    """A delta in pieces."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__")
    data = {
        name: raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
    return Loose(
        metadata,
        json.loads(data[MANIFEST]),
        {name: zstandard.ZstdDecompressor().decompress(data[name]) for name in PARTS},
        {
            name: (entry["dtype"], entry["shape"], data[name])
            for name, entry in header.items()
            if name not in [*PARTS, MANIFEST]
        },
    )
