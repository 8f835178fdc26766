"""The manifest: what a finished store says about itself, and how every byte of it is pinned.

It is written last, so that a directory without one is not a store. It names every other file of
the store with its size and XXH3-128 digest, and ends with a digest of itself.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.errors import StoreCorrupt, StoreIncomplete, printable
from ckdiff.writing.placing import MANIFEST
from ckdiff.writing.workdir import FORMAT, SUFFIX

FORMAT_VERSION = 1
TABLE = "tensors.json"
_LARGEST = 1 << 30  # bytes of a manifest that will be read


def dump_json(data: Any) -> bytes:
    """The one JSON spelling that stores use."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # names may hold lone surrogates only in memory; a file never does
    return text.encode("utf-8") + b"\n"


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of ``manifest.json``: the manifest with its own digest as the last key."""
    digest = xxhash.xxh3_128_hexdigest(dump_json(manifest))
    return dump_json(manifest | {"digest": digest})


def read_manifest(root: Path) -> dict[str, Any]:
    """The verified manifest of the store at ``root``.

    Raises StoreIncomplete where there is none, StoreCorrupt where it is damaged or newer.
    """
    shown = printable(str(root))
    try:
        raw = _read(root / MANIFEST)
    except FileNotFoundError:
        raise _no_store(root) from None
    except NotADirectoryError:
        raise StoreIncomplete(f"{shown} is not a mask store but a file") from None
    except OSError as error:
        raise StoreCorrupt(f"cannot read {shown}/{MANIFEST}: {error.strerror}") from error
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(shown) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreCorrupt(f"{shown}/{MANIFEST} is not the manifest of a mask store")
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise _damaged(shown)
    if version > FORMAT_VERSION:
        raise StoreCorrupt(
            f"{shown} is in store format {version!r}, this ckdiff reads up to {FORMAT_VERSION}",
            hint="upgrade ckdiff",
        )
    manifest.pop("digest", None)
    try:
        sealed = seal(manifest)
    except (ValueError, RecursionError):  # NaN, a lone surrogate: nothing that was written here
        raise _damaged(shown) from None
    if raw != sealed:  # which says that the digest is right as well
        raise _damaged(shown)
    return manifest


def _read(path: Path) -> bytes:
    # O_NONBLOCK: something else of that name, such as a named pipe, must not make us wait
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(_LARGEST)


def _damaged(shown: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{shown}/{MANIFEST} is damaged", hint="restore it from a copy, or run the diff again"
    )


def _no_store(root: Path) -> StoreIncomplete:
    shown = printable(str(root))
    root = Path(os.path.abspath(root))  # "." has no name of its own
    if root.name.endswith(SUFFIX) or (root / "journal").is_dir():
        return StoreIncomplete(
            f"{shown} is the rest of a run that did not finish",
            hint="the same command resumes it",
        )
    if not root.exists() and root.with_name(root.name + SUFFIX).is_dir():
        return StoreIncomplete(
            f"there is no store {shown} yet, a run that writes it was stopped or still runs",
            hint="the same command resumes it",
        )
    if shown.startswith("hf:/"):  # pathlib has taken the second slash
        return StoreIncomplete(
            f"hf://{shown[4:].lstrip('/')} is on the hub, and mask stores are on this machine",
            hint="ckdiff diff -o makes one",
        )
    if not root.exists():
        return StoreIncomplete(f"there is no store {shown}", hint="ckdiff diff -o makes one")
    return StoreIncomplete(
        f"{shown} has no {MANIFEST}: it is not a mask store, or not a whole one",
        hint="ckdiff diff -o makes one",
    )
