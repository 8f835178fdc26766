"""The work directory of a store being written: lock, plan, journal, commit.

``run1.zarr`` is prepared in ``run1.zarr.ckdiff-partial`` beside it and renamed when complete:

    LOCK        flock, freed even by kill -9
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
import fcntl
import json
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ckdiff.errors import StoreError, StoreExists, StoreLocked, printable
from ckdiff.writing.objects import start_writeback, write_all
from ckdiff.writing.placing import (
    FORMER,
    MANIFEST,
    give_back,
    put_in_place,
    remove,
    sync_path,
    sync_tree,
    take_back,
)

SUFFIX = ".ckdiff-partial"
FORMAT = "ckdiff-mask-store"
_ATTEMPTS = 100  # at locking a directory that others keep removing
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
    if not out.with_name(out.name + SUFFIX).exists():
        return "the store is complete"
    folder = shlex.quote(str(out.parent))
    return f"the store is complete; ckdiff clean {folder} removes what is left beside it"


class WorkDir:
    """An exclusive, resumable place to build a store in. Use as a context manager."""

    def __init__(self, out: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
        if not out.name:
            raise StoreExists(f"{out} exists and is not a mask store", hint="choose another name")
        self.out = out
        self.path = out.with_name(out.name + SUFFIX)
        self.store = self.path / "store"
        self._plan = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        self._overwrite = overwrite
        self._lock = -1
        self.resumed = False  #: whether earlier work was found
        #: what of the plan was another one in earlier work that was thrown away, or nothing
        self.discarded: list[str] = []

    def __enter__(self) -> WorkDir:
        with store_errors(self.path):
            check_output(self.out, overwrite=self._overwrite)
            self._lock = acquire(self.path)
            try:
                _rescue(self.path)
                try:
                    # again: another process may have finished while we waited for its lock
                    check_output(self.out, overwrite=self._overwrite)
                except StoreError:
                    if not (self.path / "plan.json").exists():
                        self.discard()
                    raise
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
            earlier = found.read_text(encoding="utf-8")
        except (OSError, ValueError):
            earlier = ""
        if earlier == self._plan:
            self.resumed = True
            (self.store / MANIFEST).unlink(missing_ok=True)  # it is not finished any more
        else:
            if any((self.path / "journal").glob("*")):
                self.discarded = _differences(earlier, self._plan)
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
            _remove_temporaries(self.store)
            self._durable(sync_tree, self.store)
            write_file(self.store / MANIFEST, manifest)
            self._durable(sync_path, self.store)
            check_output(self.out, overwrite=self._overwrite)
            replaced = self.path / "replaced" if self.out.exists() else None
            put_in_place(self.store, self.out, replaced)
            # a worker elsewhere that was taken for dead may have begun a file until this moment
            with contextlib.suppress(OSError):
                _remove_temporaries(self.out)
            try:
                self._durable(sync_path, self.out.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    take_back(self.store, self.out, replaced)
                    remove(self.store)
                raise
        self.discard()

    def discard(self) -> None:
        """Remove the work directory. What cannot be removed is left for ``ckdiff clean``."""
        with contextlib.suppress(OSError):
            _remove_locked(self.path)

    def _durable(self, sync: Callable[[Path], None], path: Path) -> None:
        try:
            sync(path)
        except OSError:
            # after a failed fsync the page cache may show bytes that never reached the disk, and
            # the next fsync may succeed: nothing written so far can be used
            with contextlib.suppress(OSError):
                remove(self.path / "journal")
                remove(self.store)
            raise

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_store(path: Path) -> bool:
    """Whether a directory is a mask store, perhaps a damaged one, and not somebody else's data."""
    for name in (MANIFEST, "zarr.json"):
        with contextlib.suppress(OSError), open(path / name, "rb") as file:
            if FORMAT.encode() in file.read(4096):
                return (path / MANIFEST).is_file()
    return False


