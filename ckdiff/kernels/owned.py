"""Files that only we can have written: how they are opened, and how they are made.

Machine code is believed as our own code is, so it must be as hard to replace. A file counts only
if it is a regular one of ours that nobody else may write, in a folder of ours that nobody else may
write, and if nobody else can put another folder in its place. Everything is opened from ``/`` on,
one name at a time and relative to what was just checked, so that nothing changes between the check
and the use.

What is not ours is refused with a reason. What is not there raises OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from functools import cache

LARGEST = 1 << 24  #: bytes of a file; a kernel has some thousands
_MOST_LINKS = 40  # as the kernel has it
#: only a handle: opening a FIFO or a device like this neither waits nor starts anything
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SHARED = "others may write to it"
_FOREIGN = "it belongs to another user"


def open_folder(path: str, *, make: bool = False) -> tuple[int, str]:
    """A descriptor for ``path`` and "", or -1 and why what lies there could be somebody else's.

    With ``make`` missing folders are made, for us alone. The folder itself must not be a link; on
    the way links are followed where nobody else can have made them or can turn them. Raises OSError
    where there is no such folder and none can be made.
    """
    if not path.startswith("/"):
        return -1, f"{path}: it is relative, so the current directory would choose what we run"
    with contextlib.ExitStack() as handles:
        walk = _Walk(handles)
        refused = walk.to(path, make) or walk.end()
        return (-1, refused) if refused else (os.dup(walk.descriptor), "")


def read(folder: int, name: str) -> tuple[bytes, str]:
    """The content of a file in ``folder`` and "", or nothing and why it could be somebody else's.

    Raises OSError where there is none.
    """
    # looked at first: opening a device can do something even when nothing is read
    refused = _weak_file(os.stat(name, dir_fd=folder, follow_symlinks=False))
    if refused:
        return b"", refused
    with open(os.open(name, _READ, dir_fd=folder), "rb") as file:
        state = os.fstat(file.fileno())
        refused = _weak_file(state)
        # room for so much is made before anything is read
        return (b"", refused) if refused else (file.read(min(state.st_size, LARGEST)), "")


def write(folder: int, name: str, content: bytes) -> None:
    """Put a file of ours into ``folder``, whole or not at all. Raises OSError."""
    aside = f".{name}.{os.urandom(8).hex()}"
    descriptor = os.open(aside, _WRITE, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise


class _Walk:
    """From ``/`` to a folder, never past a place where somebody else could have led us astray."""

    def __init__(self, handles: contextlib.ExitStack) -> None:
        self._handles = handles
        self._owners = _owners_on_the_way(os.geteuid())
        self._stack = [("", self._kept(os.open("/", _HANDLE)))]

    @property
    def descriptor(self) -> int:
        return self._stack[-1][1]

    @property
    def _place(self) -> str:
        return "/".join(name for name, _ in self._stack)

    def to(self, path: str, make: bool) -> str:
        """Go there; why not, if not."""
        ahead = _names(path)
        links = 0
        while ahead:
            name = ahead.pop()
            if name == "..":
                del self._stack[max(1, len(self._stack) - 1) :]
                continue
            entry = self._open(name, make)
            if isinstance(entry, str):
                return entry
            state = os.fstat(entry)
            refused = self._weak_parent(name, state.st_uid)
            if refused:
                return refused
            if stat.S_ISLNK(state.st_mode):
                if not ahead:
                    return f"{self._place}/{name}: it is a link"
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink("", dir_fd=entry)
                if target.startswith("/"):
                    del self._stack[1:]
                ahead += _names(target)
            else:
                self._stack.append((name, entry))
                if not stat.S_ISDIR(state.st_mode):
                    return f"{self._place}: it is not a directory"
        return ""

    def end(self) -> str:
        """Why what lies where we are could be somebody else's."""
        state = os.fstat(self.descriptor)
        if state.st_uid != os.geteuid():
            return f"{self._place or '/'}: {_FOREIGN}"
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{self._place or '/'}: {_SHARED}"
        return ""

    def _open(self, name: str, make: bool) -> int | str:
        try:
            return self._kept(os.open(name, _HANDLE, dir_fd=self.descriptor))
        except FileNotFoundError:
            refused = self._weak_parent(name, os.geteuid())
            if refused:  # where nothing may be made there is nothing to wait for
                return refused
            if not make:
                raise
        with contextlib.suppress(FileExistsError):  # another process of ours was faster
            os.mkdir(name, 0o700, dir_fd=self.descriptor)
        return self._kept(os.open(name, _HANDLE, dir_fd=self.descriptor))

    def _kept(self, descriptor: int) -> int:
        self._handles.callback(os.close, descriptor)
        return descriptor

    def _weak_parent(self, name: str, owner: int) -> str:
        """Why others could exchange ``name``, which is ``owner``'s, in the folder where we are."""
        state = os.fstat(self.descriptor)
        if state.st_uid not in self._owners:
            return f"{self._place or '/'}: {_FOREIGN}"
        shared = state.st_mode & stat.S_IWOTH or (
            state.st_mode & stat.S_IWGRP and not _is_private_group(state.st_gid)
        )
        if not shared:
            return ""
        if state.st_mode & stat.S_ISVTX:  # as /tmp: everyone may only move what is theirs
            return "" if owner in self._owners else f"{self._place}/{name}: {_FOREIGN}"
        return f"{self._place or '/'}: {_SHARED}"


def _names(path: str) -> list[str]:
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _weak_file(state: os.stat_result) -> str:
    if stat.S_ISLNK(state.st_mode):
        return "it is a link"
    if not stat.S_ISREG(state.st_mode):
        return "it is not a regular file"
    if state.st_uid != os.geteuid():
        return _FOREIGN
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return _SHARED
    if state.st_size > LARGEST:
        return "it is larger than any kernel"
    return ""


@cache
def _owners_on_the_way(ours: int) -> set[int]:
    """Whose folders may lie above one of ours: the system's and our own."""
    owners = {0, ours}
    # In a user namespace without the system's root (Apptainer, rootless containers) its folders
    # belong to nobody: the number that stands for everyone who is not in the namespace.
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/uid_map", "rb") as file:
            whole = file.read(4096).split() == [b"0", b"0", b"4294967295"]
        if not whole:
            with open("/proc/sys/kernel/overflowuid", "rb") as file:
                owners.add(int(file.read(16)))
    return owners


def _is_private_group(number: int) -> bool:
    """Whether a group is ours alone, as many systems make one for each user (umask 002).

    Such a group is known by its name, which is the user's: asking for all of its members would
    mean asking a directory service for everyone.
    """
    import grp  # seldom needed
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except (KeyError, OSError):
        return False
    return (
        group.gr_gid == user.pw_gid
        and group.gr_name == user.pw_name
        and set(group.gr_mem) <= {user.pw_name}
    )
