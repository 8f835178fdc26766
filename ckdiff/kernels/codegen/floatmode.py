"""The CPU's floating-point mode: what a thread inherits must not decide a count.

Libraries set "flush denormals to zero" for a thread, on purpose or just by being loaded (code
built with -ffast-math does), and new threads inherit it. Two subnormal numbers would then be no
distance apart. The driver works in the default mode, and puts back what it found.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.codegen.lanes import I8, I32, I64, Value

_X86_DEFAULT = 0x1F80  # round to nearest, keep denormals, no exception traps
_ARM_DEFAULT = 0


def _machine() -> str:
    return str(llvm.get_process_triple()).partition("-")[0]


def _x86_control(b: Any, name: str, slot: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.sse.{name}")
    b.call(function, [b.bitcast(slot, I8.as_pointer())])


def _write(b: Any, machine: str, mode: Value) -> None:
    """Set the control register to ``mode``, an i64."""
    if machine in ("x86_64", "i686"):
        slot = cgutils.alloca_once(b, I32)
        b.store(b.trunc(mode, I32), slot)
        _x86_control(b, "ldmxcsr", slot)
    elif machine in ("aarch64", "arm64"):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.set.fpcr")
        b.call(function, [mode])


@intrinsic  # type: ignore[untyped-decorator]
def enter_default_mode(typing: Any) -> Any:
    """Switch this thread to the default mode; gives the mode it was in."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        machine = _machine()
        found: Value = I64(0)
        if machine in ("x86_64", "i686"):
            slot = cgutils.alloca_once(b, I32)
            _x86_control(b, "stmxcsr", slot)
            found = b.zext(b.load(slot), I64)
            _write(b, machine, I64(_X86_DEFAULT))
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(I64, [])
            function = cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.get.fpcr")
            found = b.call(function, [])
            _write(b, machine, I64(_ARM_DEFAULT))
        return found

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def leave_default_mode(typing: Any, mode: Any) -> Any:
    """Put back the mode that ``enter_default_mode`` found."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _write(b, _machine(), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate
