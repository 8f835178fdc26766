"""The form of a stream of weight versions: names, what an index says, the marker of a reader.

    STREAM/weight_v000007/model.safetensors.index.json     says which version, and is written last
                          model-00000-of-00002.safetensors one U8 vector for each changed tensor
    LOCAL/.weight_sync/state.json                          at which version a local checkpoint is
                       lock                                held while it is written

A version is *full*, an ordinary checkpoint, or a *delta* from another one. Everything that is read
is untrusted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ckdiff.checkpoints.formats.strictjson import any_value, key_at, shown, skip_blank, string_map
from ckdiff.checkpoints.halfway import FOLDER, MARKER_NAME
from ckdiff.checkpoints.indexes import INDEX_NAME
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError, DeltaError, UsageError, one_of, printable

__all__ = ["INDEX_NAME", "Index", "Said", "parse_index", "version_name", "version_number"]

XOR, OVERWRITE, PACKED = "xor", "overwrite", "packed"
ENCODINGS = (XOR, OVERWRITE)  #: that engines read
COMPRESSION = "zstd"
CHECKSUMS = ("xxh3-128", "blake3", "adler32")
#: of versions for readers that are ours: a delta as one file, which has digests of its own
OWN_COMPRESSION, CONTENT = "ckdiff-packed", "ckdiff-content"
#: bytes from which on positions in a tensor do not fit 32 bits
TOO_LARGE_TO_OVERWRITE = 1 << 32
#: in a local checkpoint
SYNC_FOLDER, MARKER, LOCK = FOLDER, f"{FOLDER}/{MARKER_NAME}", f"{FOLDER}/lock"
PREFIX = "weight_v"
MOST_VERSION = 10**9 - 1

_FOLDER = re.compile(rf"{PREFIX}([0-9]{{6,9}})", re.ASCII)
_SHARD = re.compile(r"model-([0-9]{5,9})-of-([0-9]{5,9})\.safetensors", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_KEYS = ("version", "base_version", "delta_encoding", "compression_format", "checksum_format")
_SMALL = 1 << 12  # bytes of a marker that are read
_AGAIN = "publish or fetch the version again"


def check_encoding(name: str) -> None:
    """Raise UsageError for what weight versions are not written in."""
    known = (*ENCODINGS, PACKED)
    if name not in known:
        raise UsageError(
            f"there is no encoding {printable(str(name))!r} of weight versions",
            hint=one_of(str(name), known),
        )


def version_text(number: int) -> str:
    """A version's number as the index, the marker and people have it."""
    return f"{number:06d}"


def version_name(number: int) -> str:
    """The directory of a version."""
    return PREFIX + version_text(number)


def version_number(name: str) -> int | None:
    """Which version a directory of this name is; None for no version's name."""
    match = _FOLDER.fullmatch(name)
    number = int(match[1]) if match else 0
    return number if number and name == version_name(number) else None


