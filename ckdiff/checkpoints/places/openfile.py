"""One open source file, and whether it is still the file that was opened."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from dataclasses import dataclass

from ckdiff.errors import CheckpointError, SourceChanged

#: device, inode, size in bytes, modification and status change times in nanoseconds
Identity = tuple[int, int, int, int, int]

#: descriptors left for everything else a run opens: outputs, sockets, libraries
_SPARE_FILES = 128
_WHAT_TO_DO = "let whatever writes it finish, then run again"


@dataclass(slots=True)
class OpenFile:
    """A regular file held open for reading. ``close`` may be called more than once."""

    path: str  #: absolute
    fd: int  #: -1 after ``close``
    size: int  #: bytes
    identity: Identity  #: as it was right after opening, before any byte was read

    @classmethod
    def open(cls, path: str) -> OpenFile:
        """Open ``path`` for reading; never waits for a writer, whatever ``path`` is.

        Raises CheckpointError for what is missing, unreadable or not a regular file.
        """
        try:
            # Looked at before it is opened: opening a device can already do something.
            _require_regular(path, os.stat(path))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise _cannot_open(path, error) from None
        try:
            status = os.fstat(fd)
            _require_regular(path, status)
        except BaseException:
            os.close(fd)
            raise
        return cls(os.path.abspath(path), fd, status.st_size, _identity(status))

    def read(self, begin: int, nbytes: int) -> bytes:
        """Bytes of it, fewer only at its end. Raises CheckpointError."""
        parts: list[bytes] = []
        have = 0
        try:
            while have < nbytes and (data := os.pread(self.fd, nbytes - have, begin + have)):
                parts.append(data)
                have += len(data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self) -> None:
        """Raise SourceChanged if the open file is not what it was when it was opened."""
        try:
            status = os.fstat(self.fd)
        except OSError as error:  # a network file system whose server forgot the file
            raise SourceChanged(
                f"{self.path}: cannot be checked for changes ({error.strerror})",
                hint=_WHAT_TO_DO,
            ) from None
        now = _identity(status)
        if now == self.identity:
            return
        if status.st_size < self.size:
            what = f"was truncated from {self.size:,} to {status.st_size:,} bytes"
        elif status.st_size > self.size:
            what = f"grew from {self.size:,} to {status.st_size:,} bytes"
        elif status.st_nlink == 0:
            what = "was replaced or removed"
        elif now[3] != self.identity[3]:
            what = "was rewritten"
        else:
            what = "was touched (rewritten, renamed, or its mode or links changed)"
        raise SourceChanged(f"{self.path}: {what} while it was being read", hint=_WHAT_TO_DO)

    def check_path(self) -> None:
        """Raise SourceChanged if the path no longer leads to the open file."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise SourceChanged(
                f"{self.path}: was removed while it was being read ({error.strerror})",
                hint=_WHAT_TO_DO,
            ) from None
        if (status.st_dev, status.st_ino) != self.identity[:2]:
            raise SourceChanged(
                f"{self.path}: was replaced while it was being read", hint=_WHAT_TO_DO
            )

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def read_into(fd: int, into: memoryview, begin: int) -> int:
    """Fill a buffer of bytes from a file, from byte ``begin`` on; gives how many bytes came, fewer
    only at its end. OSError passes through.
    """
    have = 0
    while have < len(into) and (got := os.preadv(fd, [into[have:]], begin + have)):
        have += got
    return have


def make_room(files: int) -> None:
    """Raise the soft limit on open files if ``files`` more would not fit.

    Raises CheckpointError where the hard limit is too low as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_now() + files + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed - _SPARE_FILES // 2 > hard:
        raise CheckpointError(
            f"{files:,} shards need about {needed:,} open files but the limit is {hard:,}",
            hint="raise it with `ulimit -Hn`, or merge the shards",
        )
    target = needed + files if hard == resource.RLIM_INFINITY else hard
    # Where even this is refused, opening will say so with the file's name.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def _open_now() -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(directory))
    return 64


def _identity(status: os.stat_result) -> Identity:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _require_regular(path: str, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise CheckpointError(
        f"{path}: is {kind}, not a regular file", hint="give a regular safetensors file"
    )


def _cannot_open(path: str, error: OSError | ValueError) -> CheckpointError:
    if not isinstance(error, OSError):
        return CheckpointError(f"{path!r}: is not a path ({error})")
    hint = None
    if error.errno == errno.ENOENT:
        link = os.path.islink(path)
        reason = "is a link to a file that does not exist" if link else "does not exist"
        hint = "fetch the whole checkpoint again" if link else "check the path"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        reason = "too many open files"
        hint = "raise the limit with `ulimit -n`"
    else:
        reason = f"cannot be opened: {error.strerror}"
    return CheckpointError(f"{path}: {reason}", hint=hint)
