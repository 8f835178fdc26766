"""Asking the disk for the first bytes of a checkpoint while Python is still importing.

Loading numpy and numba takes half a second, during which a cold disk would be idle. This only gives
advice to the kernel: nothing is read here, nothing is trusted, and every failure is ignored, since
opening the checkpoint will say what is wrong with it.
"""

from __future__ import annotations

import os
import stat
import threading

from ckdiff.naming import natural_key

_AMOUNT = 192 << 20  # bytes of each side; about what a disk gives in the time
_PIECE = 16 << 20  # bytes asked for at once, the sides in turn


def start_reading(*paths: str) -> None:
    """Begin reading the start of the first shard of each path, in the background."""
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_ask, args=(paths,), name="ckdiff-ahead", daemon=True).start()


def _ask(paths: tuple[str, ...]) -> None:
    files = []
    try:
        for path in paths:
            shard = _first_shard(path)
            # looked at before it is opened: opening a device can already do something
            if stat.S_ISREG(os.stat(shard).st_mode):
                files.append(os.open(shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        for start in range(0, _AMOUNT, _PIECE):
            for fd in files:
                os.posix_fadvise(fd, start, _PIECE, os.POSIX_FADV_WILLNEED)
    except (OSError, ValueError, IndexError):
        pass
    finally:
        for fd in files:
            os.close(fd)


def _first_shard(path: str) -> str:
    if not os.path.isdir(path):
        return path
    shards = [name for name in os.listdir(path) if name.endswith(".safetensors")]
    return os.path.join(path, min(shards, key=natural_key, default=""))
