"""The door to applying: a base and deltas in files, or weight versions -> a new checkpoint, or
the base changed where it lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypedDict

from ckdiff.checkpoints.opening import open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas import applying, finding
from ckdiff.deltas.inplace import apply_deltas_in_place
from ckdiff.deltas.outcome import ApplyResult
from ckdiff.deltas.signing.chosen import signers_of, verified
from ckdiff.deltas.signing.inplace import verified_in_place
from ckdiff.deltas.versions import inplace
from ckdiff.deltas.versions.applying import apply_anew, at_version
from ckdiff.deltas.versions.given import kind_of
from ckdiff.deltas.versions.inplace import AppliedInPlace
from ckdiff.deltas.versions.lock import WAIT
from ckdiff.errors import UsageError, printable
from ckdiff.options import Observer, checked_observer, checked_output, checked_path, checked_text

DeltaPath = str | os.PathLike[str]


class _Rest(TypedDict):
    """What all ways to a new checkpoint take."""

    overwrite: bool
    workers: int | None
    memory: str | int | None
    config_from: str | os.PathLike[str] | None
    config: bool
    observer: Observer | None


def apply(
    base: str | os.PathLike[str] | Checkpoint,
    deltas: DeltaPath | Sequence[DeltaPath],
    out: str | os.PathLike[str],
    *,
    target: int | None = None,
    base_version: int | None = None,
    key: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    config_from: str | os.PathLike[str] | None = None,
    config: bool = True,
    find_base: bool = False,
    verify_signature: str | os.PathLike[str] | None = None,
    signature: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
) -> ApplyResult:
    """Rebuild the checkpoint that ``deltas`` lead to from ``base``, one delta after the other.

    It needs one pass, in bounded memory. The base and the result are verified on the way, and
    nothing is kept unless both are what the deltas say. ``key`` is the path of the state dict in a
    base that holds more.

    If the tuned side was safetensors, the result has the same files, byte for byte; otherwise it is
    one ``model.safetensors``. ``out`` is a file if the tuned side was one, unless ``out`` ends with
    a slash or is a directory. A directory gets copies of the base's config and tokenizer files, or
    of those in ``config_from``, unless ``config`` is False.

    ``deltas`` may also be a stream of weight versions (applied up to version ``target`` or the
    newest), or some of its versions. Then the result is an AppliedVersions. ``base_version`` is the
    version of the base, if it has no marker and is not what the stream begins with.

    With ``find_base``, ``base`` is a directory to search for the checkpoint that the first delta
    was made from. Its hashes tell which one it is.

    With ``verify_signature``, a file of public keys, one of these keys must have signed each delta
    or version, in ``signature`` or the file beside it. A verified copy is used, which needs room
    beside ``out`` meanwhile.

    Raises DeltaError for a damaged delta and for a wrong base, UsageError, CheckpointError,
    SourceChanged, BudgetError, OutputError and Interrupted.
    """
    paths = _paths(deltas)
    rest: _Rest = {
        "overwrite": overwrite, "workers": workers, "memory": memory, "config_from": config_from,
        "config": config, "observer": observer,
    }  # fmt: skip
    if find_base:
        base = finding.find_base(base, paths, checked_observer(observer), workers, memory)
    signers = signers_of(verify_signature, signature)
    if key is not None or signers is not None:
        with ExitStack() as stack:
            (opened,) = open_all(stack, base, key=key and checked_text("key", key))
            if signers is not None and paths:
                if are_versions(paths):
                    base_version = at_version(opened, base_version)
                copies = verified(signers, paths, checked_output(out), target, base_version or 0)
                paths, target = stack.enter_context(copies)
            return apply(opened, paths, out, target=target, base_version=base_version, **rest)
    if are_versions(paths):
        return apply_anew(base, paths, out, target=target, base_version=base_version, **rest)
    _check_unasked(target, base_version)
    return applying.apply(base, paths, out, **rest)


def apply_in_place(
    local: DeltaPath,
    deltas: DeltaPath | Sequence[DeltaPath] = (),
    *,
    target: int | None = None,
    base_version: int | None = None,
    verify_signature: str | os.PathLike[str] | None = None,
    signature: str | os.PathLike[str] | None = None,
    undo: bool = False,
    wait: float = WAIT,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> AppliedInPlace:
    """Change the checkpoint in the directory ``local`` in place to what ``deltas`` lead to.

    An unfinished change is finished first. Nothing changes unless the whole chain is valid, and the
    checkpoint has no marker while it changes. If another process holds the lock, the call waits up
    to ``wait`` seconds.

    ``deltas`` is a stream of weight versions (applied up to version ``target`` or the newest), or
    all version directories that lead there. Without a marker the checkpoint is at ``base_version``,
    or 0. A full version and the deltas after it are made aside, and then replace the files of the
    checkpoint. ``deltas`` may also be a chain of deltas in files. Then each tensor must keep its
    place, and afterwards the checkpoint is at no version. ``verify_signature`` and ``signature``
    are as in ``apply``.

    With ``undo``, which takes no deltas, an unfinished change is taken back instead. A checkpoint
    that is whole stays as it is.

    Raises DeltaError for a chain that does not lead there, damaged deltas and a wrong base;
    OutputError for links, files that others share or that may not be written, tensors at another
    place, a lock that is held, and a full disk; UsageError, CheckpointError, SourceChanged,
    BudgetError, Interrupted.
    """
    paths = _paths(deltas)
    if undo:
        _check_alone(paths, target, base_version, verify_signature, signature)
        return inplace.recover(
            local, undo=True, wait=wait, workers=workers, memory=memory, observer=observer
        )
    signers = signers_of(verify_signature, signature)
    if signers is not None and paths:
        with verified_in_place(signers, local, paths, target, base_version) as (used, last):
            return apply_in_place(
                local, used, target=last, base_version=base_version, wait=wait, workers=workers,
                memory=memory, observer=observer,
            )  # fmt: skip
    if are_versions(paths):
        return inplace.apply_in_place(
            local, paths, target=target, base_version=base_version, wait=wait, workers=workers,
            memory=memory, observer=observer,
        )  # fmt: skip
    _check_unasked(target, base_version)
    return apply_deltas_in_place(
        local, paths, wait=wait, workers=workers, memory=memory, observer=observer
    )


def _paths(deltas: DeltaPath | Sequence[DeltaPath]) -> list[str]:
    listed = [deltas] if isinstance(deltas, (str, os.PathLike)) else list(deltas)
    return [checked_path("a delta", item) for item in listed]


def _check_alone(*asked: object) -> None:
    if any(each not in (None, []) for each in asked):
        raise UsageError(
            "to undo a change, give no deltas and no options about deltas",
            hint="leave them out",
        )


def _check_unasked(target: int | None, base_version: int | None) -> None:
    if target is not None or base_version is not None:
        raise UsageError(
            "delta files have no versions", hint="leave out the options about versions"
        )


def are_versions(paths: Sequence[str]) -> bool:
    """Whether these are weight versions, or a stream of them. Raises UsageError for a mixture."""
    kinds = {path: kind_of(path) for path in paths}
    versions = [path for path, kind in kinds.items() if kind is not None]
    if versions and len(versions) < len(kinds):
        other = next(path for path, kind in kinds.items() if kind is None)
        raise UsageError(
            f"{printable(versions[0])} is {kinds[versions[0]]}, and {printable(other)} is not",
            hint="apply one kind after the other, or convert one kind with ckdiff convert-delta",
        )
    return bool(versions)
