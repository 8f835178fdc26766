"""Companions in an output, and the record by which they are known again.

``ckdiff-copied.json`` lists each with its size and a digest of its bytes. ``--overwrite`` replaces
a companion that is on it and still as it was copied. What a user put there, or has edited since, is
more than a checkpoint, and stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError, SourceChanged, printable
from ckdiff.outputs.companionfiles import Companion
from ckdiff.outputs.companionnames import RECORD, is_companion
from ckdiff.outputs.writing import write_all

_FORMAT, _VERSION = "ckdiff-copied", 1
_LARGEST = 1 << 20  # bytes of a record
_PART = 1 << 20  # bytes that are read at a time
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

#: for each companion its size in bytes, and its digest
Record = Mapping[str, tuple[int, str]]


def write_companions(folder: Path, companions: Sequence[Companion]) -> None:
    """Copy companions into a directory of ours, and note them; without any nothing is written.

    OSError passes through, and what reading them raises: CheckpointError and SourceChanged.
    """
    if not companions:
        return
    noted = {companion.name: _copy(folder / companion.name, companion) for companion in companions}
    record = {"format": _FORMAT, "version": _VERSION, "files": noted}
    _write(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def read_record(folder: str) -> Record | None:
    """What the record in an output says; None where there is none, or what is no record of ours."""
    raw = _content(os.path.join(folder, RECORD), _LARGEST)
    try:
        said = json.loads(raw or b"")
        if (said["format"], said["version"]) != (_FORMAT, _VERSION):
            return None
        found = {name: (noted["size"], noted["xxh3-128"]) for name, noted in said["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    for name, (size, digest) in found.items():
        if not is_companion(name) or type(size) is not int or not isinstance(digest, str):
            return None
    return found


def is_as_copied(path: str, noted: tuple[int, str]) -> bool:
    """Whether a file is, byte for byte, the companion that a record speaks of."""
    size, digest = noted
    found, hashed = 0, xxhash.xxh3_128()
    try:
        with closing(OpenFile.open(path)) as file:
            if file.size != size:
                return False
            while part := os.pread(file.fd, _PART, found):
                found += len(part)
                hashed.update(part)
    except (CheckpointError, OSError):
        return False
    return found == size and hashed.hexdigest() == digest


def _copy(path: Path, companion: Companion) -> dict[str, Any]:
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path, _NEW, 0o666)
    size, hashed = 0, xxhash.xxh3_128()
    try:
        for part in companion.parts():
            size += len(part)
            hashed.update(part)
            write_all(fd, part)
    finally:
        os.close(fd)
    if size != companion.size:
        raise SourceChanged(
            f"{printable(companion.name)} had {companion.size:,} bytes, and {size:,} were read",
            hint="let whatever writes it finish, then run again",
        )
    return {"size": size, "xxh3-128": hashed.hexdigest()}


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, _NEW, 0o666)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def _content(path: str, limit: int) -> bytes | None:
    """All of a small regular file; None for anything else."""
    try:
        with closing(OpenFile.open(path)) as file:
            return os.pread(file.fd, limit, 0) if file.size <= limit else None
    except (CheckpointError, OSError):
        return None