def shard_name(position: int, count: int) -> str:
    """The name of a delta's shard; they are counted from 0."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def shard_numbers(name: str) -> tuple[int, int] | None:
    """The position of a shard of this name, and how many there are; None for another name."""
    match = _SHARD.fullmatch(name)
    if match is None or shard_name(int(match[1]), int(match[2])) != name:
        return None
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class Said:
    """What the index of a delta says of it."""

    version: int
    base_version: int
    encoding: str  #: one of ENCODINGS, or PACKED
    checksum: str  #: one of CHECKSUMS, or of a packed one CONTENT

    def to_metadata(self) -> dict[str, str]:
        """As the index has it."""
        compression = OWN_COMPRESSION if self.encoding == PACKED else COMPRESSION
        values = (
            version_text(self.version), version_text(self.base_version), self.encoding,
            compression, self.checksum,
        )  # fmt: skip
        return dict(zip(_KEYS, values, strict=True))


@dataclass(frozen=True, slots=True)
class Index:
    """An index: which tensors are in which files, and of a delta what it says of itself."""

    weight_map: Mapping[str, str]
    said: Said | None  #: None of a full version


def index_bytes(said: Said, weight_map: Mapping[str, str]) -> bytes:
    """The index of a delta."""
    found = {"metadata": said.to_metadata(), "weight_map": dict(weight_map)}
    return (json.dumps(found, indent=2) + "\n").encode()


def parse_index(raw: bytes, path: str) -> Index:
    """Read the index at ``path``, of a delta or of a full version. Raises DeltaError."""
    try:
        found = _members(raw)
        metadata, weight_map = found.get("metadata"), found.get("weight_map")
        if weight_map is None:
            raise ValueError("has no weight_map")
        if not isinstance(metadata, dict) or "delta_encoding" not in metadata:
            return Index(weight_map, None)
        return Index(weight_map, _said(metadata))
    except ValueError as error:
        raise DeltaError(f"{printable(path)}: {error}", hint=_AGAIN) from None


def _members(raw: bytes) -> dict[str, Any]:
    """The members of an object that we look at; ValueError for what is ambiguous."""
    pos = skip_blank(raw, 0)
    if raw[pos : pos + 1] != b"{":
        raise ValueError("does not begin with '{'")
    pos = skip_blank(raw, pos + 1)
    found: dict[str, Any] = {}
    mark = b"," if raw[pos : pos + 1] != b"}" else b"}"
    pos += mark == b"}"
    while mark == b",":
        key, pos = key_at(raw, pos)
        if key in found:
            raise ValueError(f"duplicate key {shown(key)}")
        if key == "weight_map":
            found[key], pos = string_map(raw, pos)
        else:
            found[key], pos = any_value(raw, pos, whole_numbers=False)
        pos = skip_blank(raw, pos)
        mark = raw[pos : pos + 1]
        if mark not in (b",", b"}"):
            raise ValueError(f"',' or '}}' expected at byte {pos}")
        pos += 1
    if skip_blank(raw, pos) != len(raw):
        raise ValueError(f"goes on after its closing '}}' at byte {pos}")
    return found


def _said(metadata: Mapping[str, Any]) -> Said:
    """What a delta's metadata says; ValueError where it is not what the format has."""
    for key in _KEYS:
        if not isinstance(metadata.get(key), str):
            raise ValueError(f"has no {key} in its metadata")
    packed = metadata["compression_format"] == OWN_COMPRESSION
    allowed = {
        "compression_format": (COMPRESSION, OWN_COMPRESSION),
        "delta_encoding": (PACKED,) if packed else ENCODINGS,
        "checksum_format": (CONTENT,) if packed else CHECKSUMS,
    }
    for key, values in allowed.items():
        if metadata[key] not in values:
            raise ValueError(
                f"has the {key} {shown(metadata[key])}, which is none of {', '.join(values)}"
            )
    for key in ("version", "base_version"):
        if not _NUMBER.fullmatch(metadata[key]):
            raise ValueError(f"has the {key} {shown(metadata[key])}, which is not a number")
    version, base = int(metadata["version"]), int(metadata["base_version"])
    if not 0 <= base < version:
        raise ValueError(f"is version {version} made from version {base}, which is not before it")
    return Said(version, base, metadata["delta_encoding"], metadata["checksum_format"])


def marker_bytes(number: int) -> bytes:
    """The marker of a local checkpoint that is at a version."""
    return json.dumps({"version": version_text(number)}).encode()


def read_marker(directory: str) -> int | None:
    """At which version a local checkpoint says that it is; None without a marker.

    Raises DeltaError for a marker that cannot be read.
    """
    path = os.path.join(directory, *MARKER.split("/"))
    if not os.path.lexists(path):
        return None
    try:
        with closing(OpenFile.open(path)) as file:
            raw = os.pread(file.fd, _SMALL, 0)
        found, _ = any_value(raw, skip_blank(raw, 0), whole_numbers=True)
        text = found.get("version") if isinstance(found, dict) else None
        if not isinstance(text, str) or not _NUMBER.fullmatch(text):
            raise ValueError("says no version")
    except (ValueError, OSError, CheckpointError) as error:
        what = error.message if isinstance(error, CheckpointError) else f"{path}: {error}"
        hint = "remove it: then the checkpoint counts as the base"
        raise DeltaError(printable(what), hint=hint) from None
    return int(text)
