"""Sealed manifests: read within bounds, and believed only as far as the schema goes.

Where output is written this says whose files a directory holds: what a sealed manifest names.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.outputs.placing import MANIFEST
from ckdiff.stores.schema import FORMAT, FORMAT_VERSION, check_manifest

_LARGEST = 1 << 26  # bytes of a manifest that will be read; 100,000 unpaired tensors have 20 MB
_HEAVIEST = 1 << 28  # bytes that its values may take in memory
_PIECE = 1 << 20
_TIMELINE = "ckdiff-timeline"  # the format of what has a store for each step of a run


def dump_json(data: Any) -> bytes:
    """The one JSON spelling that stores use."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # names may hold lone surrogates only in memory; a file never does
    return text.encode("utf-8") + b"\n"


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of ``manifest.json``: the manifest with its own digest as the last key."""
    digest = xxhash.xxh3_128_hexdigest(dump_json(manifest))
    return dump_json(manifest | {"digest": digest})


def weight(raw: bytes) -> int:
    """About the most memory that the values of a JSON text take, known before they are made."""
    containers = raw.count(b"[") + raw.count(b"{")
    return 2 * len(raw) + 40 * (raw.count(b",") + raw.count(b'"')) + 120 * containers


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object in which no key is there twice. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has one key twice")
    return found


def fits(manifest: bytes) -> bool:
    """Whether a manifest is small enough to be read again."""
    return len(manifest) <= _LARGEST and weight(manifest) <= _HEAVIEST


def read_sealed(root: Path) -> dict[str, Any]:
    """The manifest of the store at ``root``, its digest and every value of it checked.

    Raises StoreCorrupt where it is damaged, newer or makes no sense, and OSError where there is
    none or it cannot be read.
    """
    shown = printable(str(root))
    raw = _read(root / MANIFEST)
    if raw is None or not fits(raw):
        raise _damaged(shown)
    try:
        read = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(shown) from None
    _check_format(read, shown)
    manifest: dict[str, Any] = read
    manifest.pop("digest", None)
    try:
        sealed = seal(manifest)
    except (ValueError, RecursionError):  # NaN, a lone surrogate: nothing that was written here
        raise _damaged(shown) from None
    if raw != sealed:  # which says that the digest is right as well
        raise _damaged(shown)
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise StoreCorrupt(
            f"the manifest of {shown} makes no sense: {error}",
            hint="it was not written by ckdiff: make the store again",
        ) from None
    return manifest


def _check_format(manifest: Any, shown: str) -> None:
    """Raise StoreCorrupt for the manifest of something else, or of a newer format."""
    if isinstance(manifest, dict) and manifest.get("format") == _TIMELINE:
        raise StoreCorrupt(
            f"{shown} is a timeline, not a mask store",
            hint="its stores are masks/step-00001.zarr and so on in it; ckdiff show prints it",
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreCorrupt(f"{shown}/{MANIFEST} is not the manifest of a mask store")
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise _damaged(shown)
    if version > FORMAT_VERSION:
        newer = version if version < 10**6 else "a newer one"
        raise StoreCorrupt(
            f"{shown} is in store format {newer}, but this ckdiff reads only up to "
            f"{FORMAT_VERSION}",
            hint="upgrade ckdiff",
        )


def own_files(root: Path) -> frozenset[str]:
    """The relative paths of all files of the mask store at ``root``, its manifest among them.

    Only the manifest is read: the other files may be damaged, or gone. Raises StoreCorrupt where
    ``root`` has no manifest that ckdiff wrote: then nothing in it is known to be ours.
    """
    try:
        manifest = read_sealed(root)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreCorrupt(
            f"{printable(str(root))} is not known to be a mask store: {MANIFEST}: {why}"
        ) from None
    return frozenset(manifest["objects"]) | {MANIFEST}


def _read(path: Path) -> bytes | None:
    """The bytes of a manifest; None for what is too large, or has a NUL: a hole in a file that is
    only declared to be large, which ckdiff does not read to its end.
    """
    # O_NONBLOCK: something else of that name, such as a named pipe, must not make us wait
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > _LARGEST:
            return None
        raw = bytearray()
        while len(raw) <= _LARGEST and (piece := file.read(_PIECE)):
            if b"\0" in piece:
                return None
            raw += piece
    return bytes(raw) if len(raw) <= _LARGEST else None


def _damaged(shown: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{shown}/{MANIFEST} is damaged", hint="restore it from a copy, or run the diff again"
    )
