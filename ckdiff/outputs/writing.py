"""Writing all of it, and letting the disk begin early."""

from __future__ import annotations

import os
import sys


def write_all(fd: int, data: bytes | memoryview) -> None:
    """os.write until everything is written; OSError passes through."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """os.pwrite until everything is written, from byte ``offset`` on; OSError passes through."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def sync_data(fd: int) -> None:
    """Wait until what a file holds is on the disk; OSError passes through.

    Without its times, which nobody needs and which cost the file system a transaction.
    """
    getattr(os, "fdatasync", os.fsync)(fd)


def start_writeback(fd: int, offset: int = 0, size: int = 0) -> None:
    """Let the disk begin now what a later fsync would have to wait for; ``size`` 0: to the end."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).sync_file_range(
            fd, ctypes.c_longlong(offset), ctypes.c_longlong(size), ctypes.c_uint(2)
        )
