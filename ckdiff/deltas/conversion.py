"""Deltas from one encoding to another, by way of what they rebuild.

The tuned checkpoint is rebuilt beside the output, verified, and removed again: encodings cut
tensors differently, and what is in between is never in memory.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from ckdiff.checkpoints.opening import Given, open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas import applying, creating
from ckdiff.deltas.container import Delta
from ckdiff.deltas.delta import is_version
from ckdiff.deltas.outcome import DeltaResult
from ckdiff.deltas.registry import VERSIONED
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.form import Said, version_number
from ckdiff.deltas.versions.given import STREAM, VERSION, kind_of
from ckdiff.deltas.versions.reading import read_version
from ckdiff.deltas.versions.writing import VersionReport, write_version
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.options import (
    Observer,
    Options,
    checked_observer,
    checked_output,
    checked_path,
    checked_text,
)
from ckdiff.outputs.place import Place

_CHECKSUM = "xxh3-128"


def convert_delta(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: Given,
    encoding: str,
    as_version: bool = False,
    key: str | None = None,
    checksum: str | None = None,
    version: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> DeltaResult | VersionReport:
    """Write ``delta``, a file or one version of a stream of weight versions, in another encoding.

    ``base`` is the checkpoint that it was made from, and ``key`` the path of the state dict in a
    base that holds more. ``packed`` and ``indices`` are written to a file. ``xor``, ``overwrite``,
    and ``packed`` with ``as_version`` are written as a version to the stream in the directory
    ``out``. A version keeps its number and its base version; a delta in a file becomes the next
    version, or ``version``. The tuned checkpoint is rebuilt beside ``out`` meanwhile, which needs
    room on the disk. The output appears only when it is complete.

    Raises DeltaError for damage, a wrong base, lossy deltas, full versions and changes that a
    version cannot express, UsageError, CheckpointError, SourceChanged, BudgetError, OutputError,
    Interrupted.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    source, path = checked_path("the delta", delta), checked_output(out)
    versioned = is_version(encoding, as_version=as_version, checksum=checksum)
    _check_options(encoding, versioned, checksum=checksum, version=version, overwrite=overwrite)
    said, name = _source(source, options)
    observer = checked_observer(observer)
    with ExitStack() as stack:
        (given,) = open_all(stack, base, key=key and checked_text("key", key))
        place = Place(path.with_name(f"{path.name}.rebuilt"), directory=True, overwrite=False)
        inside = stack.enter_context(place).path
        rebuilt = _rebuild(given, source, said, inside / (name or "tuned"), options)
        if not versioned:
            return creating.delta(
                given, rebuilt, path, encoding=encoding, overwrite=overwrite, workers=workers,
                memory=memory, observer=observer,
            )  # fmt: skip
        number = version if said is None or version is not None else said.version
        return write_version(
            given, rebuilt, path, encoding=encoding, checksum=checksum or _CHECKSUM,
            number=number, base_version=None if said is None else said.base_version,
            workers=workers, memory=memory, observer=observer,
        )  # fmt: skip


def _check_options(
    encoding: str, versioned: bool, *, checksum: str | None, version: int | None, overwrite: bool
) -> None:
    """Raise UsageError for what means nothing with an encoding."""
    if not versioned and (checksum is not None or version is not None):
        raise UsageError(
            f"checksums and numbers are not for the {encoding} encoding",
            hint=f"they go with {' or '.join(VERSIONED)}",
        )
    if versioned and overwrite:
        raise UsageError("a weight version is never replaced", hint="leave out --overwrite")


def _source(path: str, options: Options) -> tuple[Said | None, str | None]:
    """What a version says of itself, or None of a file; and the name of the file that it rebuilds,
    where that is one. Raises DeltaError and UsageError.
    """
    kind, room = kind_of(path), Room(options.memory)
    if kind == STREAM:
        raise UsageError(
            f"{printable(path)} is a stream of weight versions, not one delta",
            hint="name one of its versions, or make one of several with ckdiff squash",
        )
    if kind == VERSION:
        found = read_version(path, room, version_number(os.path.basename(os.path.abspath(path))))
        if found.said is None:
            raise found.fault("is a full version", "it is a checkpoint: ckdiff delta makes a delta")
        return found.said, None
    with Delta(path, room) as delta:
        if delta.manifest["lossy"] is not None:
            raise DeltaError(
                f"{printable(path)} is lossy, and the result could not say so",
                hint="make it again with --mask and the other encoding",
            )
        return None, None if delta.blueprint.directory else delta.blueprint.files[0].name


def _rebuild(base: Checkpoint, source: str, said: Said | None, out: Path, options: Options) -> Path:
    """The tuned checkpoint, at ``out``."""
    workers, memory = options.workers, options.memory
    if said is None:
        applying.apply(base, source, out, workers=workers, memory=memory, config=False)
    else:
        apply_anew(
            base, [source], out, base_version=said.base_version, workers=workers, memory=memory,
            config=False,
        )  # fmt: skip
    return out
