"""Verifying what ckdiff makes: mask stores, deltas in files, weight versions."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from typing import Any

from ckdiff.checkpoints.opening import Given, fetch_all, open_all, open_keyed
from ckdiff.deltas.applying import rebuild
from ckdiff.deltas.container import Delta
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.links import Links
from ckdiff.deltas.outcome import allowed_workers
from ckdiff.deltas.ownheader import is_delta
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.room import Room
from ckdiff.deltas.signing.chosen import all_of, signers_of
from ckdiff.deltas.signing.manifest import covered
from ckdiff.deltas.signing.verifying import write_manifest
from ckdiff.deltas.versions.checking import check_stream
from ckdiff.deltas.versions.given import kind_of
from ckdiff.errors import UsageError
from ckdiff.options import Observer, Options, Progress, checked_observer, checked_path
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import Stopped
from ckdiff.stores.maskstore import check_store


def check(
    path: str | os.PathLike[str],
    *,
    base: Given | None = None,
    target: int | None = None,
    base_version: int | None = None,
    key: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    verify_signature: str | os.PathLike[str] | None = None,
    signature: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Verify every byte of a mask store, a delta in a file, or a stream of weight versions.

    Returns what ``ckdiff check --json`` prints. With ``base``, a delta (or a stream up to version
    ``target`` or the newest) is also applied, tensor by tensor in memory; nothing is written.
    ``key`` is the path of the state dict in a base that holds more.

    With ``manifest``, a delta or one weight version is verified, and what a signature covers is
    written to that file. ``verify_signature`` is a file of public keys: one of them must have
    signed the delta, or each version, in ``signature`` or the file beside it.

    Raises a CkdiffError if something is wrong: StoreCorrupt, StoreIncomplete, DeltaError and
    others.
    """
    where, observer = checked_path("the path", path), checked_observer(observer)
    signers, signed = signers_of(verify_signature, signature), {}
    if signers is not None:
        chosen = all_of(where, target)
        names = map(os.path.basename, chosen)
        signed = {"signed_by": dict(zip(names, signers.verify_all(chosen), strict=True))}
    if manifest is not None:
        covered(where)
    found = _check(
        where, observer, base=base, target=target, base_version=base_version, key=key,
        workers=workers, memory=memory,
    )  # fmt: skip
    if manifest is not None:
        write_manifest(where, manifest)
    return found | signed


def _check(
    where: str,
    observer: Observer,
    *,
    base: Given | None,
    target: int | None,
    base_version: int | None,
    key: str | None,
    workers: int | None,
    memory: str | int | None,
) -> dict[str, Any]:
    """What ``check`` gives but of signatures."""
    if key is not None:
        with ExitStack() as stack:
            opened = open_keyed(stack, base, key)
            return _check(
                where, observer, base=opened, target=target, base_version=base_version, key=None,
                workers=workers, memory=memory,
            )  # fmt: skip
    if kind_of(where) is not None:
        return check_stream(
            where, base=base, target=target, base_version=base_version, workers=workers,
            memory=memory, observer=observer,
        ).to_dict()  # fmt: skip
    if target is not None or base_version is not None:
        raise UsageError("only streams of weight versions have versions", hint="leave them out")
    if is_delta(where):
        return _check_delta(where, base, Options(workers=workers, memory=memory), observer)
    if base is not None:
        raise UsageError("a mask store is checked without a base", hint="leave out the base")
    began = time.perf_counter()

    def progress(done: int, total: int) -> None:
        observer.progress(Progress(done, total, time.perf_counter() - began, 0))

    return check_store(where, progress)


def _check_delta(
    path: str, base: Given | None, options: Options, observer: Observer
) -> dict[str, Any]:
    with ExitStack() as stack, interruptible():
        room = Room(options.memory)
        delta = stack.enter_context(Delta(path, room))
        if base is None:
            _read_all(delta, allowed_workers(options, len(delta.windows), room.taken), observer)
        else:
            (given,) = open_all(stack, base)
            readers = given.reader_memory(FRAME_BYTES)
            groups = len(delta.windows.groups)
            workers = allowed_workers(options, groups, room.taken, readers=readers)
            links = Links(given, [delta])
            fetch_all([given])
            rebuild(links, _Nowhere(), workers, observer)
        delta.check()
        return {
            "delta": path,
            "encoding": delta.encoding,
            "frames": int((delta.frame_sizes > 0).sum()),
            "tensors": len(delta.blueprint.names),
            "applied": base is not None,
            "bytes": delta.size,
            "ok": True,
        }


def _read_all(delta: Delta, workers: int, observer: Observer) -> None:
    """Hold the digests of all frames. Raises DeltaError."""
    find = ENCODINGS[delta.encoding].spots
    spots = None if find is None else find(delta)
    meter = Meter(observer, delta.size)

    def read(chunk: int, stop: threading.Event) -> None:
        if stop.is_set():
            raise Stopped
        if spots is None:
            delta.frame(chunk)
        elif spots.stored_whole(int(delta.windows.tensor[chunk])):
            spots.whole(chunk)
        else:
            spots.changes(chunk)

    def finished(window: int, _: None) -> None:
        meter.add(int(delta.frame_sizes[window]))

    run_chunks(range(len(delta.windows)), read, workers=workers, done=finished, meter=meter)


class _Nowhere:
    """Takes rebuilt tensors and keeps none."""

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """See Target."""

    def commit(self) -> None:
        """See Target."""
