"""A native SIGBUS handler: reading a mapped page of a file that was cut must not kill the process.

Windows are populated before they are read, which turns a cut file into an error code. What is
left is the moment between populating and reading. There the handler maps a page of zeros over the
faulting address and the kernel goes on; the identity check at the end of the window then finds
that the file has changed and nothing computed from it is kept.

A fault outside our mappings is handed on to the handler that was installed before.

The handler is the whole process's: it is there while readers of mappings are open, and no longer.
:mod:`ckdiff.checkpoints.places.mapped` sees to that, so that whoever reads need not.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading

import numpy as np

from ckdiff.kernels.abi import (
    GUARD_COLUMNS,
    GUARD_FAULTS,
    GUARD_FIRST,
    GUARD_MMAP,
    GUARD_PAGE,
    GUARD_PREVIOUS,
    GUARD_RANGES,
    GUARD_SET_TABLE,
    GUARD_SIGNAL,
)
from ckdiff.kernels.compiled import c_function

_CAPACITY = 1 << 14
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()
_table = np.zeros(GUARD_FIRST + GUARD_COLUMNS * _CAPACITY, np.int64)
_mappings = _table[GUARD_FIRST:].reshape(_CAPACITY, GUARD_COLUMNS)
_users = 0
_previous = _SigAction()


def available() -> bool:
    """Whether the guard can be used here: 64-bit Linux. Elsewhere populating has to do."""
    return sys.platform == "linux" and sys.maxsize > 2**32


def install() -> None:
    """Put the handler in place (once, however many users); every call needs a ``remove``."""
    global _users
    if not available():
        return
    with _lock:
        _users += 1
        if _users > 1:
            return
        guard = c_function("guard")
        for field, function in ((GUARD_MMAP, _libc.mmap), (GUARD_SIGNAL, _libc.signal)):
            _table[field] = ctypes.cast(function, ctypes.c_void_p).value or 0
        _table[GUARD_PAGE] = mmap.PAGESIZE
        ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)(guard.address)(
            GUARD_SET_TABLE, _table.ctypes.data, 0
        )
        action = _SigAction(handler=guard.address, flags=_SA_SIGINFO | _SA_ONSTACK)
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_previous)) != 0:
            raise OSError(ctypes.get_errno(), "sigaction(SIGBUS)")
        _table[GUARD_PREVIOUS] = _previous.handler or 0


def remove() -> None:
    """Take the handler away again when its last user is done."""
    global _users
    if not available():
        return
    with _lock:
        _users -= 1
        if _users == 0:
            _libc.sigaction(signal.SIGBUS, ctypes.byref(_previous), None)


def watch(address: int, size: int) -> None:
    """Guard a mapping. Without a free place it goes unguarded; populating still protects it."""
    with _lock:
        ranges = int(_table[GUARD_RANGES])
        if ranges < _CAPACITY:
            _mappings[ranges] = address, address + size, 0
            _table[GUARD_RANGES] = ranges + 1  # last: the handler may run at any moment


def forget(address: int) -> None:
    """Stop guarding the mapping that starts at ``address``."""
    with _lock:
        ranges = int(_table[GUARD_RANGES])
        found = np.flatnonzero(_mappings[:ranges, 0] == address)
        if found.size:
            _mappings[found[0]] = _mappings[ranges - 1]
            _table[GUARD_RANGES] = ranges - 1


def faults(address: int | None = None) -> int:
    """How many faults were caught so far: in this process, or in the mapping at ``address``."""
    total = int(_table[GUARD_FAULTS])
    if address is None or not total:  # asked after every window: the usual answer is cheap
        return total
    with _lock:
        known = _mappings[: int(_table[GUARD_RANGES])]
        return int(known[known[:, 0] == address, 2].sum())
