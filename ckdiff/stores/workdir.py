"""The work directory of a store being written: plan, journal, commit.

``run1.zarr`` is prepared in ``run1.zarr.ckdiff-partial`` beside it and renamed when complete:

    LOCK, ckdiff-work.json   what makes the directory ours: see ownership
    plan.json   what is being computed; a run with the same plan resumes, any other starts anew
    journal/N   what chunk N added up to, written after its mask objects
    store/      the store, without a manifest until the very end

Commit order: mask objects -> journal; then tables and metadata -> fsync of everything -> manifest
-> fsync -> rename -> fsync of the parent directory. A store that is overwritten changes places with
the new one and is deleted afterwards, as ``replaced`` in the work directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.errors import StoreError, StoreExists, printable
from ckdiff.outputs.checks import check_replaceable
from ckdiff.outputs.ownership import (
    FORMER,
    JOURNAL,
    NEW,
    PLAN,
    REPLACED,
    STORE,
    WorkFolder,
    acquire,
    check_work_path,
    named,
    work_path,
)
from ckdiff.outputs.placing import (
    MANIFEST,
    not_replaceable,
    opened,
    put_in_place,
    remove,
    sync_path,
    sync_tree,
    write_file,
)
from ckdiff.stores.recognising import foreign

_REMOVALS, _PAUSE = 20, 0.05  # times that it is tried, and seconds between them
_FOREIGN = "move that elsewhere, or choose another name"


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into a StoreError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        name = error.filename
        where = named(name) if isinstance(name, str) and os.path.isabs(name) else str(path)
        hints = {
            errno.ENOSPC: "free some space; the same command then resumes",
            errno.EDQUOT: "your quota is used up; the same command resumes once there is room",
            errno.EFBIG: "the file size limit (ulimit -f) is too small; then run it again",
            errno.EACCES: "choose another place with -o",
            errno.EROFS: "choose another place with -o",
        }
        hint = hints.get(error.errno or 0, "the same command resumes once that is mended")
        raise StoreError(
            f"cannot write {printable(where)}: {error.strerror or error}", hint=hint
        ) from error


def stopped_hint(out: Path, manifest: bytes) -> str:
    """What to tell whoever interrupted a run that writes ``out``.

    ``manifest`` is what it meant to commit; it is empty while that is not known.
    """
    try:
        complete = bool(manifest) and (out / MANIFEST).read_bytes() == manifest
    except OSError:
        complete = False
    if not complete:
        return "the same command resumes"
    if not work_path(out).exists():
        return "the store is complete"
    folder = shlex.quote(str(out.parent))
    return f"the store is complete; ckdiff clean {folder} removes what is left beside it"


class WorkDir:
    """An exclusive, resumable place to build a store in. Use as a context manager."""

    def __init__(
        self,
        out: Path,
        plan: dict[str, Any],
        *,
        overwrite: bool,
        strange: Callable[[Path], str | None] | None = None,
    ) -> None:
        """``strange`` says what a directory is, or holds, that is none of what is made here; what
        no store is, or holds, by default.
        """
        if not out.name:
            raise StoreExists(f"{out} exists and is not a mask store", hint="choose another name")
        self.out = out
        self._strange = strange
        self.path = work_path(out)  #: how another process may reach it
        self._plan = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        self._overwrite = overwrite
        self._folder: WorkFolder | None = None
        self.resumed = False  #: whether earlier work was found
        #: what of the plan was another one in earlier work that was thrown away, or nothing
        self.discarded: list[str] = []

    @property
    def store(self) -> Path:
        """Where the store is built, for this process and for as long as the directory is open."""
        return self._inside / STORE

    def __enter__(self) -> WorkDir:
        with store_errors(self.path):
            check_output(self.out, overwrite=self._overwrite, strange=self._strange)
            self._folder = acquire(self.path)
            try:
                try:
                    # again: another process may have finished while we waited for its lock
                    check_output(self.out, overwrite=self._overwrite, strange=self._strange)
                    check_replaceable(self.out, self._inside, error=StoreExists)
                except StoreError:
                    if not (self._inside / PLAN).exists():
                        self.discard()
                    raise
                self._open_plan()
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @property
    def _inside(self) -> Path:
        return self.path if self._folder is None else self._folder.inside

    def _open_plan(self) -> None:
        for name in (REPLACED, FORMER, NEW):  # of a run that was killed while it put them in place
            remove(self._inside / name)
        found = self._inside / PLAN
        try:
            earlier = found.read_text(encoding="utf-8")
        except (OSError, ValueError):
            earlier = ""
        if earlier == self._plan:
            self.resumed = True
            (self.store / MANIFEST).unlink(missing_ok=True)  # it is not finished any more
        else:
            if any((self._inside / JOURNAL).glob("*")):
                self.discarded = _differences(earlier, self._plan)
            if self._folder is not None:
                self._folder.clear()
            write_file(found, self._plan.encode())
        (self._inside / JOURNAL).mkdir(exist_ok=True)
        self.store.mkdir(exist_ok=True)

    # journal

    def record(self, chunk: int, payload: bytes) -> None:
        """Note that a chunk is done; its objects must have been written before."""
        digest: bytes = xxhash.xxh3_128_digest(payload)
        write_file(self._inside / JOURNAL / f"{chunk}", digest + payload, sync=False)

    def recorded(self, chunk: int) -> bytes | None:
        """What ``record`` noted, or None where it did not or the note is damaged."""
        try:
            data = (self._inside / JOURNAL / f"{chunk}").read_bytes()
        except OSError:
            return None
        return data[16:] if xxhash.xxh3_128_digest(data[16:]) == data[:16] else None

    # the end

    def commit(self, manifest: bytes) -> None:
        """Make everything durable, write the manifest last, and move the store into place."""
        with store_errors(self.out):
            _remove_temporaries(self.store)
            self._durable(sync_tree, self.store)
            write_file(self.store / MANIFEST, manifest)
            self._durable(sync_path, self.store)
            check_output(self.out, overwrite=self._overwrite, strange=self._strange)
            replaced = self._inside / REPLACED
            with opened(self.store) as store:
                undo = put_in_place(self.store, self.out, replaced)
                # a worker elsewhere that was taken for dead may have begun a file until this
                # moment; it is in what we have open, whatever the name leads to by now
                with contextlib.suppress(OSError):
                    _remove_temporaries(store)
            try:
                # now that nobody can reach it by its name any more: is it still only a store?
                problem = (self._strange or foreign)(replaced) if replaced.is_dir() else None
                if problem is not None:
                    raise StoreExists(f"{printable(str(self.out))} {problem}", hint=_FOREIGN)
                self._durable(sync_path, self.out.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    if undo():
                        remove(self.store)
                raise
        self.discard()

    def discard(self) -> None:
        """Remove the work directory. What cannot be removed is left for ``ckdiff clean``."""
        if self._folder is None:
            return
        for _ in range(_REMOVALS):
            try:
                self._folder.remove()
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    return
            # a cluster's worker that has not heard of the end wrote one more object
            time.sleep(_PAUSE)

    def _durable(self, sync: Callable[[Path], None], path: Path) -> None:
        try:
            sync(path)
        except OSError:
            # after a failed fsync the page cache may show bytes that never reached the disk, and
            # the next fsync may succeed: nothing written so far can be used
            with contextlib.suppress(OSError):
                remove(self._inside / JOURNAL)
                remove(self.store)
            raise

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()


def _differences(earlier: str, plan: str) -> list[str]:
    """The keys of a plan whose values were others before; ``plan`` where it cannot be read."""
    try:
        before, now = json.loads(earlier), json.loads(plan)
        return sorted(key for key in now if before.get(key) != now[key]) or ["plan"]
    except (ValueError, AttributeError, RecursionError):
        return ["plan"]


def check_early(
    out: Path, *, overwrite: bool, strange: Callable[[Path], str | None] | None = None
) -> None:
    """Raise what entering a WorkDir would raise as things stand, but for a lock."""
    check_output(out, overwrite=overwrite, strange=strange)
    if not os.access(out.parent, os.W_OK | os.X_OK):
        where = printable(str(out.parent))
        raise StoreError(
            f"cannot write {printable(str(out))}: {where} may not be written to",
            hint="choose another place with -o",
        )
    check_work_path(out)


def check_output(
    out: Path, *, overwrite: bool, strange: Callable[[Path], str | None] | None = None
) -> None:
    """Raise StoreExists where the output is in the way; ``strange`` is as of WorkDir."""
    shown = printable(str(out))
    if not out.parent.is_dir():
        raise StoreError(
            f"cannot write {shown}: no directory {printable(str(out.parent))}",
            hint="create it first",
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        kind = "is a symbolic link" if out.is_symlink() else "exists and is not a store"
        raise StoreExists(f"{shown} {kind}", hint="choose another name")
    if out.exists():
        problem = (strange or foreign)(out) if any(out.iterdir()) else None
        if problem is not None and problem.startswith("is"):
            raise StoreExists(f"{shown} exists and {problem}", hint="choose another name")
        if problem is not None:
            raise StoreExists(f"{shown} {problem}", hint=_FOREIGN)
        if (problem := not_replaceable(out)) is not None:
            raise StoreExists(f"{shown} {problem}", hint="choose another name")
        if not overwrite:
            raise StoreExists(f"{shown} exists", hint="use --overwrite to replace it")


def _remove_temporaries(root: Path) -> None:
    """Delete what writers that were killed left of ``write_file`` and ``ObjectWriter``."""
    for path in root.rglob(".*.tmp"):
        path.unlink(missing_ok=True)