def _differences(earlier: str, plan: str) -> list[str]:
    """The keys of a plan whose values were others before; ``plan`` where it cannot be read."""
    try:
        before, now = json.loads(earlier), json.loads(plan)
        return sorted(key for key in now if before.get(key) != now[key]) or ["plan"]
    except (ValueError, AttributeError):
        return ["plan"]


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise StoreExists where the output is in the way."""
    if not out.parent.is_dir():
        raise StoreError(
            f"cannot write {printable(str(out))}: no directory {printable(str(out.parent))}",
            hint="create it first",
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        kind = "is a symbolic link" if out.is_symlink() else "exists and is not a store"
        raise StoreExists(f"{printable(str(out))} {kind}", hint="choose another name")
    if not out.exists():
        return
    if any(out.iterdir()) and not is_store(out):
        raise StoreExists(
            f"{printable(str(out))} exists and is not a mask store", hint="choose another name"
        )
    if not overwrite:
        raise StoreExists(f"{printable(str(out))} exists", hint="use --overwrite to replace it")


def acquire(path: Path, *, create: bool = True) -> int:
    """Lock the work directory; freed by the kernel when the process ends, however it ends."""
    for _ in range(_ATTEMPTS):
        if create:
            _make(path)
        try:
            fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if create:
                continue  # whoever used the directory has just removed it
            raise
        locked = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a lock is only worth something while it is in its place
            locked = os.path.samestat(os.fstat(fd), os.stat(path / "LOCK"))
        except BlockingIOError:
            break
        except FileNotFoundError:
            pass
        finally:
            if not locked:
                os.close(fd)
        if locked:
            return fd
    raise StoreLocked(
        f"another process is writing {printable(str(path).removesuffix(SUFFIX))}",
        hint="wait for it, or choose another name",
    )


def _make(path: Path) -> None:
    """Make a directory that may be there already, and may be gone again before one looks.

    pathlib's ``exist_ok`` would take the second for a file that is in the way.
    """
    try:
        path.mkdir()
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            if not (stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and path.is_dir())):
                raise


def _remove_locked(path: Path) -> None:
    """Remove a work directory whose lock is held, the plan first and the lock last."""
    entries = {entry.name: entry for entry in path.iterdir()}
    lock = entries.pop("LOCK", None)
    for name in sorted(entries, key=lambda name: name != "plan.json"):
        remove(entries[name])
    if lock is not None:
        lock.unlink()
    try:
        path.rmdir()
    except OSError as error:
        # from here on another process may have it
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def write_file(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write to one side and rename, so that the name never holds half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
            else:
                start_writeback(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _remove_temporaries(root: Path) -> None:
    """Delete what writers that were killed left of ``write_file`` and ``ObjectWriter``."""
    for path in root.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _rescue(path: Path) -> None:
    """Finish what a run that was killed while replacing its output had begun."""
    replaced = path / "replaced"
    out = path.with_name(path.name.removesuffix(SUFFIX))
    give_back(path / FORMER, out)
    if not replaced.is_dir():
        return
    if os.path.lexists(out) or not is_store(replaced):
        remove(replaced)
    else:
        os.rename(replaced, out)


def leftovers(folder: Path) -> list[Path]:
    """Work directories of stopped runs directly below ``folder``."""
    try:
        names = list(folder.iterdir())
    except OSError as error:
        raise StoreError(
            f"cannot look into {printable(str(folder))}: {error.strerror}",
            hint="give the directory that holds the leftovers",
        ) from None
    return sorted(p for p in names if p.name.endswith(SUFFIX) and p.is_dir() and not p.is_symlink())


def clean(folder: Path) -> tuple[list[Path], list[Path]]:
    """Remove leftovers; gives (removed, still in use by a running process)."""
    removed, busy = [], []
    for path in leftovers(folder):
        with store_errors(path):
            try:
                lock = acquire(path, create=False)
            except StoreLocked:
                busy.append(path)
                continue
            except FileNotFoundError:
                continue  # its owner has just removed it
            try:
                _rescue(path)
                _remove_locked(path)
            finally:
                os.close(lock)
        removed.append(path)
    return removed, busy
