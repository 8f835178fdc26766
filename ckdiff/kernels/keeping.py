"""Where machine code is kept between processes, and what may be taken from there."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable

from ckdiff.errors import printable
from ckdiff.kernels import owned

_MAGIC = b"ckdiff kernel 3\n"
_HEAD = len(_MAGIC) + 32  # with a checksum
_MOVE = "NUMBA_CACHE_DIR may name a directory that only you can write"
#: called with one line, once in a process, when something in the cache cannot be trusted
on_refusal: list[Callable[[str], None]] = []
_refused: list[str] = []


def cache_directory() -> str | None:
    """Where machine code is kept: NUMBA_CACHE_DIR, else the user's cache directory.

    None for a user without a home.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return os.path.join(chosen, "ckdiff")
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not caches.startswith("/"):  # one that is relative does not count, says its specification
        home = os.environ.get("HOME") or _home()
        if not home:
            return None
        caches = os.path.join(home, ".cache")
    return os.path.join(caches, "ckdiff", "kernels")


def load(name: str) -> tuple[bytes | None, bool]:
    """The payload kept under ``name``, if there is one, and whether a new one may be kept there."""
    try:
        place = cache_directory()
        folder, refused = (-1, "") if place is None else owned.open_folder(place)
        if folder < 0:
            _refuse(refused, _MOVE)
            return None, False
        try:
            data, refused = owned.read(folder, name)
        finally:
            os.close(folder)
    except (OSError, ValueError):  # nothing there, or a path that is none
        return None, True
    if refused:
        _refuse(f"{place}/{name}: {refused}", "remove it")
        return None, False
    return opened(name, data), True


def save(name: str, payload: bytes) -> None:
    """Keep a payload for later processes, where that is possible and safe."""
    place = cache_directory()
    if place is None or len(payload) > owned.LARGEST - _HEAD:
        return
    try:
        folder, refused = owned.open_folder(place, make=True)
        if folder < 0:
            _refuse(refused, _MOVE)
            return
        try:
            owned.write(folder, name, sealed(name, payload))
        finally:
            os.close(folder)
    except (OSError, ValueError):  # a home that is read-only, a full disk: compile anew next time
        pass


def sealed(name: str, payload: bytes) -> bytes:
    """A payload with a checksum, of the name too, so that nothing can pass for another."""
    return _MAGIC + hashlib.sha256(name.encode() + payload).digest() + payload


def opened(name: str, data: bytes) -> bytes | None:
    """The payload that was sealed under this name; None for anything else."""
    payload = data[_HEAD:]
    return payload if data == sealed(name, payload) else None


def _home() -> str:
    import pwd  # seldom needed

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except (KeyError, OSError):
        return ""


def _refuse(why: str, remedy: str) -> None:
    """Say once why nothing is taken: a run that is slow for this reason can be mended."""
    if not why or _refused:
        return
    _refused.append(why)
    message = f"kernels are compiled anew and not kept: {printable(why)} ({remedy})"
    for report in on_refusal:
        report(message)
    if not on_refusal:
        logging.getLogger("ckdiff").warning("ckdiff: %s", message)
