"""A native SIGBUS handler: reading a mapped page of a file that was cut must not kill the process.

Windows are populated before they are read, which turns a cut file into an error code. What is
left is the moment between populating and reading. There the handler maps a page of zeros over the
faulting address and the kernel goes on; the identity check at the end of the window then finds
that the file has changed and nothing computed from it is kept.

A fault outside our mappings is handed on to the handler that was installed before.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.compare import load_word, store_word
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.lanes import I32, I64, Value

#: fields of the table the handler works from, int64 each; then (start, end, faults) of each mapping
_FAULTS, _MMAP, _SIGNAL, _PREVIOUS, _PAGE, _RANGES, _FIRST = range(7)
_COLUMNS = 3
_CAPACITY = 1 << 14
_SET_TABLE = -1  # a "signal number" by which Python hands the table's address to the handler
_SI_ADDR = 16  # offset of si_addr in siginfo_t on 64-bit Linux
_MAP_FIXED_ANONYMOUS = 0x02 | 0x10 | 0x20  # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_TABLE_NAME = "ckdiff_sigbus_table"


def _static(b: Any) -> Value:
    """One 8-byte variable that lives with the handler's machine code."""
    module = b.module
    if _TABLE_NAME in module.globals:
        return module.globals[_TABLE_NAME]
    variable = ir.GlobalVariable(module, I64, _TABLE_NAME)
    variable.initializer = I64(0)
    variable.linkage = "internal"
    return variable


@intrinsic  # type: ignore[untyped-decorator]
def _get_table(typing: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.load(_static(b))

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _set_table(typing: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(args[0], _static(b))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_mmap(typing: Any, function: Any, address: Any, size: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        kind = ir.FunctionType(I64, [I64, I64, I32, I32, I32, I64])
        pointer = b.inttoptr(args[0], kind.as_pointer())
        rest = [I32(mmap.PROT_READ), I32(_MAP_FIXED_ANONYMOUS), I32(-1), I64(0)]
        return b.call(pointer, [args[1], args[2], *rest])

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_handler(typing: Any, function: Any, number: Any, info: Any, context_: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        kind = ir.FunctionType(ir.VoidType(), [I32, I64, I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int32, types.int64, types.int64), generate


_SIGNATURE = types.void(types.int32, types.int64, types.int64)


def _guard_kernel() -> Callable[..., None]:
    def guard(number: int, info: int, context: int) -> None:
        if number == _SET_TABLE:
            _set_table(info)
            return
        table = _get_table()
        address = load_word(info + _SI_ADDR)
        ranges = load_word(table + 8 * _RANGES)
        for i in range(ranges):
            at = table + 8 * (_FIRST + _COLUMNS * i)
            if load_word(at) <= address and address < load_word(at + 8):
                page = load_word(table + 8 * _PAGE)
                start = address - address % page
                if _call_mmap(load_word(table + 8 * _MMAP), start, page) == start:
                    store_word(table + 8 * _FAULTS, load_word(table + 8 * _FAULTS) + 1)
                    store_word(at + 16, load_word(at + 16) + 1)
                    return
        previous = load_word(table + 8 * _PREVIOUS)
        if previous > 1:  # neither SIG_DFL nor SIG_IGN
            _call_handler(previous, number, info, context)
        else:  # back to the default; the instruction faults again and the process ends
            _call_handler(load_word(table + 8 * _SIGNAL), number, 0, 0)

    return guard


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_lock = threading.Lock()
_table = np.zeros(_FIRST + _COLUMNS * _CAPACITY, np.int64)
_mappings = _table[_FIRST:].reshape(_CAPACITY, _COLUMNS)
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
        guard = c_function("guard", "", _SIGNATURE, _guard_kernel)
        libc = ctypes.CDLL(None, use_errno=True)
        for field, function in ((_MMAP, libc.mmap), (_SIGNAL, libc.signal)):
            _table[field] = ctypes.cast(function, ctypes.c_void_p).value or 0
        _table[_PAGE] = mmap.PAGESIZE
        ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)(guard.address)(
            _SET_TABLE, _table.ctypes.data, 0
        )
        action = _SigAction(handler=guard.address, flags=_SA_SIGINFO | _SA_ONSTACK)
        if libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_previous)) != 0:
            raise OSError(ctypes.get_errno(), "sigaction(SIGBUS)")
        _table[_PREVIOUS] = _previous.handler or 0


def remove() -> None:
    """Take the handler away again when its last user is done."""
    global _users
    if not available():
        return
    with _lock:
        _users -= 1
        if _users == 0:
            ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(_previous), None)


def watch(address: int, size: int) -> None:
    """Guard a mapping. Without a free place it goes unguarded; populating still protects it."""
    with _lock:
        ranges = int(_table[_RANGES])
        if ranges < _CAPACITY:
            _mappings[ranges] = address, address + size, 0
            _table[_RANGES] = ranges + 1  # last: the handler may run at any moment


def forget(address: int) -> None:
    """Stop guarding the mapping that starts at ``address``."""
    with _lock:
        ranges = int(_table[_RANGES])
        found = np.flatnonzero(_mappings[:ranges, 0] == address)
        if found.size:
            _mappings[found[0]] = _mappings[ranges - 1]
            _table[_RANGES] = ranges - 1


def faults(address: int | None = None) -> int:
    """How many faults were caught so far: in this process, or in the mapping at ``address``."""
    total = int(_table[_FAULTS])
    if address is None or not total:  # asked after every window: the usual answer is cheap
        return total
    with _lock:
        known = _mappings[: int(_table[_RANGES])]
        return int(known[known[:, 0] == address, 2].sum())
