"""The directory that an engine and ckdiff share in a local checkpoint, and the lock in it.

Nothing in it is believed because it is there: links are not followed, and what others may write to
is not ours. The lock is ``flock``, which the kernel frees however a process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckdiff.checkpoints.halfway import FOLDER
from ckdiff.errors import OutputError, printable
from ckdiff.outputs.place import write_errors
from ckdiff.outputs.placing import sync_path, way_in

LOCK_NAME = "lock"
WAIT = 60.0  #: seconds that others may have the lock
_POLL = 0.05  # seconds
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class SyncFolder:
    """``.weight_sync`` of a local checkpoint, open and locked: nobody else changes it."""

    def __init__(self, local: Path, fd: int) -> None:
        self.local = local  #: the checkpoint's directory
        self.path = local / FOLDER  #: for messages
        self.fd = fd
        self.inside = way_in(self.path, fd)  #: leads into it, whatever its name leads to by now

    def sync(self) -> None:
        """Bring the names in it to the disk. OSError passes through."""
        os.fsync(self.fd)

    def there(self, name: str) -> bool:
        """Whether it holds something of this name."""
        return os.path.lexists(self.inside / name)

    def remove(self, name: str) -> None:
        """Remove a file of ours, if it is there. OSError passes through."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)


@contextmanager
def locked(local: Path, wait: float = WAIT) -> Iterator[SyncFolder]:
    """The checkpoint at ``local`` for us alone; waits so many seconds for whoever has it.

    After an error nothing is left of the directory where it was made for this, and nothing was put
    into it. Raises OutputError where it stays locked, and for a directory or a lock that cannot be
    ours.
    """
    with contextlib.ExitStack() as stack:
        with write_errors(local / FOLDER):
            folder, made = _locked(stack, local, wait)
        try:
            yield folder
        except BaseException:
            if made:
                _leave_nothing(folder)
            raise


def _locked(stack: contextlib.ExitStack, local: Path, wait: float) -> tuple[SyncFolder, bool]:
    """The directory, until ``stack`` is closed, and whether it was made."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(FileNotFoundError):
            fd, made = _open_folder(local)
            held.callback(os.close, fd)
            folder = SyncFolder(local, fd)
            held.callback(os.close, _lock(folder, wait))
            stack.push(held.pop_all())
            return folder, made
        # whoever made it has just removed it


def _leave_nothing(folder: SyncFolder) -> None:
    """Remove a directory that holds the lock alone."""
    with contextlib.suppress(OSError):
        if os.listdir(folder.fd) == [LOCK_NAME]:
            folder.remove(LOCK_NAME)
            os.rmdir(folder.path)


def _open_folder(local: Path) -> tuple[int, bool]:
    """A descriptor, and whether it had to be made."""
    path, made = local / FOLDER, False
    if not local.is_dir():
        raise OutputError(
            f"{printable(str(local))} is not a directory", hint="give a checkpoint's directory"
        )
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
        made = True
        sync_path(local)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            raise _strange(path, "it is a link, or not a directory") from None
        raise
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        os.close(fd)
        raise _strange(path, "it belongs to another user, or everybody may write to it")
    return fd, made


def _lock(folder: SyncFolder, wait: float) -> int:
    """A descriptor of the lock, which is held until it is closed."""
    until = time.monotonic() + wait
    path = folder.path / LOCK_NAME
    while True:
        try:
            fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666, dir_fd=folder.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise _strange(path, "it is a link") from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _strange(path, "it is not a regular file")
            if _taken(folder, fd):
                kept, fd = fd, -1
                return kept
            if time.monotonic() > until:
                raise OutputError(
                    f"{printable(str(folder.local))} is locked by {_holder(fd)}",
                    hint="wait until it is done, or stop it",
                )
        finally:
            if fd >= 0:
                os.close(fd)
        time.sleep(_POLL)


def _taken(folder: SyncFolder, fd: int) -> bool:
    """Lock what was opened; False where others have it, or it lost its name meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = os.stat(LOCK_NAME, dir_fd=folder.fd, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    return os.path.samestat(os.fstat(fd), named)


def _holder(fd: int) -> str:
    """Who has a lock, as far as the system tells."""
    inode = f":{os.fstat(fd).st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "FLOCK" in words and len(words) > 5 and words[5].endswith(inode):
                return f"process {words[4]}"
    return "another process"


def _strange(path: Path, why: str) -> OutputError:
    return OutputError(
        f"{printable(str(path))} cannot be used: {why}", hint="move it away, or make it yours"
    )
