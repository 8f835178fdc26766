"""Kernels that came with the package: machine code for common processors, made when it was built.

An archive holds the kernels for a level, a set of instructions that many processors share. Of those
that are here the best that this processor has is taken, where its kernels were made from the very
sources beside it; in a source tree there are none. Archives are as much to be believed as the
package's own code: whoever can write one can write that.

An archive is a magic number, the size of its index (8 little-endian bytes), the index, and the
kernels it leads to, all but the first two compressed and sealed, so that no bit of them can be
another. The index is JSON: ``sources``, and for each
kernel where it begins and how long it is, counted from the index's end.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ckdiff.kernels import keeping

FOLDER = Path(__file__).with_name("images")
_HEAD = struct.Struct("<16sQ")
_MAGIC = b"ckdiff images 1\n"
_INDEX = "the index"  # under which name it is sealed
_LONGEST = 1 << 20  # bytes of an index: a kernel has some twenty
_AMD_FAST_BMI2 = 25  # the first family of AMD's whose BMI2 does not take a hundred cycles

#: flag in /proc/cpuinfo -> LLVM's feature
_V2 = {"cx16": "cx16", "lahf_lm": "sahf", "popcnt": "popcnt", "pni": "sse3", "sse4_1": "sse4.1",
       "sse4_2": "sse4.2", "ssse3": "ssse3"}  # fmt: skip
_V3 = _V2 | {"abm": "lzcnt", "avx": "avx", "avx2": "avx2", "bmi1": "bmi", "f16c": "f16c",
             "fma": "fma", "movbe": "movbe"}  # fmt: skip
_V3_BMI2 = _V3 | {"bmi2": "bmi2"}
#: what the servers of Intel have since Ice Lake, and of AMD since Zen 4
_V4_VBMI2 = _V3_BMI2 | {
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512vbmi": "avx512vbmi", "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg", "avx512_vpopcntdq": "avx512vpopcntdq",
}  # fmt: skip


class Level(NamedTuple):
    """Instructions that a processor for x86-64 may have."""

    name: str
    features: Mapping[str, str]  #: flag in /proc/cpuinfo -> LLVM's feature

    @property
    def told(self) -> str:
        """What LLVM is told of it."""
        return ",".join(f"+{feature}" for feature in self.features.values())


#: the best first
LEVELS = (
    Level("x86-64-v4-vbmi2", _V4_VBMI2),
    Level("x86-64-v3", _V3_BMI2),
    Level("x86-64-v3-without-bmi2", _V3),
    Level("x86-64-v2", _V2),
)


def find(name: str, kind: str, sources: str) -> bytes | None:
    """The payload of a kernel that came with the package; None where none did for this processor.

    ``sources`` is the digest of what kernels are made from here.
    """
    archive = _archive()
    if archive is None or archive.sources != sources:
        return None
    title = _title(name, kind)
    if title not in archive.places:
        return None
    at, size = archive.places[title]
    try:
        with open(archive.path, "rb", buffering=0) as file:
            packed = keeping.opened(title, os.pread(file.fileno(), size, at))
            return None if packed is None else zlib.decompress(packed)
    except (OSError, zlib.error):
        return None


def write(path: Path, sources: str, payloads: Mapping[tuple[str, str], bytes]) -> None:
    """Make an archive of kernels, by name and kind."""
    places, body = {}, b""
    for (name, kind), payload in sorted(payloads.items()):
        title = _title(name, kind)
        sealed = keeping.sealed(title, zlib.compress(payload, 9))
        places[title] = len(body), len(sealed)
        body += sealed
    listed = json.dumps({"sources": sources, "kernels": places}).encode()
    index = keeping.sealed(_INDEX, zlib.compress(listed, 9))
    path.write_bytes(_HEAD.pack(_MAGIC, len(index)) + index + body)


class _Archive(NamedTuple):
    path: Path
    sources: str
    places: dict[str, tuple[int, int]]  # where in the file, bytes


@cache
def _archive() -> _Archive | None:
    has = processor()
    for level in LEVELS:
        path = FOLDER / level.name
        if has >= level.features.keys() and path.exists():
            return _opened(path)
    return None


def _opened(path: Path) -> _Archive | None:
    """None for what is no archive."""
    try:
        with open(path, "rb") as file:
            magic, size = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC or size > _LONGEST:
                return None
            packed = keeping.opened(_INDEX, file.read(size))
        if packed is None:
            return None
        index = json.loads(zlib.decompress(packed))
        start = _HEAD.size + size
        places = {title: (start + at, size) for title, (at, size) in index["kernels"].items()}
        return _Archive(path, index["sources"], places)
    except (OSError, ValueError, struct.error, zlib.error):
        return None


def _title(name: str, kind: str) -> str:
    return f"{name} {kind}".strip()


@cache
def processor() -> frozenset[str]:
    """The flags of this processor that are worth having; none where it is not for x86-64."""
    if os.uname().machine != "x86_64":
        return frozenset()
    said: dict[str, str] = {}
    for line in first_core().decode("ascii", "replace").splitlines():
        key, _, value = line.partition(":")
        said[key.strip()] = value.strip()
    flags, family = frozenset(said.get("flags", "").split()), said.get("cpu family", "")
    if said.get("vendor_id") == "GenuineIntel" or (
        family.isdecimal() and int(family) >= _AMD_FAST_BMI2
    ):
        return flags
    return flags - {"bmi2"}


def first_core() -> bytes:
    """What /proc/cpuinfo says of the first core; nothing where it says nothing."""
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:
            return file.read(1 << 14).partition(b"\n\n")[0]
    except OSError:
        return b""
