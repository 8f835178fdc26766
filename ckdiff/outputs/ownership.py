"""Whose a work directory is: nothing beside an output is ours until it says so, verifiably.

What is not finished lies in ``OUT.ckdiff-partial`` beside the output. Anybody can give a directory
that name, so it is used, resumed or removed only if all of this holds:

- it is a real directory, it belongs to us, and nobody else may write to it;
- it has a marker, ``ckdiff-work.json``, that names the output, the directory's own inode and the
  moment at which the lock in it was made, which the kernel notes and nobody can set: a directory
  that was copied, renamed or unpacked from somebody's archive does not pass for one made here;
- all that is in it has names that ckdiff gives, and no link is among it.

It is opened once, without following links, and everything in it is reached through that descriptor:
what becomes of its name meanwhile does not matter. ``LOCK`` in it is held by ``flock``, which the
kernel frees however a process ends.

A directory that is being made has no marker yet. It is known by its mode, which has the sticky bit,
and by having nothing in it: the next run takes over what a run that is killed just then leaves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from pathlib import Path

from ckdiff.errors import StoreError, StoreLocked, printable
from ckdiff.outputs.companionnames import is_companion
from ckdiff.outputs.placing import PROBES, mounted_below, remove, way_in, write_file

SUFFIX = ".ckdiff-partial"
LOCK, MARKER = "LOCK", "ckdiff-work.json"
README, PLAN, JOURNAL, STORE = "README.txt", "plan.json", "journal", "store"
#: an output that is being replaced: of a store, and of anything else
REPLACED, FORMER = "replaced", "former"
NEW = "new"  #: an output, not a store, that is being written

_FORMAT, _VERSION = "ckdiff-work", 1
_MODE = 0o1700  # nobody else may even look; nobody makes such a directory by accident
_ATTEMPTS = 100  # at a directory that others keep making and removing
_LARGEST = 1 << 16  # bytes of a marker that are read
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_FILES, _FOLDERS = {LOCK, MARKER, README, PLAN}, {JOURNAL, STORE}
_ANY = {REPLACED, FORMER, NEW, "flags", *PROBES}
#: what writers that were killed left of files that were to be renamed, or to have no name
_TEMPORARY = re.compile(r"\..+\.tmp|tmp[a-z0-9_]{8}", re.DOTALL)
_OF_STORE = r"(manifest|zarr|tensors)\.json|masks(/[^/]+(/zarr\.json|/c(/[0-9]+)?)?)?"
#: of a timeline, which has a store for each step
_OF_TIMELINE = (
    r"(first_moves|counts|lengths|ways)(/zarr\.json|/c(/[0-9]+){0,2})?"
    rf"|masks/step-[0-9]{{5}}\.zarr(/zarr\.json|/({_OF_STORE}))?"
)
_IN_STORE = re.compile(f"{_OF_STORE}|{_OF_TIMELINE}", re.ASCII | re.DOTALL)
_IN_JOURNAL = re.compile(r"[0-9]+", re.ASCII)
#: in an output that is a directory: folders, shards, their index, companions; what a store has
_IN_OUTPUT = re.compile(r"(.*/)?[^/]+\.(safetensors|json)|(.*/)?[^/.]+|masks/.+", re.DOTALL)
_README = b"""\
This directory was left by a ckdiff run that did not finish. The same command resumes it, or starts
anew; `ckdiff clean DIR` (DIR being the directory that holds this one) removes it.
"""


class WorkFolder:
    """An open work directory; after ``lock`` and ``claim`` it is ours alone until ``close``."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path  #: its name, for messages
        self._fd = fd
        self._lock = -1
        self.inside = way_in(path, fd)  #: leads into it, whatever the name leads to by now
        _open[str(self.inside)] = path

    def lock(self, *, fresh: bool) -> bool:
        """Lock it; False where it was removed meanwhile. What is not ours is not touched.

        ``fresh`` says that it was made just now. Raises StoreLocked and StoreError.
        """
        self._lock = _lock(self.path, self._fd, fresh=fresh)
        return self._lock >= 0 and _leads_to(self.path, self._fd)

    def claim(self, *, fresh: bool) -> None:
        """Mark it, if it is not marked yet. Raises StoreError where it holds what is not ours."""
        try:
            _require_own_content(self.path, self._fd)
            _mark(self.path, self._fd, self.inside)
        except OSError:
            if fresh:
                with contextlib.suppress(OSError):
                    self.remove()
            raise

    def close(self) -> None:
        """Give up the lock; may be called more than once."""
        fds, self._fd, self._lock = (self._lock, self._fd), -1, -1
        _open.pop(str(self.inside), None)
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def clear(self) -> None:
        """Remove everything in it but what makes it ours, the plan first."""
        names = set(os.listdir(self._fd)) - {LOCK, MARKER, README}
        for name in sorted(names, key=lambda name: name != PLAN):
            remove(self.inside / name)

    def remove(self) -> None:
        """Remove it: what makes it ours goes last, so that what is left at any moment is too."""
        self.clear()
        for name in (README, MARKER, LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
        if not _leads_to(self.path, self._fd):
            return
        try:
            os.rmdir(self.path)
        except OSError as error:
            # from here on another process may have it
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


_open: dict[str, Path] = {}  # ways into work directories, and their names


def named(path: str) -> str:
    """``path`` as people know it, if it leads through a descriptor of a work directory."""
    for way, name in list(_open.items()):
        if path == way or path.startswith(way + os.sep):
            return str(name) + path[len(way) :]
    return path


def work_path(out: Path) -> Path:
    """Where the work on an output is done."""
    return out.with_name(out.name + SUFFIX)


def check_work_path(out: Path) -> None:
    """Raise StoreError if what is at ``work_path(out)`` is not ours. Nothing is changed."""
    path = work_path(out)
    try:
        fd = _open_folder(path)
    except FileNotFoundError:
        return
    try:
        _require_ours(path, fd)
    finally:
        os.close(fd)


def acquire(path: Path, *, create: bool = True) -> WorkFolder:
    """Open and lock the work directory at ``path``, which is made if it is not there.

    Raises StoreLocked where another process has it, StoreError where it is not ours, and
    FileNotFoundError where it is not there and must not be made.
    """
    for _ in range(_ATTEMPTS):
        fresh = create and _make(path)
        try:
            fd = _open_folder(path)
        except FileNotFoundError:
            if create:
                continue  # whoever used it has just removed it
            raise
        except StoreError:
            if fresh:  # the umask lets not even us look into what we made
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            raise
        folder = WorkFolder(path, fd)
        try:
            if folder.lock(fresh=fresh):
                folder.claim(fresh=fresh)
                return folder
        except FileNotFoundError:
            pass  # removed by the one who had it
        except BaseException:
            folder.close()
            raise
        folder.close()
    raise _locked(path)


def leftovers(folder: Path) -> list[Path]:
    """Whatever is directly below ``folder`` and has the name of a work directory, ours or not."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise StoreError(
            f"cannot look into {printable(str(folder))}: {error.strerror}",
            hint="give the directory that holds the leftovers",
        ) from None
    return sorted(folder / name for name in names if name.endswith(SUFFIX) and name != SUFFIX)


# inside


def _make(path: Path) -> bool:
    """Make a work directory, unless something of its name is there; whether it was made."""
    try:
        os.mkdir(path, _MODE)
    except FileExistsError:
        return False
    return True


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) or path.is_symlink():
            raise _not_ours(path, "it is a symbolic link") from None
        if error.errno == errno.ENOTDIR:
            raise _not_ours(path, "it is not a directory") from None
        if error.errno == errno.EACCES:
            raise _not_ours(path, "it may not be looked into") from None
        raise


def _lock(path: Path, fd: int, *, fresh: bool) -> int:
    """Lock what was opened; -1 where it was removed meanwhile. Nothing that is not ours is touched.

    Raises StoreLocked and StoreError.
    """
    flags = os.O_RDWR | os.O_CREAT | _FLAGS
    lock = -1
    if fresh and not os.listdir(fd):
        # We made it just now, and nothing is in it. Some file systems give everything to one user,
        # or let everybody write everywhere; what counts is that it is still what we made, which
        # may have been exchanged for another by whoever owns the directory that it is in.
        with contextlib.suppress(FileExistsError):
            lock = os.open(LOCK, flags | os.O_EXCL, 0o600, dir_fd=fd)
            if os.fstat(lock).st_uid != os.fstat(fd).st_uid:
                os.close(lock)
                os.unlink(LOCK, dir_fd=fd)
                raise _not_ours(path, "it belongs to another user")
            os.fchmod(fd, _MODE)  # whatever the umask left of it
    if lock < 0:
        _require_ours(path, fd)
        try:
            lock = os.open(LOCK, flags, 0o600, dir_fd=fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _not_ours(path, f"{LOCK} in it is a symbolic link") from None
            raise
    try:
        found = os.fstat(lock)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise _not_ours(path, f"{LOCK} in it is not an empty file")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a lock is only worth something while it is in its place
        if os.path.samestat(found, os.stat(LOCK, dir_fd=fd, follow_symlinks=False)):
            kept, lock = lock, -1
            return kept
    except BlockingIOError:
        raise _locked(path) from None
    finally:
        if lock >= 0:
            os.close(lock)
    return -1


def _require_ours(path: Path, fd: int) -> None:
    """Raise StoreError unless an open directory is a work directory of ours for that output."""
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise _not_ours(path, "it belongs to another user")
    if found.st_mode & 0o022:
        raise _not_ours(path, "others may write to it")
    for _ in range(_ATTEMPTS):  # its owner may be making or removing it at this moment
        marker = _read_marker(path, fd)
        if marker is not None:
            with contextlib.suppress(FileNotFoundError):  # the lock, which goes last
                if marker == _marker(path, fd):
                    return
            if marker == _read_marker(path, fd):
                break
            continue
        names = set(os.listdir(fd))
        # the marker comes first and goes last: without it there is nothing yet, or nothing any more
        if stat.S_IMODE(found.st_mode) == _MODE and names <= {LOCK, README, f".{MARKER}.tmp"}:
            return
        if MARKER not in names:
            raise _not_ours(path, "it has no marker of ckdiff's (0.1.0 made none)")
    raise _not_ours(path, "its marker is another directory's; was it copied or renamed?")


def _marker(path: Path, fd: int) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "output": path.name.removesuffix(SUFFIX),
        "inode": os.fstat(fd).st_ino,
        "made": os.stat(LOCK, dir_fd=fd, follow_symlinks=False).st_ctime_ns,
    }


def _read_marker(path: Path, fd: int) -> dict[str, object] | None:
    """What the marker says; None where there is none."""
    try:
        marker = os.open(MARKER, os.O_RDONLY | _FLAGS, dir_fd=fd)
    except FileNotFoundError:
        return None
    except OSError:
        raise _not_ours(path, f"{MARKER} in it cannot be read") from None
    with open(marker, "rb") as file:
        status = os.fstat(marker)
        ours = status.st_uid == os.fstat(fd).st_uid and not status.st_mode & 0o022
        if not (stat.S_ISREG(status.st_mode) and ours):
            raise _not_ours(path, f"{MARKER} in it is not a file of ckdiff's")
        raw = file.read(_LARGEST)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _not_ours(path, f"{MARKER} in it is damaged")
    return found


def _mark(path: Path, fd: int, inside: Path) -> None:
    """Write the marker, if there is none yet."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(MARKER, dir_fd=fd, follow_symlinks=False)
        return
    text = json.dumps(_marker(path, fd), separators=(",", ":"))
    # not synced: what makes it worth keeping, the plan, is written and synced after it
    write_file(inside / MARKER, text.encode() + b"\n", sync=False, mode=0o600)
    write_file(inside / README, _README, sync=False)


def _require_own_content(path: Path, fd: int) -> None:
    """Raise StoreError if there is anything that ckdiff did not make. Nothing is changed."""
    with os.scandir(fd) as entries:
        for entry in entries:
            name, is_file = entry.name, entry.is_file(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.is_symlink():
                raise _not_ours(path, f"{printable(name)} in it is a symbolic link")
            known = (
                (is_file and (name in _FILES or _TEMPORARY.fullmatch(name) is not None))
                or (is_folder and name in _FOLDERS)
                or ((is_file or is_folder) and name in _ANY)
            )
            if not known:
                raise _not_ours(path, f"ckdiff did not make {printable(name)} in it")
    known_inside = {STORE: _IN_STORE, JOURNAL: _IN_JOURNAL}
    known_inside |= dict.fromkeys((REPLACED, FORMER, NEW), _IN_OUTPUT)
    for folder, grammar in known_inside.items():
        _require_grammar(path, fd, folder, grammar)
    mounted = mounted_below(path)
    if mounted is not None:
        raise _not_ours(path, f"something is mounted at {printable(mounted)}")


def _require_grammar(path: Path, fd: int, top: str, grammar: re.Pattern[str]) -> None:
    """Raise StoreError unless all below a directory is files and directories of the right names."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder, folders, files, inner in os.fwalk(top, dir_fd=fd, follow_symlinks=False):
            for name in (*folders, *files):
                shown = os.path.join(folder, name)
                mode = os.stat(name, dir_fd=inner, follow_symlinks=False).st_mode
                plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
                relative = os.path.relpath(shown, top)
                temporary = stat.S_ISREG(mode) and _TEMPORARY.fullmatch(name) is not None
                known = grammar.fullmatch(relative) or (
                    grammar is _IN_OUTPUT and is_companion(relative)
                )
                if not plain or not (temporary or known):
                    raise _not_ours(path, f"ckdiff did not make {printable(shown)} in it")


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _locked(path: Path) -> StoreLocked:
    return StoreLocked(
        f"another process is writing {printable(str(path).removesuffix(SUFFIX))}",
        hint="wait for it, or choose another name",
    )


def _not_ours(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{printable(str(path))} is not a work directory of ckdiff's: {why}",
        hint="move it away, or remove it if nothing in it is needed",
    )
