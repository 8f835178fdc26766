"""What a path is that is given where a mask store or a delta is wanted."""

from __future__ import annotations

import os

from ckdiff.checkpoints.explaining import DELTA, LISTED, MASKS, made_here
from ckdiff.checkpoints.formats.safetensors import read_header
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.weights import METADATA, has_weights
from ckdiff.errors import CheckpointError

_CHECKPOINT = "is a checkpoint", "`ckdiff diff BASE TUNED -o STORE` makes a store of two of them"


def seen_instead(path: str) -> tuple[str, str] | None:
    """What a path is that is given where a mask store or a delta is wanted, and what to do; None
    where it is nothing that is known. Opens little, and raises nothing.
    """
    try:
        return _in_directory(path) if os.path.isdir(path) else _in_file(path)
    except (CheckpointError, OSError, ValueError):
        return None


def _in_directory(path: str) -> tuple[str, str] | None:
    with os.scandir(path) as entries:
        names = [entry.name for entry, _ in zip(entries, range(LISTED), strict=False)]
    if (made := made_here(names)) is not None:
        return made
    if not names:
        return "is an empty directory", "if it is a stream, nothing was published to it yet"
    return _CHECKPOINT if METADATA in names or has_weights(names) else None


def _in_file(path: str) -> tuple[str, str] | None:
    file = OpenFile.open(path)
    try:
        first = os.pread(file.fd, 1 << 12, 0)
        if first[:4] == b"PK\x03\x04":
            return "is a zip, perhaps a torch file", "`ckdiff info` says what it is"
        metadata = read_header(file.fd, file.size, path).metadata
    finally:
        file.close()
    kind = metadata.get("format")
    if kind == DELTA:
        return "is a delta", "`ckdiff info` prints it; `ckdiff apply BASE DELTA -o OUT` applies it"
    if kind == MASKS:
        return "holds exported masks", "`ckdiff import` makes a store of it"
    return _CHECKPOINT
