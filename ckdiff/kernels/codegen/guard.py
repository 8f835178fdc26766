"""Generating the SIGBUS handler of :mod:`ckdiff.kernels.guard`."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

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
from ckdiff.kernels.codegen.lanes import I32, I64, VOID, Value, call_at
from ckdiff.kernels.codegen.words import load_word, store_word

_SI_ADDR = 16  # offset of si_addr in siginfo_t on 64-bit Linux
_MAP_FIXED_ANONYMOUS = 0x02 | 0x10 | 0x20  # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS
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
        rest = [I32(mmap.PROT_READ), I32(_MAP_FIXED_ANONYMOUS), I32(-1), I64(0)]
        return call_at(b, I64, args[0], [args[1], args[2], *rest])

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_handler(typing: Any, function: Any, number: Any, info: Any, context_: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int32, types.int64, types.int64), generate


def guard_kernel() -> Callable[..., None]:
    def guard(number: int, info: int, context: int) -> None:
        if number == GUARD_SET_TABLE:
            _set_table(info)
            return
        table = _get_table()
        address = load_word(info + _SI_ADDR)
        ranges = load_word(table + 8 * GUARD_RANGES)
        for i in range(ranges):
            at = table + 8 * (GUARD_FIRST + GUARD_COLUMNS * i)
            if load_word(at) <= address and address < load_word(at + 8):
                page = load_word(table + 8 * GUARD_PAGE)
                start = address & -page
                if _call_mmap(load_word(table + 8 * GUARD_MMAP), start, page) == start:
                    store_word(table + 8 * GUARD_FAULTS, load_word(table + 8 * GUARD_FAULTS) + 1)
                    store_word(at + 16, load_word(at + 16) + 1)
                    return
        previous = load_word(table + 8 * GUARD_PREVIOUS)
        if previous > 1:  # neither SIG_DFL nor SIG_IGN
            _call_handler(previous, number, info, context)
        else:  # back to the default; the instruction faults again and the process ends
            _call_handler(load_word(table + 8 * GUARD_SIGNAL), number, 0, 0)

    return guard
