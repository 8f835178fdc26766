"""Putting a finished output in its place: to the disk, then a rename or an exchange of names."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

MANIFEST = "manifest.json"  #: what makes a directory a store
FORMER = "former"  #: in a work directory: an output, not a store, that is being replaced


def sync_tree(root: Path) -> None:
    """fsync every file and directory below ``root``."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync_path(Path(folder) / name)
        sync_path(Path(folder))


def sync_path(path: Path) -> None:
    """fsync a file, or a directory, so that the names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(new: Path, out: Path, replaced: Path | None) -> None:
    """Move what is new into place, and what was there, if anything, to ``replaced``."""
    if replaced is None:
        os.rename(new, out)
        return
    remove(replaced)
    os.rename(new, replaced)
    if _exchange(replaced, out):
        return
    os.rename(replaced, new)
    os.rename(out, replaced)  # nothing there for a moment; should we die now, ``_rescue`` knows
    try:
        os.rename(new, out)
    except OSError:
        os.rename(replaced, out)
        raise


def take_back(new: Path, out: Path, replaced: Path | None) -> None:
    """Undo ``put_in_place``."""
    if replaced is None:
        os.rename(out, new)
    elif _exchange(replaced, out):
        os.rename(replaced, new)
    else:
        os.rename(out, new)
        os.rename(replaced, out)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform != "linux" or swap is None:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def give_back(former: Path, out: Path) -> None:
    """Put what was about to be replaced back to its name, unless something is there by now.

    Whatever has the name ``FORMER`` is whole: it loses that name before it is removed.
    """
    if not os.path.lexists(former):
        return
    if not os.path.lexists(out):
        os.rename(former, out)
        return
    refuse = former.with_name("removed")
    remove(refuse)
    os.rename(former, refuse)
    remove(refuse)


def remove(path: Path) -> None:
    """Delete a file or a tree; a tree loses its manifest first, so that it is no store any more."""
    if path.is_dir() and not path.is_symlink():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
