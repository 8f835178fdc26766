"""Putting a finished output in its place: to the disk, then one step in which it gets its name.

At no moment is there neither the old output nor the new one, and nothing that appears under the
name meanwhile is lost. Where a file system cannot do that for directories, it is said before any
work begins.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckdiff.errors import printable
from ckdiff.outputs.writing import start_writeback, write_all
from ckdiff.running.threads import run_threads

MANIFEST = "manifest.json"  #: what makes a directory a store
#: two directories that are exchanged to see whether directories can be
PROBES = ("exchange.1", "exchange.2")

_AT_CWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # of renameat2
_MAC_SWAP, _MAC_EXCLUSIVE = 2, 4  # of renamex_np
#: what systems and file systems answer that cannot do a kind of rename
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_SYNCED = 8  # files at a time
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}


def sync_tree(root: Path) -> None:
    """fsync every file and directory below ``root``.

    Several at a time: what waits together is one transaction of the file system, and nobody counts
    while the disk is waited for.
    """
    found = [Path(f, name) for f, _, names in os.walk(root) for name in ("", *names)]
    run_threads(
        range(len(found)), lambda chunk, stop: sync_path(found[chunk]),
        workers=_SYNCED, done=lambda chunk, result: None,
    )  # fmt: skip


def sync_path(path: Path) -> None:
    """fsync a file, or a directory, so that the names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """Write to one side and rename, so that the name never holds half a file.

    No link is followed: what has one of the two names is replaced, and not written through.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, mode)
    except FileExistsError:  # of a run that was killed, or not ours at all
        temporary.unlink()
        fd = os.open(temporary, flags, mode)
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


def replaceable(folder: Path, out: Path) -> bool:
    """Whether what is at ``out`` could be replaced in one step; tried out in ``folder``.

    Files always can, and so can a directory with nothing in it.
    """
    if not _is_folder(out) or _is_empty_folder(out):
        return True
    one, other = (folder / name for name in PROBES)
    try:
        for path in (one, other):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
        return _exchange(one, other)
    finally:
        for path in (one, other):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def put_in_place(new: Path, out: Path, former: Path) -> Callable[[], bool]:
    """Move what is new into place, and what was there, if anything, to ``former``.

    Gives what undoes it: False where something else has a name by now, which is left as it is.
    OSError passes through, and then everything is as it was. FileExistsError says that something is
    there that was not before, or that cannot be replaced in one step.
    """
    ours = os.lstat(new)
    if not os.path.lexists(out) or _is_empty_folder(out):
        _move(new, out)
        return lambda: _fetch_back(new, out, ours)
    with contextlib.suppress(OSError):  # who could not look into the old one, cannot into the new
        os.chmod(new, stat.S_IMODE(os.lstat(out).st_mode))
    os.rename(new, former)  # what has this name is not resumed, whichever of the two it is
    try:
        if not _exchange(former, out):
            if _is_folder(out):
                raise FileExistsError(errno.EEXIST, "it cannot be replaced in one step", str(out))
            return _replace_file(new, out, former, ours)
    except OSError:
        os.rename(former, new)
        raise
    return lambda: _swap_back(new, out, former, ours)


def _replace_file(new: Path, out: Path, former: Path, ours: os.stat_result) -> Callable[[], bool]:
    """Replace a file where names cannot be exchanged; a second name keeps the old one."""
    os.rename(former, new)
    try:
        kept = _link(out, former)
        os.replace(new, out)
    except OSError:
        os.rename(new, former)  # as the caller had it
        raise

    def undo() -> bool:
        if not kept or not os.path.samestat(os.lstat(out), ours):
            return False
        os.replace(former, out)
        return True

    return undo


def _fetch_back(new: Path, out: Path, ours: os.stat_result) -> bool:
    os.rename(out, new)
    if os.path.samestat(os.lstat(new), ours):
        return True
    _move(new, out)
    return False


def _swap_back(new: Path, out: Path, former: Path, ours: os.stat_result) -> bool:
    if not _exchange(former, out):
        return False
    if not os.path.samestat(os.lstat(former), ours):
        _exchange(former, out)
        return False
    os.rename(former, new)
    return True


def _link(path: Path, second: Path) -> bool:
    """Give a file a second name; False where the file system has no such thing."""
    try:
        os.link(path, second, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def not_replaceable(out: Path) -> str | None:
    """Why what is at ``out`` must not change its place, or None."""
    if os.path.samefile(out, "."):
        return "is the current directory"
    mounted = mounted_below(out)
    return None if mounted is None else f"has something mounted at {printable(mounted)}"


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """A way into a directory that stays what it is, whatever its name leads to by then."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield way_in(folder, fd)
    finally:
        os.close(fd)


def way_in(path: Path, fd: int) -> Path:
    """A path that leads through the descriptor; the name itself where the system has none."""
    way = Path(f"/proc/self/fd/{fd}")
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(f"{way}/."), os.fstat(fd)):
            return way
    return path


def mounted_below(path: Path) -> str | None:
    """Something that is mounted at ``path`` or below it, or None: that is never part of an output.

    Where the system does not say what is mounted, only another device shows.
    """
    place = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return place if os.path.ismount(place) else None
    for line in lines:
        raw = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        point = os.fsdecode(raw)
        if point == place or point.startswith(place.rstrip("/") + "/"):
            return point
    return None


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    return _rename(one, other, _EXCHANGE, _MAC_SWAP)


def _move(new: Path, out: Path) -> None:
    """Rename, but never over something that has just appeared there."""
    if _is_folder(out):
        os.rename(new, out)  # the system does it only where nothing is in it
    elif _rename(new, out, _NO_REPLACE, _MAC_EXCLUSIVE):
        return
    elif _is_folder(new):
        os.rename(new, out)  # no file is ever replaced by a directory
    elif _link(new, out):
        os.unlink(new)
    elif os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    else:
        os.rename(new, out)


def _rename(one: Path, other: Path, flags: int, mac_flags: int) -> bool:
    """A rename of a special kind; False where it cannot be had."""
    call = _special_rename(mac_flags if sys.platform == "darwin" else flags)
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _special_rename(flags: int) -> Callable[[bytes, bytes], Any] | None:
    """The system's function; None where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        return None if swap is None else lambda one, other: swap(one, other, flags)
    swap = getattr(libc, "renameat2", None)
    if swap is None:
        return None
    return lambda one, other: swap(_AT_CWD, one, _AT_CWD, other, flags)


def remove(path: Path) -> None:
    """Delete a file or a tree; a tree loses its manifest first, so that it is no store any more."""
    if _is_folder(path):
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _is_empty_folder(path: Path) -> bool:
    return _is_folder(path) and not os.listdir(path)
