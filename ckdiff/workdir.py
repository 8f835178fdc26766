"""The work directory of a store being written: lock, plan, journal, commit.

``run1.zarr`` is prepared in ``run1.zarr.ckdiff-partial`` beside it and renamed when complete:

    LOCK        flock, freed even by kill -9
    plan.json   what is being computed; a run with the same plan resumes, any other starts anew
    journal/N   what chunk N added up to, written after its mask objects
    store/      the store, without a manifest until the very end

Commit order: mask objects -> journal; then tables and metadata -> fsync of everything -> manifest
-> fsync -> rename -> fsync of the parent directory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.errors import StoreError, StoreExists, StoreLocked, printable
from ckdiff.objects import start_writeback, write_all

SUFFIX = ".ckdiff-partial"
MANIFEST = "manifest.json"
_README = """\
This directory was left by a ckdiff run that did not finish. The same command resumes it;
`ckdiff clean DIR` (DIR being the directory that holds this one) removes it.
"""


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into a StoreError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        hints = {
            errno.ENOSPC: "free some space; the same command then resumes",
            errno.EDQUOT: "your quota is used up; the same command resumes once there is room",
            errno.EFBIG: "the file size limit (ulimit -f) is too small; then run it again",
            errno.EACCES: "choose another place with -o",
            errno.EROFS: "choose another place with -o",
        }
        hint = hints.get(error.errno or 0, "the same command resumes once that is mended")
        raise StoreError(
            f"cannot write {printable(str(where))}: {error.strerror or error}", hint=hint
        ) from error


class WorkDir:
    """An exclusive, resumable place to build a store in. Use as a context manager."""

    def __init__(self, out: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
        self.out = out
        self.path = out.with_name(out.name + SUFFIX)
        self.store = self.path / "store"
        self._plan = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        self._overwrite = overwrite
        self._lock = -1
        self.resumed = False  #: whether earlier work was found
        self.discarded = False  #: whether earlier work of another plan was thrown away

    def __enter__(self) -> WorkDir:
        check_output(self.out, overwrite=self._overwrite)
        with store_errors(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock = _acquire(self.path)
            try:
                self._open_plan()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._unlock()

    def _open_plan(self) -> None:
        found = self.path / "plan.json"
        try:
            same = found.read_text(encoding="utf-8") == self._plan
        except (OSError, ValueError):
            same = False
        if same:
            self.resumed = True
        else:
            self.discarded = any((self.path / "journal").glob("*"))
            for name in ("plan.json", "journal", "store"):
                remove(self.path / name)
            write_file(self.path / "README.txt", _README.encode())
            write_file(found, self._plan.encode())
        (self.path / "journal").mkdir(exist_ok=True)
        self.store.mkdir(exist_ok=True)

    # journal

    def record(self, chunk: int, payload: bytes) -> None:
        """Note that a chunk is done; its objects must have been written before."""
        digest: bytes = xxhash.xxh3_128_digest(payload)
        write_file(self.path / "journal" / f"{chunk}", digest + payload, sync=False)

    def recorded(self, chunk: int) -> bytes | None:
        """What ``record`` noted, or None where it did not or the note is damaged."""
        try:
            data = (self.path / "journal" / f"{chunk}").read_bytes()
        except OSError:
            return None
        return data[16:] if xxhash.xxh3_128_digest(data[16:]) == data[:16] else None

    # the end

    def commit(self, manifest: bytes) -> None:
        """Make everything durable, write the manifest last, and move the store into place."""
        with store_errors(self.out):
            sync_tree(self.store)
            write_file(self.store / MANIFEST, manifest)
            sync_directory(self.store)
            check_output(self.out, overwrite=self._overwrite)
            if self.out.exists():
                _exchange(self.store, self.out)
            else:
                os.rename(self.store, self.out)
            sync_directory(self.out.parent)
            self.discard()

    def discard(self) -> None:
        """Remove the work directory; the lock is held until its last entry is gone."""
        for entry in sorted(self.path.iterdir(), key=lambda p: p.name == "LOCK"):
            remove(entry)
        self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_store(path: Path) -> bool:
    """Whether a directory looks like a mask store, finished or not."""
    return (path / MANIFEST).is_file()


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise StoreExists where the output is in the way."""
    if not out.parent.is_dir():
        raise StoreError(
            f"cannot write {printable(str(out))}: there is no directory {printable(str(out.parent))}",
            hint="create it first",
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise StoreExists(f"{printable(str(out))} exists and is not a store", hint="choose another")
    if not out.exists():
        return
    if not overwrite:
        raise StoreExists(f"{printable(str(out))} exists", hint="use --overwrite to replace it")
    if any(out.iterdir()) and not is_store(out):
        raise StoreExists(
            f"{printable(str(out))} exists and is not a mask store", hint="choose another name"
        )


def _acquire(path: Path) -> int:
    """Lock the work directory; freed by the kernel when the process ends, however it ends."""
    fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    locked = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # another process may have finished and removed the directory in between
        locked = os.path.samestat(os.fstat(fd), os.stat(path / "LOCK"))
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not locked:
            os.close(fd)
    if not locked:
        raise StoreLocked(
            f"another process is writing {printable(str(path).removesuffix(SUFFIX))}",
            hint="wait for it, or choose another name",
        )
    return fd


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write to one side and rename, so that the name never holds half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data)
        if sync:
            os.fsync(fd)
        else:
            start_writeback(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)


def sync_tree(root: Path) -> None:
    """fsync every file and directory below ``root``."""
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step where the system can, so that a store is always there."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name("replaced")
    remove(aside)
    os.rename(old, aside)
    os.rename(new, old)


def remove(path: Path) -> None:
    """Delete a file or a tree; a tree loses its manifest first, so that it is no store any more."""
    if path.is_dir() and not path.is_symlink():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Work directories of stopped runs directly below ``folder``."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIX) and p.is_dir())


def clean(folder: Path) -> tuple[list[Path], list[Path]]:
    """Remove leftovers; gives (removed, still in use by a running process)."""
    removed, busy = [], []
    for path in leftovers(folder):
        try:
            with store_errors(path):
                lock = _acquire(path)
        except StoreLocked:
            busy.append(path)
            continue
        try:
            with store_errors(path):
                remove(path)
        finally:
            os.close(lock)
        removed.append(path)
    return removed, busy
