"""What is signed: a text that follows from every byte of a delta, and from nothing else.

    # ckdiff manifest 1: a delta in a file
    SHA-256  -

    # ckdiff manifest 1: weight version 000007
    SHA-256  model-00000-of-00001.safetensors
    SHA-256  model.safetensors.index.json

The lines are those of ``sha256sum``, which also checks them. A reader makes the text anew from what
it has, and so never reads one that somebody sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.deltas.ownheader import is_delta
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.form import version_name, version_number, version_text
from ckdiff.deltas.versions.given import STREAM, VERSION, kind_of
from ckdiff.deltas.versions.reading import read_version
from ckdiff.errors import CheckpointError, DeltaError, UsageError, printable
from ckdiff.outputs.writing import write_all

FIRST = "# ckdiff manifest 1: "
#: in a version's directory: the names that its own manifest does not cover
MANIFEST, SIGNATURE = "ckdiff.manifest", "ckdiff.manifest.sig"
_FILES, _DEPTH = 1 << 16, 8  # of a version, at most
_COPIED = 1 << 20  # bytes at a time
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def signature_path(path: str) -> str:
    """Where the signature of a delta or a version lies, where nothing else is said."""
    if os.path.isdir(path):
        return os.path.join(path, SIGNATURE)
    return f"{path}.manifest.sig"


def covered(path: str) -> bool:
    """Whether a path is of a weight version, and not of a delta in a file. Raises UsageError for a
    stream, and DeltaError for what is no delta.
    """
    kind = kind_of(path)
    if kind == STREAM:
        raise UsageError(
            f"{printable(path)} is a stream of weight versions, and each of them has its own "
            "signature",
            hint=f"name one of them, such as {printable(os.path.join(path, version_name(1)))}",
        )
    if kind != VERSION and not is_delta(path):
        raise DeltaError(
            f"{printable(path)} is not a delta, and only deltas have signatures",
            hint="ckdiff delta makes them",
        )
    return kind == VERSION


def manifest(path: str, into: Path | None = None) -> tuple[bytes, Path]:
    """The manifest of the delta or the version at ``path``, and where it is.

    With ``into``, a directory, the bytes that were hashed are copied there, and that is where it
    is: names that begin with a dot are not part of it, nor is a manifest with its signature.
    Raises DeltaError for what is neither, CheckpointError, SourceChanged, UsageError; OSError from
    writing passes through.
    """
    if not covered(path):
        copy = None if into is None else into / os.path.basename(os.path.abspath(path))
        line = f"{_digest(path, copy)}  -\n"
        return f"{FIRST}a delta in a file\n{line}".encode(), copy or Path(path)
    folder = os.path.abspath(path)
    number = read_version(folder, Room(), version_number(os.path.basename(folder))).number
    copy = None if into is None else into / version_name(number)
    lines = [f"{FIRST}weight version {version_text(number)}\n"]
    if copy is not None:
        copy.mkdir()
    for name in sorted(_files(folder, "", _DEPTH), key=str.encode):
        target = None if copy is None else copy / name
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"{_digest(os.path.join(folder, name), target)}  {name}\n")
        if len(lines) > _FILES:
            raise DeltaError(f"{printable(path)} holds more than {_FILES:,} files")
    return "".join(lines).encode(), copy or Path(path)


def _files(folder: str, inside: str, depth: int) -> Iterator[str]:
    """The names of all files in a directory, with ``/`` between their parts."""
    here = os.path.join(folder, inside)
    try:
        entries = sorted(os.scandir(here), key=lambda entry: entry.name)
    except OSError as error:
        raise DeltaError(
            f"cannot look into {printable(here)}: {error.strerror}", hint="check who may read it"
        ) from None
    for entry in entries:
        name = entry.name
        folders = entry.is_dir(follow_symlinks=False)
        own = not inside and not folders and name in (MANIFEST, SIGNATURE)
        if name.startswith(".") or own:
            continue
        if not name.isprintable() or "\\" in name:
            raise DeltaError(
                f"{printable(here)} holds {called(name)}, which is not part of the version",
                hint="publish or fetch the version again",
            )
        if not folders:
            yield inside + name
        elif not depth:
            raise DeltaError(f"{printable(here)} has folders in folders, which no version has")
        else:
            yield from _files(folder, f"{inside}{name}/", depth - 1)


def _digest(path: str, copy: Path | None) -> str:
    """The SHA-256 of a file's bytes, which are also written to ``copy``."""
    found, at = hashlib.sha256(), 0
    target = -1 if copy is None else os.open(copy, _NEW, 0o600)
    try:
        with closing(OpenFile.open(path)) as file:
            while data := file.read(at, _COPIED):
                found.update(data)
                at += len(data)
                if target >= 0:
                    write_all(target, data)
            file.check()
            if at != file.size:
                raise CheckpointError(f"{printable(path)}: was cut while it was being read")
    finally:
        if target >= 0:
            os.close(target)
    return found.hexdigest()
