"""The door to deltas: two checkpoints -> one in a file, or the next version of a stream."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from ckdiff.checkpoints.opening import Given, open_all
from ckdiff.deltas import creating
from ckdiff.deltas.outcome import DeltaResult
from ckdiff.deltas.registry import AS_VERSION, ENCODINGS, VERSIONED
from ckdiff.errors import UsageError, one_of, printable
from ckdiff.options import Observer, checked_text
from ckdiff.rules import Rule
from ckdiff.stores.maskstore import MaskStore

if TYPE_CHECKING:
    from ckdiff.deltas.versions.outcome import VersionReport

_CHECKSUM = "xxh3-128"  # what a version has where nothing is asked for


class DeltaOptions(TypedDict, total=False):
    """What ``delta`` takes besides its encoding."""

    mask: str | os.PathLike[str] | MaskStore | None
    rule: str | Rule | None
    key: str | None
    checksum: str | None
    version: int | None
    full: bool
    full_when_needed: bool
    overwrite: bool
    workers: int | None
    memory: str | int | None
    observer: Observer | None


@overload
def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    encoding: Literal["packed", "indices"] = ...,
    as_version: Literal[False] = ...,
    **options: Unpack[DeltaOptions],
) -> DeltaResult: ...
@overload
def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    encoding: Literal["xor", "overwrite"],
    as_version: bool = ...,
    **options: Unpack[DeltaOptions],
) -> VersionReport: ...
@overload
def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    encoding: Literal["packed"] = ...,
    as_version: Literal[True],
    **options: Unpack[DeltaOptions],
) -> VersionReport: ...
@overload
def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    encoding: str,
    as_version: bool = ...,
    **options: Unpack[DeltaOptions],
) -> DeltaResult | VersionReport: ...
def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    mask: str | os.PathLike[str] | MaskStore | None = None,
    rule: str | Rule | None = None,
    encoding: str = "packed",
    as_version: bool = False,
    key: str | None = None,
    checksum: str | None = None,
    version: int | None = None,
    full: bool = False,
    full_when_needed: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> DeltaResult | VersionReport:
    """Write everything that is needed to rebuild ``tuned`` from ``base``, bit for bit, to ``out``.

    It needs one pass over both, in bounded memory. The output appears only when it is complete.
    ``key`` is the path of the state dict in torch files that hold more. ``overwrite`` replaces an
    existing delta.

    ``encoding="packed"`` (the smallest) and ``"indices"`` (safetensors with positions and values,
    for other tools) write one file. If the tuned side has no safetensors files (weights in memory
    or in another format), the rebuilt file is the ``model.safetensors`` that the safetensors
    library would write, in a directory if either side is one. With ``mask``, a mask store, the
    delta has only the elements that it marks, and says that it is lossy.

    ``encoding="xor"`` and ``"overwrite"`` write the next weight version, or number ``version``, of
    the stream in the directory ``out``, for inference engines. ``base`` must be what the newest
    version leads to. ``checksum`` is ``xxh3-128``, ``blake3`` or ``adler32``. ``full`` writes all
    of ``tuned`` with its config files; ``full_when_needed`` does so if a delta cannot express the
    change. ``as_version`` writes ``packed`` as a version: the smallest, but engines cannot read it.

    Raises UsageError, CheckpointError, SourceChanged, BudgetError, StoreError, PairingError,
    DeltaError, OutputError and Interrupted.
    """
    flags = {"full": full, "full_when_needed": full_when_needed}
    of_versions = {"checksum": checksum, "version": version, **flags}
    versioned = is_version(encoding, as_version=as_version, checksum=checksum)
    _check(encoding, versioned, of_versions, mask=mask, rule=rule, overwrite=overwrite)
    with ExitStack() as stack:
        if key is not None:
            base, tuned = open_all(stack, base, tuned, key=checked_text("key", key))
        if versioned:
            # which imports more than all the rest
            from ckdiff.deltas.versions.writing import write_version

            return write_version(
                base, tuned, out, encoding=encoding, checksum=checksum or _CHECKSUM, number=version,
                full=full, full_when_needed=full_when_needed, workers=workers, memory=memory,
                observer=observer,
            )  # fmt: skip
        return creating.delta(
            base, tuned, out, mask=mask, rule=rule, encoding=encoding, overwrite=overwrite,
            workers=workers, memory=memory, observer=observer,
        )  # fmt: skip


def is_version(encoding: str, *, as_version: bool, checksum: str | None) -> bool:
    """Whether a delta is to be a weight version. Raises UsageError for what cannot be one."""
    if checked_text("encoding", encoding) in VERSIONED:
        return True
    _check_encoding(encoding)
    if not as_version:
        return False
    if encoding != AS_VERSION:
        raise UsageError(
            f"a weight version cannot have the {encoding} encoding",
            hint=f"it has {AS_VERSION} or {' or '.join(VERSIONED)}",
        )
    if checksum is not None:
        raise UsageError(f"{AS_VERSION} has digests of its own", hint="leave out the checksum")
    return True


def _check(
    encoding: str, versioned: bool, of_versions: Mapping[str, object], **of_files: object
) -> None:  # fmt: skip
    """Raise UsageError for options of the other kind."""
    if versioned:
        _refuse(of_files, "weight versions", f"with {' or '.join(ENCODINGS)}")
    else:
        _refuse(of_versions, f"the {encoding} encoding", f"with {' or '.join(VERSIONED)}")


def _check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        hint = one_of(encoding, [*ENCODINGS, *VERSIONED])
        raise UsageError(f"there is no encoding {printable(encoding)!r}", hint=hint)


def _refuse(given: Mapping[str, object], what: str, where: str) -> None:
    """Raise UsageError for an option that means nothing here."""
    for name, value in given.items():
        if value is not None and value is not False:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is not for {what}", hint=f"it goes {where}")
